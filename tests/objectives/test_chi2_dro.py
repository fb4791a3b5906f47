"""Chi2DRO and Chi2ConstrainedDRO (the divergence below (6.114))."""

import math
from typing import Any, ClassVar

import pytest
import torch

from llm_xrisk.objectives import Objective
from llm_xrisk.objectives.chi2_dro import Chi2ConstrainedDRO, Chi2DRO
from tests.contract import Batch, evaluate
from tests.objectives.test_cvar_dro import FirstVisitContract
from tests.reference import chi2_dro as reference

F64 = torch.float64


class TestChi2DRO(FirstVisitContract):
    objective_class: ClassVar[type[Objective]] = Chi2DRO
    options: ClassVar[dict[str, Any]] = {"lam": 0.5, "eta_lr": 0.05}

    def reference(
        self, batch: Batch, u: dict[int, Any], gamma: float
    ) -> tuple[float, dict[str, Any]]:
        rows = (batch.scores.tolist(), batch.targets.tolist())
        loss, gradient = reference.penalised(*rows, u, lam=0.5, lr=0.05)
        return loss, {"scores": gradient}

    def tracked(self, objective: Objective) -> dict[int, Any]:
        return {reference.ETA: objective.eta.value.item()}

    def test_worked_example(self) -> None:
        objective = Chi2DRO(lam=1.0, eta_lr=0.1)
        first = evaluate(objective, Batch(torch.tensor([0.0, 0.0, 3.0]), torch.zeros(3)))
        # eta = 1 leaves the weights 0, 0 and 3
        assert first.loss.item() == pytest.approx(1 + 0.5 * (9 / 3 - 1))
        assert first.gradients["scores"].tolist() == pytest.approx([0.0, 0.0, 1.0])
        second = evaluate(objective, Batch(torch.tensor([1.0, 2.0]), torch.zeros(2)))
        # weights 1 and 2
        assert second.loss.item() == pytest.approx(1 + 0.5 * ((1 + 4) / 2 - 1))
        assert second.gradients["scores"].tolist() == pytest.approx([0.5, 1.0])
        assert objective.eta.value.item() == pytest.approx(1 - 0.1 * (1 - 1.5))


class TestChi2ConstrainedDRO(FirstVisitContract):
    objective_class: ClassVar[type[Objective]] = Chi2ConstrainedDRO
    options: ClassVar[dict[str, Any]] = {"rho": 0.4, "eta_lr": 0.05}

    def reference(
        self, batch: Batch, u: dict[int, Any], gamma: float
    ) -> tuple[float, dict[str, Any]]:
        rows = (batch.scores.tolist(), batch.targets.tolist())
        loss, gradient = reference.constrained(*rows, u, gamma=gamma, rho=0.4, lr=0.05)
        return loss, {"scores": gradient}

    def tracked(self, objective: Objective) -> dict[int, Any]:
        return {0: objective.inner.u.item(), reference.ETA: objective.eta.value.item()}

    def test_worked_example(self) -> None:
        objective = Chi2ConstrainedDRO(gamma=0.5, rho=0.125, eta_lr=0.1)
        first = evaluate(objective, Batch(torch.tensor([0.0, 2.0]), torch.zeros(2)))
        # mean 1, deviation 1: eta = 1 - 1 / sqrt(2 rho) = -1, u = (1 + 9) / 2
        c = math.sqrt(1.25)
        assert first.loss.item() == pytest.approx(c * math.sqrt(5) - 1)
        want = [c * 1 / math.sqrt(5) / 2, c * 3 / math.sqrt(5) / 2]
        assert first.gradients["scores"].tolist() == pytest.approx(want)
        second = evaluate(objective, Batch(torch.tensor([3.0]), torch.zeros(1)))
        u = 0.5 * 5 + 0.5 * 16
        p = c * 4 / math.sqrt(u)
        assert second.loss.item() == pytest.approx(c * math.sqrt(u) - 1)
        assert second.gradients["scores"].tolist() == pytest.approx([p])
        assert objective.eta.value.item() == pytest.approx(-1 - 0.1 * (1 - p))


def exponential(count: int = 40) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.empty(count, dtype=F64).exponential_(generator=generator)


@pytest.mark.parametrize("lam", [0.05, 1.0, 20.0])
def test_the_penalised_value_is_the_largest_over_weights(lam: float) -> None:
    losses = exponential()
    eta = reference.balanced_eta(losses.tolist(), lam)
    best = torch.tensor([max((x - eta) / lam + 1, 0.0) for x in losses.tolist()], dtype=F64)

    def primal(p: torch.Tensor) -> float:
        return ((p * losses).mean() - lam / 2 * (p - 1).square().mean()).item()

    value = Chi2DRO(lam=lam).exact(losses).item()
    assert value == pytest.approx(primal(best), rel=1e-10)
    for other in perturbed(best):
        assert primal(other) <= value + 1e-12


@pytest.mark.parametrize("rho", [1e-3, 0.2, 2.0])
def test_the_constrained_value_is_the_largest_within_the_radius(rho: float) -> None:
    losses = exponential()
    eta = reference.best_eta(losses.tolist(), rho)
    best = torch.tensor(reference.shaped(losses.tolist(), eta), dtype=F64)
    value = Chi2ConstrainedDRO(rho=rho).exact(losses).item()
    assert value == pytest.approx((best * losses).mean().item(), rel=1e-8)
    for other in perturbed(best):
        shrunk = 1 + (other - 1) * min(1.0, math.sqrt(rho / reference.spread(other.tolist())))
        assert (shrunk * losses).mean().item() <= value + 1e-9


def perturbed(weights: torch.Tensor) -> list[torch.Tensor]:
    """Other weights of mean 1, near and far."""
    generator = torch.Generator().manual_seed(1)
    found = []
    for size in (1e-3, 0.1, 1.0):
        for _ in range(50):
            noise = size * torch.randn(len(weights), generator=generator, dtype=F64)
            moved = (weights + noise).relu()
            found.append(moved / moved.mean())
    return found


@pytest.mark.parametrize("rho", [1e-6, 1e-4, 1e-2])
def test_a_small_radius_adds_the_root_of_the_variance(rho: float) -> None:
    losses = exponential()
    want = losses.mean() + (2 * rho * losses.var(correction=0)).sqrt()
    assert Chi2ConstrainedDRO(rho=rho).exact(losses).item() == pytest.approx(want.item(), rel=1e-9)
    single = Chi2ConstrainedDRO(rho=rho)(losses.to(torch.float32)).loss
    assert single.item() == pytest.approx(want.item(), rel=1e-4)


def test_a_large_penalty_adds_the_variance() -> None:
    losses = exponential()
    for lam in (1e1, 1e3, 1e6):
        want = losses.mean() + losses.var(correction=0) / (2 * lam)
        assert Chi2DRO(lam=lam).exact(losses).item() == pytest.approx(want.item(), rel=1e-9)
        single = Chi2DRO(lam=lam)(losses.to(torch.float32)).loss
        assert single.item() == pytest.approx(want.item(), rel=1e-5)


@pytest.mark.parametrize("objective", [Chi2DRO(lam=1e-6), Chi2ConstrainedDRO(rho=100.0)])
def test_the_largest_loss_is_all_that_counts_in_the_end(objective: Objective) -> None:
    losses = exponential().requires_grad_()
    value = objective.exact(losses)
    (gradient,) = torch.autograd.grad(value, losses)
    assert value.item() == pytest.approx(losses.max().item(), abs=1e-3)
    assert gradient[losses.argmax()].item() == pytest.approx(1.0, abs=1e-6)


def test_equal_losses_weigh_alike_and_keep_a_gradient() -> None:
    for objective, weight in ((Chi2DRO(), 1.0), (Chi2ConstrainedDRO(rho=0.5), math.sqrt(2))):
        result = evaluate(objective, Batch(torch.full((8,), 0.7), torch.zeros(8)))
        assert result.loss.item() == pytest.approx(0.7, abs=1e-4)
        assert result.gradients["scores"].tolist() == pytest.approx([weight / 8] * 8, rel=1e-2)


def test_losses_all_below_eta_weigh_nothing_until_it_follows() -> None:
    objective = Chi2ConstrainedDRO(gamma=1.0, eta_lr=0.5)
    evaluate(objective, Batch(torch.tensor([5.0, 5.5]), torch.zeros(2)))
    low = Batch(torch.tensor([1.0, 1.5]), torch.zeros(2))
    result = evaluate(objective, low)
    assert result.loss.isfinite()
    assert result.gradients["scores"].tolist() == [0.0, 0.0]
    for _ in range(12):
        result = evaluate(objective, low)
    assert result.gradients["scores"].sum() > 0.5


@pytest.mark.parametrize(
    ("objective", "tolerance"),
    [
        (Chi2DRO(lam=0.5, eta_lr=0.02), 0.02),
        (Chi2ConstrainedDRO(gamma=0.1, rho=0.5, eta_lr=0.02), 0.06),
    ],
)
def test_minibatches_find_the_worst_case(objective: Objective, tolerance: float) -> None:
    generator = torch.Generator().manual_seed(0)
    losses = exponential(400).to(torch.float32)
    found = 0.0
    for step in range(2500):
        rows = torch.randint(400, (16,), generator=generator)
        loss = objective(losses[rows]).loss
        found += loss.item() / 1500 if step >= 1000 else 0.0
    assert found == pytest.approx(objective.exact(losses).item(), rel=tolerance)


@pytest.mark.parametrize(
    ("objective", "options", "message"),
    [
        (Chi2DRO, {"lam": 0.0}, r"lam must be positive, got 0.0"),
        (Chi2DRO, {"eta_lr": 0.0}, r"need lr > 0"),
        (Chi2ConstrainedDRO, {"rho": -1.0}, r"rho must be positive, got -1.0"),
        (Chi2ConstrainedDRO, {"gamma": 0.0}, r"gamma must be in \(0, 1\], got 0.0"),
    ],
)
def test_bad_settings_are_refused(
    objective: type[Objective], options: dict[str, float], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        objective(**options)
