"""RobustGlobalContrastive (iSogCLR, Algorithm 35)."""

import math
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from llm_xrisk.objectives import Objective
from llm_xrisk.objectives.contrastive_robust import RobustGlobalContrastive
from llm_xrisk.objectives.temperatures import ConstantTemperature
from tests.contract import Batch, ObjectiveContract, evaluate, exact_loss, state
from tests.objectives.test_contrastive import TestGlobalContrastive as ViewsContract
from tests.reference import contrastive_robust as reference

F64 = torch.float64
STEP = {"rho": 0.4, "lower": 0.2, "upper": 0.6, "lr": 0.05, "beta": 0.7}


class TestRobustGlobalContrastive(ObjectiveContract):
    objective_class: ClassVar[type[Objective]] = RobustGlobalContrastive
    options: ClassVar[dict[str, Any]] = {"tau": 0.5, **STEP}
    has_duals: ClassVar[bool] = True
    eps: float = 0.0

    make_batch = ViewsContract.make_batch
    degenerate = ViewsContract.degenerate

    def at_temperature(self, tau: float) -> dict[str, Any]:
        return {"tau": tau, "lower": tau / 2, "upper": 2 * tau}

    def reference(
        self, batch: Batch, u: dict[Any, Any], gamma: float
    ) -> tuple[float, dict[str, Any]]:
        index = batch.groups["index"].tolist()
        own = {i: u[i][0] for i in u}
        tau = {i: u[i][1] if i in u else 0.5 for i in {*u, *index}}
        momentum = {i: u[i][2] for i in u}
        loss, first, second = reference.step(
            batch.scores.tolist(),
            batch.targets.tolist(),
            index,
            own,
            tau,
            momentum,
            gamma=gamma,
            eps=self.eps,
            bounds=(STEP["lower"], STEP["upper"]),
            **{name: STEP[name] for name in ("rho", "lr", "beta")},
        )
        u.update({i: (own[i], tau[i], momentum[i]) for i in own})
        return loss, {"scores": first, "targets": second}

    def tracked(self, objective: Objective) -> dict[int, Any]:
        inner, dual = objective.inner, objective.temperature.dual
        return {
            i: (math.exp(inner.u[i]), dual.value[i].item(), dual.direction[i].item())
            for i in inner.visited.nonzero().flatten().tolist()
        }

    def test_worked_example(self) -> None:
        views = torch.eye(2, dtype=F64)
        batch = Batch(views, views, {"index": torch.arange(2)}, leaves=("scores", "targets"))
        objective = RobustGlobalContrastive(
            2, tau=0.5, rho=0.3, lr=0.1, beta=1.0, eps=self.eps, state_dtype=F64
        )
        result = evaluate(objective, batch)
        # every l is 0 - 1, so g = exp(-1 / 0.5) for each view
        g = math.exp(-2)
        assert result.loss.item() == pytest.approx(0.5 * (math.log(self.eps + g) + 0.3))
        z = math.log(self.eps + g) + 0.3 - g / (self.eps + g) * -1 / 0.5
        assert objective.temperature.dual.value.tolist() == pytest.approx([0.5 - 0.1 * z] * 2)

    def test_gamma_one_is_the_minibatch_loss(self) -> None:
        """At the taus before the step that forward takes."""
        objective = self.build(gamma=1.0)
        for batch in self.batches(2):
            copies = batch.copy()
            loss = exact_loss(objective, copies)
            want = torch.autograd.grad(loss, [copies.scores, copies.targets])
            result = evaluate(objective, batch)
            torch.testing.assert_close(result.loss, loss.detach(), rtol=1e-12, atol=1e-12)
            for name, gradient in zip(batch.leaves, want, strict=True):
                torch.testing.assert_close(result.gradients[name], gradient, rtol=1e-10, atol=1e-12)

    def test_with_frozen_scores_the_state_approaches_the_inner_values(self) -> None:
        """At taus that stopped at their bound; the views of a sample share the mean of theirs."""
        start, frozen = self.batches(2)
        objective = self.build(rho=9.0)
        for batch in [start, *[frozen] * 120]:
            evaluate(objective, batch)
        before = state(objective)
        evaluate(objective, frozen)
        for name in ("inner.u", "temperature.dual.value"):
            torch.testing.assert_close(state(objective)[name], before[name], rtol=1e-10, atol=1e-10)
        index = frozen.groups["index"]
        for i in index.unique().tolist():
            tau = objective.temperature.dual.value[i]
            assert tau == STEP["lower"]
            g = [(differences_of(frozen, v) / tau).exp().mean() for v in views_of(index, i)]
            want = torch.stack(g).mean().log()
            torch.testing.assert_close(objective.inner.u[i], want, rtol=1e-10, atol=1e-10)


def test_epsilon_stands_in_the_logarithm_and_in_the_weights() -> None:
    contract = TestRobustGlobalContrastive()
    contract.options, contract.eps = {**contract.options, "eps": 0.3}, 0.3
    contract.test_value_gradient_and_state_equal_the_loops()
    contract.test_worked_example()


def views_of(index: Tensor, sample: int) -> list[int]:
    return torch.cat([index, index]).eq(sample).nonzero().flatten().tolist()


def differences_of(batch: Batch, view: int) -> Tensor:
    """l of the negatives of one view."""
    views = F.normalize(torch.cat([batch.scores, batch.targets]), dim=-1)
    ids, size = batch.groups["index"].repeat(2), len(batch.scores)
    return (views @ views[view])[ids != ids[view]] - views[view] @ views[(view + size) % len(views)]


def gradient_in_tau(batch: Batch, view: int, tau: float, rho: float) -> float:
    """rho - KL(p, uniform), which the derivative of tau log mean exp(l / tau) + rho tau is."""
    share = torch.softmax(differences_of(batch, view) / tau, 0)
    return rho - (share * (share * len(share)).log()).sum().item()


def embedded(count: int, generator: torch.Generator, noise: float = 0.4) -> Batch:
    """Views of ``count`` samples in a few clusters."""
    centre = torch.randn(4, 6, generator=generator, dtype=F64)[torch.arange(count) % 4]
    sample = centre + 0.7 * torch.randn(count, 6, generator=generator, dtype=F64)
    first, second = (
        sample + noise * torch.randn(count, 6, generator=generator, dtype=F64) for _ in range(2)
    )
    return Batch(first, second, {"index": torch.arange(count)}, leaves=("scores", "targets"))


def test_every_tau_reaches_the_solution_of_its_constraint_or_its_bound() -> None:
    """tau_i* by bisection of KL(p_i, uniform) = rho, in its bounds, on frozen features."""
    batch, rho = embedded(24, torch.Generator().manual_seed(0)), 0.9
    objective = RobustGlobalContrastive(
        24, 1.0, tau=0.3, rho=rho, lower=0.2, upper=0.4, lr=0.05, state_dtype=F64
    )
    for _ in range(800):
        objective(batch.scores, batch.targets, index=batch.groups["index"])
    found = objective.temperature.dual.value
    for i in range(24):
        low, high = 0.2, 0.4
        for _ in range(60):
            middle = (low + high) / 2
            z = sum(gradient_in_tau(batch, view, middle, rho) for view in (i, i + 24))
            low, high = (low, middle) if z > 0 else (middle, high)
        assert found[i].item() == pytest.approx((low + high) / 2, abs=1e-6)
    inside = ((found > 0.201) & (found < 0.399)).sum().item()
    assert 6 <= inside <= 18, "some should stop at a bound and some should not"


def test_z_is_the_derivative_of_the_exact_objective_in_every_tau() -> None:
    batch = embedded(10, torch.Generator().manual_seed(1))
    objective = RobustGlobalContrastive(
        10, 1.0, tau=0.3, rho=0.5, lr=1.0, beta=1.0, lower=1e-3, upper=100.0, state_dtype=F64
    )
    tau = torch.full((10,), 0.3, dtype=F64, requires_grad=True)
    views, index = F.normalize(torch.cat([batch.scores, batch.targets]), dim=-1), torch.arange(10)
    both = torch.cat([index, index])
    gap = views @ views.T - (views * views.roll(10, 0)).sum(-1)[:, None]
    exponent = (gap / tau[both][:, None]).masked_fill(both == both[:, None], -math.inf)
    value = tau[both] * (exponent.logsumexp(-1) - math.log(18) + 0.5)
    (want,) = torch.autograd.grad(value.sum() / 2, tau)  # the mean over a sample's two views
    result = evaluate(objective, batch)
    torch.testing.assert_close(result.loss, value.mean().detach(), rtol=1e-12, atol=0)
    moved = objective.temperature.dual.value
    inside = (0.3 - want).clamp(1e-3, 100.0)
    torch.testing.assert_close(moved, inside, rtol=1e-10, atol=1e-10)


def test_a_well_separated_batch_keeps_its_gradient() -> None:
    """Sixty temperatures below the positive."""
    angle = torch.linspace(0, 0.3, 2, dtype=F64)
    first = torch.stack([angle.cos(), angle.sin()], -1) * torch.tensor([[1], [-1]])
    batch = Batch(first, first, {"index": torch.arange(2)}, leaves=("scores", "targets"))
    options = {"tau": 1 / 30, "lower": 0.01}
    got = evaluate(RobustGlobalContrastive(2, **options), batch.to(torch.float32))
    want = evaluate(RobustGlobalContrastive(2, state_dtype=F64, **options), batch)
    for name, gradient in want.gradients.items():
        assert (got.gradients[name].to(F64) - gradient).norm() <= 1e-3 * gradient.norm()
        assert gradient.norm() > 0.05


def test_taus_stay_in_their_bounds_whatever_comes() -> None:
    generator = torch.Generator().manual_seed(0)
    for rho in (0.0, 50.0):
        objective = RobustGlobalContrastive(8, rho=rho, lr=1.0)
        for _ in range(5):
            batch = embedded(8, generator).to(torch.float32)
            objective(batch.scores, batch.targets, index=batch.groups["index"])
            value = objective.temperature.dual.value
            assert value.ge(0.05).all() and value.le(0.7).all()


def test_another_temperature_takes_the_place_of_the_individual_ones() -> None:
    batch = embedded(6, torch.Generator().manual_seed(0))
    fixed = ConstantTemperature(0.3, rho=0.2)
    got = evaluate(RobustGlobalContrastive(6, temperature=fixed, state_dtype=F64), batch)
    individual = RobustGlobalContrastive(6, tau=0.3, rho=0.2, state_dtype=F64)
    want = evaluate(individual, batch)
    assert torch.equal(got.loss, want.loss)
    assert individual.temperature.dual.value.ne(0.3).all()


def test_in_eval_every_row_has_the_first_tau() -> None:
    batch = embedded(6, torch.Generator().manual_seed(0))
    objective = RobustGlobalContrastive(6, tau=0.3, lr=0.1, state_dtype=F64)
    first = evaluate(objective, batch).loss
    assert not torch.equal(evaluate(objective, batch).loss, first)
    assert torch.equal(evaluate(objective.eval(), batch).loss, first)
