# SPDX-License-Identifier: Apache-2.0
"""How well scores rank positives above negatives: the numbers X-risks are trained for."""

from typing import Any

import numpy as np

from llm_xrisk.evaluation.partial_auc import one_way_partial_auc, two_way_partial_auc

_HINT = 'ranking metrics need scikit-learn: pip install "scikit-learn>=1.5"'


def ranking_metrics(
    prediction: Any, *, max_fpr: float = 0.3, min_tpr: float = 0.5
) -> dict[str, float]:
    """AUC, average precision and partial AUCs, as ``compute_metrics`` of a trainer.

    Args:
        prediction: Anything with ``predictions`` and ``label_ids``, (n,) or (n, L) arrays; or
            these two as a pair.
        max_fpr: Of the one-way area (FPR <= max_fpr), and of the two-way area min_tpr <= TPR,
            FPR <= 1 - min_tpr.
        min_tpr: Of the two-way area.

    Returns:
        ``auroc``, ``average_precision``, ``opauc`` and ``tpauc``: means over the labels that have
        both classes; NaN where none has.

    Raises:
        ImportError: scikit-learn is missing.

    Example:
        >>> ranking_metrics(([3.0, 1.0, 2.0, 0.0], [1, 0, 1, 0]))["auroc"]
        1.0
    """
    try:
        from sklearn.metrics import average_precision_score, roc_auc_score
    except ImportError as error:
        raise ImportError(_HINT) from error
    pair = (
        (prediction.predictions, prediction.label_ids)
        if hasattr(prediction, "label_ids")
        else prediction
    )
    scores, targets = (np.asarray(part, dtype=np.float64) for part in pair)
    scores, targets = (a.reshape(len(a), -1) for a in (scores, targets > 0.5))
    found: dict[str, list[float]] = {
        n: [] for n in ("auroc", "average_precision", "opauc", "tpauc")
    }
    for s, y in zip(scores.T, targets.T, strict=True):
        if not y.any() or y.all():
            continue
        found["auroc"].append(float(roc_auc_score(y, s)))
        found["average_precision"].append(float(average_precision_score(y, s)))
        found["opauc"].append(one_way_partial_auc(s, y, max_fpr))
        found["tpauc"].append(two_way_partial_auc(s, y, min_tpr, 1 - min_tpr))
    return {name: float(np.mean(v)) if v else float("nan") for name, v in found.items()}
