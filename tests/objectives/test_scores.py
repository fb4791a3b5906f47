"""Scores of sequences and surrogates of pairs, against their formulas."""

import math

import pytest
import torch

from llm_xrisk.objectives import scores as s
from llm_xrisk.objectives import surrogates

F64 = torch.float64
LOG_PROBS = torch.tensor([[-1.0, -2.0, -9.0], [-0.5, -7.0, -9.0], [-3.0, -3.0, -3.0]], dtype=F64)
OLD = torch.tensor([[-1.5, -1.0, 0.0], [-0.5, 0.0, 0.0], [0.0, 0.0, 0.0]], dtype=F64)
MASK = torch.tensor([[True, True, False], [True, False, False], [False, False, False]])


def test_scores_are_sums_and_means_over_the_completion_and_zero_without_one() -> None:
    assert s.log_likelihood(LOG_PROBS, MASK).tolist() == [-3.0, -0.5, 0.0]
    assert s.mean_log_likelihood(LOG_PROBS, MASK).tolist() == [-1.5, -0.5, 0.0]
    ratios = [(math.exp(0.5) + math.exp(-1)) / 2, 1.0, 0.0]
    assert s.likelihood_ratio(LOG_PROBS, MASK, OLD).tolist() == pytest.approx(ratios)


def test_kl_terms_are_sums_over_the_completion() -> None:
    assert s.k1(LOG_PROBS, MASK, OLD).tolist() == pytest.approx([-0.5 + 1.0, 0.0, 0.0])
    third = (math.exp(0.5) - 1 - 0.5) + (math.exp(-1) - 1 + 1)
    assert s.k3(LOG_PROBS, MASK, OLD).tolist() == pytest.approx([third, 0.0, 0.0])


def test_padding_of_any_value_changes_neither_scores_nor_gradients() -> None:
    padded = LOG_PROBS.masked_fill(~MASK, -math.inf).requires_grad_()
    for score in (s.mean_log_likelihood, s.likelihood_ratio, s.k3):
        (gradient,) = torch.autograd.grad(score(padded, MASK, OLD).sum(), padded)
        assert gradient.isfinite().all()
        assert not gradient[~MASK].any()


@pytest.mark.parametrize("score", [s.likelihood_ratio, s.k1, s.k3])
def test_a_missing_old_policy_is_refused_with_the_way_out(score: s.SequenceScore) -> None:
    with pytest.raises(ValueError, match=r"got no old log-probs; pass old_log_probs"):
        score(LOG_PROBS, MASK, None)


@pytest.mark.parametrize(
    ("surrogate", "at", "value"),
    [
        (surrogates.Identity(), 0.7, 0.7),
        (surrogates.Hinge(), 0.7, 1.7),
        (surrogates.SquaredHinge(margin=0.5), -0.2, 0.3**2),
        (surrogates.Squared(), -3.0, 4.0),
        (surrogates.Logistic(scale=2.0), 1.0, math.log(1 + math.exp(0.5))),
        (surrogates.Logistic(), 1e4, 1e4),
    ],
)
def test_surrogates_have_their_value_and_the_slope_of_it(
    surrogate: surrogates.Surrogate, at: float, value: float
) -> None:
    point = torch.tensor(at, dtype=F64, requires_grad=True)
    assert surrogate(point).item() == pytest.approx(value)
    (want,) = torch.autograd.grad(surrogate(point), point)
    got, slope = surrogate.with_slope(point.detach())
    assert got.item() == pytest.approx(value)
    assert slope.item() == pytest.approx(want.item())
