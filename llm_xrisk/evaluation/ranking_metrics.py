# SPDX-License-Identifier: Apache-2.0
"""How well scores rank positives above negatives: the numbers X-risks are trained for."""

from typing import Any

import numpy as np

from llm_xrisk.evaluation.partial_auc import (
    Floats,
    as_array,
    check_ranked,
    check_region,
    one_way_partial_auc,
    positives,
    two_way_partial_auc,
)
from llm_xrisk.fcco.arguments import shown

_LARGEST = np.finfo(np.float64).max
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
        TypeError: a prediction without scores and targets.
        ValueError: shapes that differ, scores that are no numbers, targets that are no labels, or
            limits outside their range.

    Example:
        >>> ranking_metrics(([3.0, 1.0, 2.0, 0.0], [1, 0, 1, 0]))["auroc"]
        1.0
    """
    try:
        from sklearn.metrics import average_precision_score, roc_auc_score
    except ImportError as error:
        raise ImportError(_HINT) from error
    check_region(min_tpr, max_fpr)
    scores, targets = _rows(prediction)
    found: dict[str, list[float]] = {
        n: [] for n in ("auroc", "average_precision", "opauc", "tpauc")
    }
    for s, y in zip(scores.T, targets.T, strict=True):
        if not y.any() or y.all():
            continue
        s = np.clip(s, -_LARGEST, _LARGEST)  # scikit-learn takes no infinities
        found["auroc"].append(float(roc_auc_score(y, s)))
        found["average_precision"].append(float(average_precision_score(y, s)))
        found["opauc"].append(one_way_partial_auc(s, y, max_fpr))
        found["tpauc"].append(two_way_partial_auc(s, y, min_tpr, 1 - min_tpr))
    return {name: float(np.mean(v)) if v else float("nan") for name, v in found.items()}


def _rows(prediction: Any) -> tuple[Floats, Any]:
    """Scores (n, L), and which of their targets are positive."""
    pair = prediction
    if hasattr(prediction, "label_ids"):
        pair = (prediction.predictions, prediction.label_ids)
    if not isinstance(pair, tuple | list) or len(pair) != 2:
        raise TypeError(
            f"got {shown(prediction)} and needs an EvalPrediction or a pair: "
            "ranking_metrics((scores, targets))"
        )
    scores, targets = as_array("scores", pair[0]), as_array("targets", pair[1])
    flat = [a[:, None] if a.ndim == 1 else a for a in (scores, targets)]
    if flat[0].ndim != 2 or flat[0].shape != flat[1].shape or scores.size == 0:
        raise ValueError(
            f"got scores {scores.shape} and targets {targets.shape}; need one score and one target "
            "for each row, both (n,), or for each of L labels, (n, L)"
        )
    check_ranked(scores)
    return flat[0], positives(flat[1])
