"""What the objectives of distributionally robust optimization share: losses and weights."""

from collections.abc import Callable

import pytest
import torch

from llm_xrisk.objectives import Objective
from llm_xrisk.objectives.chi2_dro import Chi2ConstrainedDRO, Chi2DRO
from llm_xrisk.objectives.cvar_dro import CVaRDRO
from llm_xrisk.objectives.kl_constrained_dro import KLConstrainedDRO
from llm_xrisk.objectives.kl_dro import KLDRO
from llm_xrisk.objectives.robust import GlobalDual
from tests.contract import Batch, assert_same, evaluate, state
from tests.objectives.test_kl_dro import losses_of

F64 = torch.float64
BUILD: list[Callable[[], Objective]] = [
    lambda: KLDRO(gamma=0.3, state_dtype=F64),
    lambda: KLDRO(log_alpha=-1.0, state_dtype=F64),
    lambda: KLConstrainedDRO(gamma=0.3, tau_lr=0.1, state_dtype=F64),
    lambda: CVaRDRO(alpha=0.3, nu_lr=0.1, state_dtype=F64),
    lambda: CVaRDRO(alpha=0.3, nu_lr=0.1, eps=0.3, state_dtype=F64),
    lambda: Chi2DRO(lam=0.5, eta_lr=0.1, state_dtype=F64),
    lambda: Chi2ConstrainedDRO(gamma=0.3, rho=0.4, eta_lr=0.1, state_dtype=F64),
]
every = pytest.mark.parametrize("build", BUILD)
MOVING_AVERAGES = pytest.mark.parametrize("build", [BUILD[0], *BUILD[2:]])


def batches(count: int) -> list[Batch]:
    generator = torch.Generator().manual_seed(0)
    return [losses_of(generator) for _ in range(count)]


@every
def test_a_reference_of_zero_is_none(build: Callable[[], Objective]) -> None:
    with_zeros, without = build(), build()
    for batch in batches(3):
        zeros = torch.zeros_like(batch.targets)
        got = evaluate(with_zeros, Batch(batch.scores, zeros))
        leaf = batch.scores.clone().requires_grad_()
        want = without(leaf).loss
        (gradient,) = torch.autograd.grad(want, leaf)
        assert torch.equal(got.loss, want.detach())
        assert torch.equal(got.gradients["scores"], gradient)
        exact = with_zeros.exact(batch.scores, zeros)
        assert torch.equal(exact, without.exact(batch.scores))
    assert_same(state(with_zeros), state(without))


@MOVING_AVERAGES
def test_a_shift_of_the_reference_moves_the_value_and_no_weight(
    build: Callable[[], Objective],
) -> None:
    one, other = build(), build()
    for batch in batches(5):
        want = evaluate(one, batch)
        got = evaluate(other, Batch(batch.scores, batch.targets - 3.0))
        torch.testing.assert_close(got.loss, want.loss + 3.0, rtol=1e-10, atol=0)
        assert_same(got.gradients, want.gradients, 1e-9)


@every
def test_a_model_that_is_its_reference_starts_from_equal_weights(
    build: Callable[[], Objective],
) -> None:
    batch = batches(1)[0]
    result = evaluate(build(), Batch(batch.scores, batch.scores))
    gradient = result.gradients["scores"]
    torch.testing.assert_close(gradient, gradient.mean().expand_as(gradient), rtol=1e-9, atol=0)
    assert result.metrics["rows/effective_fraction"].item() == pytest.approx(1.0)
    c = 1.8**0.5 if isinstance(build(), Chi2ConstrainedDRO) else 1.0
    assert result.metrics["weight/max"].item() == pytest.approx(c)


@every
def test_no_gradient_reaches_the_reference(build: Callable[[], Objective]) -> None:
    batch = batches(1)[0]
    scores, targets = (t.clone().requires_grad_() for t in (batch.scores, batch.targets))
    for loss in (build()(scores, targets).loss, build().exact(scores, targets)):
        grads = torch.autograd.grad(loss, [scores, targets], allow_unused=True)
        assert grads[0].sum() > 0
        assert grads[1] is None


@every
def test_the_reported_weights_are_those_of_the_gradient(build: Callable[[], Objective]) -> None:
    objective = build()
    for batch in batches(3):
        result = evaluate(objective, batch)
        weights = result.gradients["scores"] * len(batch.scores)
        assert result.metrics["weight/max"].item() == pytest.approx(weights.max().item())
        effective = weights.sum() ** 2 / weights.square().sum().clamp(min=1e-9) / len(weights)
        assert result.metrics["rows/effective_fraction"].item() == pytest.approx(effective.item())


@every
def test_no_rows_at_all_are_no_loss(build: Callable[[], Objective]) -> None:
    objective = build()
    before = state(objective)
    empty = torch.zeros(0, requires_grad=True)
    output = objective(empty)
    output.loss.backward()
    assert output.loss.item() == output.metrics["objective"].item() == 0.0
    assert output.metrics["skipped"].item() == 1.0
    assert output.metrics.keys() == objective(torch.ones(2)).metrics.keys()
    assert objective.exact(empty).item() == 0.0
    assert build()(torch.zeros(0)).loss == 0
    assert_same(state(build()), before)


@every
def test_metrics_do_not_change_with_later_steps(build: Callable[[], Objective]) -> None:
    objective = build()
    first, second = batches(2)
    metrics = evaluate(objective, first).metrics
    kept = {name: value.clone() for name, value in metrics.items()}
    evaluate(objective, second)
    assert_same(dict(metrics), kept)


@every
def test_evaluation_before_training_needs_no_state(build: Callable[[], Objective]) -> None:
    objective = build().eval()
    before = state(objective)
    assert evaluate(objective, batches(1)[0]).loss.isfinite()
    assert_same(state(objective), before)


@every
def test_rows_without_a_reference_of_their_own_are_refused(build: Callable[[], Objective]) -> None:
    with pytest.raises(ValueError, match=r"got scores \(3,\), targets \(2,\) and needs"):
        build()(torch.zeros(3), torch.zeros(2))


def test_a_global_dual_takes_the_steps_of_a_dual_of_many_keys() -> None:
    one = GlobalDual(lr=0.3, initial=1.0, beta=0.4, lower=0.2)
    key = torch.zeros(1, dtype=torch.long)
    other = GlobalDual(lr=0.3, initial=1.0, beta=0.4, lower=0.2)
    for grad in (2.0, -1.0, 9.0, 9.0):
        one.descend(torch.tensor(grad))
        other.step(torch.tensor([grad]), key)
        assert_same(dict(one.state_dict()), dict(other.state_dict()), 1e-6)
    assert one.value.item() == pytest.approx(0.2)
