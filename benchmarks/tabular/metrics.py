"""Test metrics: scikit-learn's where it has them, and this package's partial areas."""

import numpy as np
from sklearn.metrics import average_precision_score, recall_score, roc_auc_score

from benchmarks.tabular.grid import MAX_FPR, METRICS, TPAUC_REGION
from llm_xrisk.evaluation.partial_auc import one_way_partial_auc, two_way_partial_auc

DIGITS_METRICS = {"accuracy": "balanced accuracy", "tail": "recall of the 3 rarest"}
TAIL = 3


def metric(name: str, scores: np.ndarray, targets: np.ndarray) -> float:
    """One metric; NaN where a score is none, so that such a run is never chosen."""
    if not np.isfinite(scores).all():
        return float("nan")
    if name == "auroc":
        return float(roc_auc_score(targets, scores))
    if name == "ap":
        return float(average_precision_score(targets, scores))
    if name == "opauc":
        return one_way_partial_auc(scores, targets, MAX_FPR)
    if name == "tpauc":
        return two_way_partial_auc(scores, targets, *TPAUC_REGION)
    found = scores.reshape(len(targets), -1).argmax(1)
    classes = np.unique(targets)[-TAIL if name == "tail" else 0 :]
    return float(recall_score(targets, found, labels=classes, average="macro"))


def weighted(name: str, scores: np.ndarray, targets: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """A metric on many resamples at once: row r of (R, n) ``counts`` says how often each row came.

    The same numbers as `metric` of the repeated rows, but for scores that tie across the classes.
    """
    order = np.argsort(-scores, kind="stable")
    positive = (targets == 1)[order]
    drawn = counts[:, order].astype(np.float64)
    wins, losses = drawn * positive, drawn * ~positive
    if name == "ap":
        above, others = wins.cumsum(1), losses.cumsum(1)
        return (wins * above / np.maximum(above + others, 1)).sum(1) / wins.sum(1)
    min_tpr, max_fpr = {"auroc": (0.0, 1.0), "opauc": (0.0, MAX_FPR), "tpauc": TPAUC_REGION}[name]
    # the lowest positives come last in this order, the highest negatives first
    lowest = _first((1 - min_tpr) * wins.sum(1), wins[:, ::-1])[:, ::-1]
    highest = _first(max_fpr * losses.sum(1), losses)
    below = highest.sum(1, keepdims=True) - highest.cumsum(1)
    return (lowest * below).sum(1) / (lowest.sum(1) * highest.sum(1))


def _first(count: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """The first ``count`` (R,) of rows that came (R, n) times each, the last by its fraction."""
    before = rows.cumsum(1) - rows
    return np.clip(count[:, None] - before, 0, rows)


def all_metrics(scores: np.ndarray, targets: np.ndarray) -> dict[str, float]:
    """Every metric of the table that a data set has."""
    names = METRICS if len(scores) == len(targets) else DIGITS_METRICS
    return {name: metric(name, scores, targets) for name in names}


def mcclish(share: float) -> float:
    """The one-way area as ``roc_auc_score(max_fpr=...)`` rescales it: chance is 0.5."""
    chance = MAX_FPR / 2
    return (1 + (share - chance) / (1 - chance)) / 2
