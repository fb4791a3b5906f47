"""KLConstrainedDRO (Algorithm 24 with a learned tau, (6.16))."""

import math
from typing import Any, ClassVar

import pytest
import torch

from llm_xrisk.objectives import Objective
from llm_xrisk.objectives.kl_constrained_dro import KLConstrainedDRO
from llm_xrisk.objectives.kl_dro import KLDRO
from tests.contract import Batch, evaluate
from tests.objectives.test_kl_dro import RobustContract, losses_of
from tests.reference import kl_constrained_dro as reference

F64 = torch.float64
OPTIONS = {"rho": 0.2, "tau": 0.7, "tau_0": 0.3, "tau_lr": 0.4, "tau_beta": 0.6, "tau_clip": 0.1}


class TestKLConstrainedDRO(RobustContract):
    objective_class: ClassVar[type[Objective]] = KLConstrainedDRO
    options: ClassVar[dict[str, Any]] = OPTIONS
    has_duals: ClassVar[bool] = True

    def at_temperature(self, tau: float) -> dict[str, Any]:
        return {"tau": tau, "tau_0": tau}

    def reference(
        self, batch: Batch, u: dict[int, Any], gamma: float
    ) -> tuple[float, dict[str, Any]]:
        names = {name.removeprefix("tau_"): value for name, value in OPTIONS.items()}
        names["tau_0"] = names.pop("0")
        rows = (batch.scores.tolist(), batch.targets.tolist())
        loss, gradient = reference.step(*rows, u, gamma=gamma, **names)
        return loss, {"scores": gradient}

    def tracked(self, objective: Objective) -> dict[int, Any]:
        return {
            0: math.exp(objective.inner.u[0]),
            reference.TAU: objective.tau.value.item(),
            reference.DIRECTION: objective.tau.direction.item(),
        }

    def test_gamma_one_is_the_minibatch_loss(self) -> None:
        """At the best tau, whose own gradient is 0 then."""
        for batch in self.batches(2):
            objective = self.build(gamma=1.0)
            copies = batch.copy()
            loss = objective.exact(copies.scores, copies.targets)
            (gradient,) = torch.autograd.grad(loss, copies.scores)
            objective.tau.value.fill_(objective.best_tau(batch.scores - batch.targets))
            result = evaluate(objective, batch)
            torch.testing.assert_close(result.loss, loss.detach(), rtol=1e-12, atol=1e-12)
            torch.testing.assert_close(result.gradients["scores"], gradient, rtol=1e-10, atol=0)
            assert abs(objective.tau.direction.item()) < 1e-10

    def test_worked_example(self) -> None:
        batch = Batch(torch.tensor([1.0, 3.0]), torch.zeros(2))
        objective = KLConstrainedDRO(rho=0.1, tau=2.0, tau_lr=0.5, tau_beta=0.8)
        result = evaluate(objective, batch)
        weights = [math.exp(1 / 2), math.exp(3 / 2)]
        u = sum(weights) / 2
        assert result.loss.item() == pytest.approx(2 * math.log(u) + 2 * 0.1)
        assert result.gradients["scores"].tolist() == pytest.approx([w / u / 2 for w in weights])
        z = math.log(u) + 0.1 - (weights[0] * 1 / 2 + weights[1] * 3 / 2) / u / 2
        assert objective.tau.value.item() == pytest.approx(2 - 0.5 * 0.8 * z)


@pytest.mark.parametrize("tau", [0.2, 1.0, 3.0])
def test_the_step_of_tau_is_the_derivative_of_the_objective(tau: float) -> None:
    batch = losses_of(torch.Generator().manual_seed(0))
    losses, rho = batch.scores - batch.targets, 0.3
    leaf = torch.tensor(tau, dtype=F64, requires_grad=True)
    value = leaf * (losses / leaf).exp().mean().log() + leaf * rho
    (want,) = torch.autograd.grad(value, leaf)
    objective = KLConstrainedDRO(
        rho=rho, tau=tau, tau_0=1e-3, tau_lr=0.1, tau_beta=1.0, state_dtype=F64
    )
    assert evaluate(objective, batch).loss.item() == pytest.approx(value.item(), rel=1e-12)
    step = (tau - objective.tau.value.item()) / 0.1
    assert step == pytest.approx(want.item(), rel=1e-10)
    assert step == pytest.approx(rho - reference.divergence(losses.tolist(), tau), rel=1e-10)


@pytest.mark.parametrize("rho", [0.01, 0.3, 1.5])
def test_the_best_tau_has_weights_at_the_radius(rho: float) -> None:
    losses = torch.empty(50, dtype=F64).exponential_(generator=torch.Generator().manual_seed(0))
    objective = KLConstrainedDRO(rho=rho, tau_0=0.01)
    want = reference.best_tau(losses.tolist(), rho, 0.01)
    assert objective.best_tau(losses).item() == pytest.approx(want, rel=1e-9)
    risk = objective.exact(losses).item()
    for tau in (0.5 * want, 0.99 * want, 1.01 * want, 2 * want):
        assert risk < KLDRO(tau=tau, state_dtype=F64).exact(losses).item() + tau * rho


def test_the_dual_exceeds_the_primal_by_tau_0_rho() -> None:
    """(6.15) at its best weights, once with the radius binding and once with tau_0."""
    losses = torch.empty(50, dtype=F64).exponential_(generator=torch.Generator().manual_seed(0))
    for rho, tau_0 in ((0.3, 0.1), (0.3, 5.0)):
        objective = KLConstrainedDRO(rho=rho, tau=5.0, tau_0=tau_0)
        p = torch.softmax(losses / objective.best_tau(losses), 0)
        distance = (p * (50 * p).log()).sum()
        assert distance.item() <= rho + 1e-9
        primal = (p * losses).sum() - tau_0 * distance
        want = primal.item() + tau_0 * rho
        assert objective.exact(losses).item() == pytest.approx(want, rel=1e-9)


def test_a_radius_no_weights_reach_leads_to_tau_0() -> None:
    losses = torch.tensor([1.0, 2.0, 4.0])
    objective = KLConstrainedDRO(rho=2.0, tau_0=0.25)  # log 3 is 1.1
    assert objective.best_tau(losses).item() == pytest.approx(0.25)
    for _ in range(120):
        evaluate(objective, Batch(losses, torch.zeros(3)))
    assert objective.tau.value.item() == 0.25


@pytest.mark.parametrize("shift", [0.0, 5.0])
def test_minibatches_find_the_best_tau_wherever_the_losses_lie(shift: float) -> None:
    """The book's z_tau ends at tau_0 here, see the departures."""
    generator = torch.Generator().manual_seed(0)
    losses = torch.empty(400).exponential_(generator=generator)
    objective = KLConstrainedDRO(gamma=0.1, rho=0.3, tau_lr=0.02)
    best, found = objective.best_tau(losses).item(), 0.0
    for step in range(2000):
        rows = torch.randint(400, (16,), generator=generator)
        tau = objective(losses[rows] + shift).metrics["tau"].item()
        found += tau / 1000 if step >= 1000 else 0.0
    assert found == pytest.approx(best, rel=0.06)


def test_the_gradient_of_tau_is_clipped() -> None:
    objective = KLConstrainedDRO(rho=0.1, tau=0.1, tau_lr=0.01, tau_beta=1.0, tau_clip=2.0)
    losses = torch.zeros(1000)
    losses[0] = 10.0  # a divergence of log 1000, 6.9
    evaluate(objective, Batch(losses, torch.zeros(1000)))
    assert objective.tau.value.item() == pytest.approx(0.1 + 0.01 * 2.0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rho": 0.0}, r"rho and tau_clip must be positive, got 0.0 and 5.0"),
        ({"tau": 0.1, "tau_0": 0.2}, r"need 0 < tau_0 <= tau, got tau_0=0.2 and tau=0.1"),
        ({"tau_0": 0.0}, r"need 0 < tau_0 <= tau, got tau_0=0.0"),
        ({"tau_lr": 0.0}, r"need lr > 0 and beta in \(0, 1\], got lr=0.0"),
    ],
)
def test_bad_settings_are_refused(options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        KLConstrainedDRO(**options)
