"""Partial areas under the ROC curve against enumeration of pairs, a polygon and scikit-learn."""

from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch

from llm_xrisk.evaluation.partial_auc import one_way_partial_auc, two_way_partial_auc


def draw(seed: int, positives: int, negatives: int, ties: bool) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    scores = np.concatenate([rng.normal(0.7, 1, positives), rng.normal(0, 1, negatives)])
    targets = np.repeat([1, 0], [positives, negatives])
    order = rng.permutation(len(scores))
    return (np.round(scores * 2) / 2 if ties else scores)[order], targets[order]


def enumerated(scores: Any, targets: Any, min_tpr: Fraction, max_fpr: Fraction) -> Fraction:
    """(6.29) by loops over pairs, in exact arithmetic; k_1 and k_2 must be integers."""
    lowest = sorted(s for s, y in zip(scores, targets, strict=True) if y == 1)
    highest = sorted((s for s, y in zip(scores, targets, strict=True) if y == 0), reverse=True)
    k_1, k_2 = (1 - min_tpr) * len(lowest), max_fpr * len(highest)
    assert k_1.denominator == k_2.denominator == 1
    won = Fraction(0)
    for positive in lowest[: int(k_1)]:
        for negative in highest[: int(k_2)]:
            won += Fraction(int(positive > negative)) + Fraction(int(positive == negative), 2)
    return won / (k_1 * k_2)


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("min_tpr", [Fraction(0), Fraction(1, 4), Fraction(1, 2), Fraction(7, 8)])
@pytest.mark.parametrize("max_fpr", [Fraction(1, 10), Fraction(3, 10), Fraction(1, 2), Fraction(1)])
def test_the_area_is_the_share_of_pairs_won(min_tpr: Fraction, max_fpr: Fraction, ties: bool):
    for seed in range(4):
        scores, targets = draw(seed, positives=8, negatives=20, ties=ties)
        found = two_way_partial_auc(scores, targets, float(min_tpr), float(max_fpr))
        assert found == pytest.approx(float(enumerated(scores, targets, min_tpr, max_fpr)))


def test_a_row_on_the_edge_counts_by_its_fraction():
    # positives 3 and 1, negatives 2 and 0; FPR <= 3/4 holds the negative 2 and half of 0:
    # positive 3 wins 1 + 1/2 of 1.5, positive 1 wins 1/2 of 1.5
    scores, targets = [3.0, 1.0, 2.0, 0.0], [1, 1, 0, 0]
    assert one_way_partial_auc(scores, targets, 0.75) == pytest.approx((1.5 + 0.5) / (2 * 1.5))
    # TPR >= 1/4 holds the positive 1 and half of 3
    found = two_way_partial_auc(scores, targets, 0.25, 0.75)
    assert found == pytest.approx((0.5 * 1.5 + 0.5) / (1.5 * 1.5))


@pytest.mark.parametrize(("min_tpr", "max_fpr"), [(0.35, 0.27), (0.5, 0.5), (0.0, 0.013)])
def test_the_area_is_that_of_the_curve_clipped_to_the_region(min_tpr: float, max_fpr: float):
    scores, targets = draw(3, positives=7, negatives=11, ties=False)
    order = np.argsort(-scores)
    tpr = np.concatenate([[0], np.cumsum(targets[order] == 1)]) / 7
    fpr = np.concatenate([[0], np.cumsum(targets[order] == 0)]) / 11
    area = sum(
        (min(fpr[k + 1], max_fpr) - fpr[k]) * max(tpr[k] - min_tpr, 0)
        for k in range(len(order))
        if fpr[k] < max_fpr
    )
    found = two_way_partial_auc(scores, targets, min_tpr, max_fpr)
    assert found == pytest.approx(area / ((1 - min_tpr) * max_fpr))


@pytest.mark.parametrize("max_fpr", [0.1, 0.3, 0.77, 1.0])
def test_one_way_is_the_area_that_scikit_learn_rescales(max_fpr: float):
    metrics = pytest.importorskip("sklearn.metrics")
    scores, targets = draw(5, positives=13, negatives=29, ties=False)
    share, chance = one_way_partial_auc(scores, targets, max_fpr), max_fpr / 2
    expected = metrics.roc_auc_score(targets, scores, max_fpr=max_fpr if max_fpr < 1 else None)
    rescaled = share if max_fpr == 1 else (1 + (share - chance) / (1 - chance)) / 2
    assert rescaled == pytest.approx(expected)


def test_the_whole_region_with_ties_is_the_auc_of_scikit_learn():
    metrics = pytest.importorskip("sklearn.metrics")
    scores, targets = draw(6, positives=30, negatives=50, ties=True)
    expected = metrics.roc_auc_score(targets, scores)
    assert two_way_partial_auc(scores, targets, 0.0, 1.0) == pytest.approx(expected)


def test_perfect_scores_give_one_reversed_zero_and_constant_one_half():
    targets = np.repeat([1, 0], [5, 50])
    for limits in [(0.5, 0.5), (0.9, 0.01), (0.0, 1.0)]:
        assert two_way_partial_auc(targets, targets, *limits) == 1
        assert two_way_partial_auc(-targets, targets, *limits) == 0
        assert two_way_partial_auc(0 * targets, targets, *limits) == 0.5


@pytest.mark.parametrize("convert", [list, np.asarray, torch.as_tensor])
def test_lists_arrays_and_tensors_with_gradient_agree(convert: Any):
    scores, targets = draw(1, positives=4, negatives=9, ties=True)
    given = convert(scores)
    if isinstance(given, torch.Tensor):
        given.requires_grad_()
    expected = two_way_partial_auc(scores, targets, 0.5, 0.5)
    for labels in (targets, 2 * targets - 1, targets == 1):
        assert two_way_partial_auc(given, convert(labels), 0.5, 0.5) == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"min_tpr": 1.0}, r"min_tpr must be in \[0, 1\), got 1.0"),
        ({"max_fpr": 0.0}, r"max_fpr must be in \(0, 1\], got 0.0"),
        ({"targets": [1, 1]}, "got 2 positives of 2 rows; need both classes"),
        ({"targets": [1, 0, 0]}, r"got scores \(2,\) and targets \(3,\)"),
        ({"scores": [float("nan"), 0.0]}, "scores that are NaN"),
        ({"scores": ["a", "b"]}, "scores must be numbers, .* got a list of 2"),
        ({"targets": [1, 2]}, r"targets must be 0 and 1 .* got \[1.0, 2.0\]"),
        ({"targets": [0.3, 0.9]}, r"got \[0.3, 0.9\]; .* or are scores and targets exchanged\?"),
        ({"targets": [1, float("nan")]}, r"targets must be 0 and 1 .* got \[1.0, nan\]"),
        ({"targets": ["pos", "neg"]}, "targets must be numbers, .* map classes to 0 and 1 first"),
        ({"max_fpr": "0.3"}, r"max_fpr must be in \(0, 1\], got '0.3'"),
        ({"min_tpr": None}, r"min_tpr must be in \[0, 1\), got None"),
    ],
)
def test_bad_input_is_refused_with_what_is_needed(options: dict[str, Any], message: str):
    given = {"scores": [1.0, 0.0], "targets": [1, 0], "min_tpr": 0.5, "max_fpr": 0.5} | options
    with pytest.raises(ValueError, match=message):
        two_way_partial_auc(**given)
