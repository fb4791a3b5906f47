# SPDX-License-Identifier: Apache-2.0
"""Partial areas under the ROC curve: those that scikit-learn has not, or has only rescaled.

For the whole area, the precision-recall curve and McClish's rescaled partial area use
``roc_auc_score`` and ``average_precision_score`` of scikit-learn.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from llm_xrisk.fcco.arguments import fits, shown

Floats = NDArray[np.float64]


def one_way_partial_auc(scores: Any, targets: Any, max_fpr: float) -> float:
    """Share of the region FPR <= max_fpr that lies under the ROC curve.

    Chance is max_fpr / 2. ``roc_auc_score(targets, scores, max_fpr=...)`` is the same area
    rescaled to chance 0.5: (1 + (p - max_fpr / 2) / (1 - max_fpr / 2)) / 2.

    Args:
        scores: (n,) array or tensor, larger for positives.
        targets: (n,) 0 and 1, -1 and 1, or booleans.
        max_fpr: beta in (0, 1], the largest false-positive rate that counts.

    Returns:
        A number in [0, 1].

    Raises:
        ValueError: As `two_way_partial_auc`.

    Example:
        >>> one_way_partial_auc([3.0, 1.0, 2.0, 0.0], [1, 1, 0, 0], max_fpr=0.5)
        0.5
    """
    return two_way_partial_auc(scores, targets, min_tpr=0.0, max_fpr=max_fpr)


def two_way_partial_auc(scores: Any, targets: Any, min_tpr: float, max_fpr: float) -> float:
    r"""Share of the region TPR >= min_tpr, FPR <= max_fpr that lies under the ROC curve.

    .. math:: \frac{1}{k_1 k_2} \sum_{x_i \in S_+^{\uparrow}[1, k_1]}
              \sum_{x_j \in S_-^{\downarrow}[1, k_2]} 1[h_i > h_j] + \tfrac12 1[h_i = h_j]

    the pairs of the k_1 = (1 - min_tpr) n_+ lowest positives and the k_2 = max_fpr n_- highest
    negatives, as in (6.29) of the book. Where k_1 or k_2 is no integer, the row on the edge counts
    by its fraction, so that this is the area itself and moves smoothly with the limits.

    Args:
        scores: (n,) array or tensor, larger for positives.
        targets: (n,) 0 and 1, -1 and 1, or booleans.
        min_tpr: alpha in [0, 1), the smallest true-positive rate that counts.
        max_fpr: beta in (0, 1], the largest false-positive rate that counts.

    Returns:
        A number in [0, 1].

    Raises:
        ValueError: limits outside their range, shapes that differ, scores that are no numbers,
            targets that are no labels, or only one class.

    Example:
        >>> two_way_partial_auc([3.0, 1.0, 2.0, 0.0], [1, 1, 0, 0], min_tpr=0.0, max_fpr=1.0)
        0.75
        >>> two_way_partial_auc([3.0, 1.0, 2.0, 0.0], [1, 1, 0, 0], min_tpr=0.5, max_fpr=0.5)
        0.0
    """
    check_region(min_tpr, max_fpr)
    positives, negatives = _classes(scores, targets)
    lowest, highest = np.sort(positives), np.sort(negatives)[::-1]
    row_weight = _first((1 - min_tpr) * len(lowest), len(lowest))
    column_weight = _first(max_fpr * len(highest), len(highest))
    # ascending, so that the weight of all negatives below a positive is one entry of a running sum
    ascending = highest[::-1]
    below = np.concatenate([[0.0], np.cumsum(column_weight[::-1])])
    under = below[np.searchsorted(ascending, lowest, side="left")]
    up_to = below[np.searchsorted(ascending, lowest, side="right")]
    won = row_weight @ (0.5 * under + 0.5 * up_to)
    return float(won / (row_weight.sum() * below[-1]))


def _first(count: float, size: int) -> Floats:
    """Weights 1 for the first ``count`` of ``size`` rows, a fraction for the one on the edge."""
    return np.clip(count - np.arange(size, dtype=np.float64), 0.0, 1.0)


def _classes(scores: Any, targets: Any) -> tuple[Floats, Floats]:
    """The scores of the positives and of the negatives, or an error."""
    values, labels = as_array("scores", scores), as_array("targets", targets)
    if values.ndim != 1 or values.shape != labels.shape:
        raise ValueError(
            f"got scores {values.shape} and targets {labels.shape}; need one score and one target "
            "for each row, both of shape (n,)"
        )
    check_ranked(values)
    positive = positives(labels)
    if positive.all() or not positive.any():
        raise ValueError(
            f"got {int(positive.sum())} positives of {len(values)} rows; need both classes"
        )
    return values[positive], values[~positive]


def check_region(min_tpr: float, max_fpr: float) -> None:
    """Refuse limits of a region that are none.

    Raises:
        ValueError: min_tpr outside [0, 1) or max_fpr outside (0, 1].
    """
    if not fits(min_tpr, float) or not 0 <= min_tpr < 1:
        raise ValueError(f"min_tpr must be in [0, 1), got {shown(min_tpr)}; 0 is the whole region")
    if not fits(max_fpr, float) or not 0 < max_fpr <= 1:
        raise ValueError(f"max_fpr must be in (0, 1], got {shown(max_fpr)}; 1 is the whole region")


def check_ranked(scores: Floats) -> None:
    """Refuse scores without a rank.

    Raises:
        ValueError: NaN among them.
    """
    if np.isnan(scores).any():
        raise ValueError("got scores that are NaN, which have no rank; look at the model's output")


def positives(targets: Floats) -> NDArray[np.bool_]:
    """Which targets are positive, from {0, 1}, {-1, 1} or booleans.

    Raises:
        ValueError: other values.

    Example:
        >>> positives(np.array([-1.0, 1.0])).tolist()
        [False, True]
    """
    values = np.unique(targets)
    known = set(values.tolist())
    if not (known <= {0.0, 1.0} or known <= {-1.0, 1.0}):
        raise ValueError(
            f"targets must be 0 and 1 (or -1 and 1, or booleans), got {values[:6].tolist()}; "
            "threshold them, targets >= 0.5, or are scores and targets exchanged?"
        )
    return targets > 0.5


def as_array(name: str, rows: Any) -> Floats:
    """A list, an array or a tensor of any device as float64.

    Raises:
        ValueError: what is not made of numbers.
    """
    if hasattr(rows, "detach"):
        rows = rows.detach().cpu().double().numpy()
    try:
        return np.asarray(rows, dtype=np.float64)
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"{name} must be numbers, one for each row, got {shown(rows)} that makes no array of "
            "them; map classes to 0 and 1 first"
        ) from error
