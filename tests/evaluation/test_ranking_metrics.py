"""Ranking metrics refuse what has no rank and what is no label."""

from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from llm_xrisk.evaluation import ranking_metrics

SCORES, TARGETS = [3.0, 1.0, 2.0, 0.0], [1, 0, 1, 0]


class Prediction(NamedTuple):
    predictions: Any
    label_ids: Any


@pytest.mark.parametrize(
    "prediction",
    [
        (SCORES, TARGETS),
        [np.array(SCORES)[:, None], np.array(TARGETS)],
        Prediction(np.array(SCORES), np.array(TARGETS)[:, None] == 1),
        (torch.tensor(SCORES, dtype=torch.bfloat16, requires_grad=True), torch.tensor(TARGETS)),
        ([np.inf, 1.0, 2.0, -np.inf], [1, -1, 1, -1]),
    ],
)
def test_pairs_and_predictions_of_any_kind_agree(prediction: Any) -> None:
    assert ranking_metrics(prediction)["auroc"] == 1.0


def test_a_label_without_both_classes_is_left_out() -> None:
    scores, targets = np.array([SCORES, SCORES]).T, np.array([TARGETS, [1] * 4]).T
    assert ranking_metrics((scores, targets)) == ranking_metrics((SCORES, TARGETS))
    assert np.isnan(ranking_metrics((SCORES, [1] * 4))["opauc"])


@pytest.mark.parametrize(
    ("prediction", "error", "message"),
    [
        (None, TypeError, r"got None and needs an EvalPrediction or a pair"),
        (SCORES, TypeError, r"got a list of 4 and needs .* ranking_metrics\(\(scores, targets\)"),
        ((SCORES, TARGETS[:3]), ValueError, r"got scores \(4,\) and targets \(3,\); need one"),
        (([], []), ValueError, r"got scores \(0,\) and targets \(0,\)"),
        ((np.zeros((4, 2)), TARGETS), ValueError, r"got scores \(4, 2\) and targets \(4,\)"),
        ((TARGETS, SCORES), ValueError, r"targets must be 0 and 1 .* exchanged\?"),
        (([np.nan, 1, 2, 0], TARGETS), ValueError, "scores that are NaN"),
        ((SCORES, [1, 0, -100, 0]), ValueError, r"targets must be 0 and 1 .*got \[-100.0, 0.0, 1"),
        ((SCORES, list("abab")), ValueError, "targets must be numbers"),
    ],
)
def test_what_cannot_be_ranked_is_refused(
    prediction: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        ranking_metrics(prediction)


@pytest.mark.parametrize("limits", [{"max_fpr": 0.0}, {"min_tpr": 1.0}, {"max_fpr": "a"}])
def test_limits_outside_their_range_are_refused(limits: dict[str, Any]) -> None:
    ((name, value),) = limits.items()
    with pytest.raises(ValueError, match=rf"{name} must be in .*, got {value!r}"):
        ranking_metrics((SCORES, TARGETS), **limits)
