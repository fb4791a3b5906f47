"""CVaRDRO ((6.117))."""

from typing import Any, ClassVar

import pytest
import torch

from llm_xrisk.objectives import Objective
from llm_xrisk.objectives.cvar_dro import CVaRDRO
from tests.contract import Batch, evaluate
from tests.objectives.test_kl_dro import RobustContract, losses_of
from tests.reference import cvar_dro as reference

F64 = torch.float64


class FirstVisitContract(RobustContract):
    """Of duals that start at the best value for the first mini-batch."""

    has_duals: ClassVar[bool] = True

    def test_gamma_one_is_the_minibatch_loss(self) -> None:
        """At the best dual, where the first mini-batch finds it."""
        for batch in self.batches(3):
            objective = self.build(gamma=1.0)
            copies = batch.copy()
            loss = objective.exact(copies.scores, copies.targets)
            (gradient,) = torch.autograd.grad(loss, copies.scores)
            result = evaluate(objective, batch)
            torch.testing.assert_close(result.loss, loss.detach(), rtol=1e-12, atol=1e-12)
            torch.testing.assert_close(result.gradients["scores"], gradient, rtol=1e-9, atol=1e-12)


class TestCVaRDRO(FirstVisitContract):
    objective_class: ClassVar[type[Objective]] = CVaRDRO
    options: ClassVar[dict[str, Any]] = {"alpha": 0.3, "nu_lr": 0.05}

    def reference(
        self, batch: Batch, u: dict[int, Any], gamma: float
    ) -> tuple[float, dict[str, Any]]:
        rows = (batch.scores.tolist(), batch.targets.tolist())
        loss, gradient = reference.step(*rows, u, alpha=0.3, lr=0.05, eps=0.0)
        return loss, {"scores": gradient}

    def tracked(self, objective: Objective) -> dict[int, Any]:
        return {reference.NU: objective.nu.value.item()}

    def test_worked_example(self) -> None:
        objective = CVaRDRO(alpha=0.25, nu_lr=0.1)
        losses = torch.tensor([5.0, 1.0, 2.0, 7.0])
        first = evaluate(objective, Batch(losses, torch.zeros(4)))
        assert first.loss.item() == 7.0
        assert first.gradients["scores"].tolist() == [0.0, 0.0, 0.0, 1.0]
        second = evaluate(objective, Batch(losses + 2.5, torch.zeros(4)))
        # of 7.5, 3.5, 4.5 and 9.5 two exceed nu = 7
        assert second.loss.item() == pytest.approx((0.5 + 2.5) / 4 / 0.25 + 7)
        assert second.gradients["scores"].tolist() == [1.0, 0.0, 0.0, 1.0]
        assert objective.nu.value.item() == pytest.approx(7 - 0.1 * (1 - 2))


def test_the_smoothed_hinge_equals_the_loops() -> None:
    generator, u = torch.Generator().manual_seed(0), dict[int, float]()
    objective = CVaRDRO(alpha=0.3, nu_lr=0.05, eps=0.4, state_dtype=F64)
    for _ in range(4):
        batch = losses_of(generator)
        result = evaluate(objective, batch)
        rows = (batch.scores.tolist(), batch.targets.tolist())
        loss, gradient = reference.step(*rows, u, alpha=0.3, lr=0.05, eps=0.4)
        assert result.loss.item() == pytest.approx(loss, rel=1e-10)
        assert result.gradients["scores"].tolist() == pytest.approx(gradient, rel=1e-9, abs=1e-12)
    assert objective.nu.value.item() == pytest.approx(u[reference.NU], rel=1e-10)


def test_the_smoothed_hinge_by_hand() -> None:
    losses = torch.tensor([0.0, 2.0])
    result = evaluate(CVaRDRO(alpha=0.5, eps=0.8), Batch(losses, torch.zeros(2)))
    # nu = 2 - 0.8, and the hinge of 0.8 is 0.8 - 0.8 / 2
    assert result.loss.item() == pytest.approx((0.8 - 0.4) / 2 / 0.5 + 1.2)
    assert result.gradients["scores"].tolist() == pytest.approx([0.0, 1.0], abs=1e-6)


@pytest.mark.parametrize("alpha", [0.01, 0.1, 0.5, 0.999, 1.0])
@pytest.mark.parametrize("eps", [1e-3, 0.3, 10.0])
def test_the_first_smoothed_threshold_makes_the_mean_weight_one(alpha: float, eps: float) -> None:
    losses = torch.randn(40, generator=torch.Generator().manual_seed(0), dtype=F64)
    losses[20:30] = losses[:10]
    for dtype, tolerance in ((F64, 1e-9), (torch.float32, 1e-2)):
        batch = Batch(losses.to(dtype), torch.zeros(40))
        gradient = evaluate(CVaRDRO(alpha=alpha, eps=eps, state_dtype=dtype), batch).gradients[
            "scores"
        ]
        assert gradient.sum().item() == pytest.approx(1.0, abs=tolerance)


def test_a_smoothed_threshold_for_all_rows_survives_the_rounding_of_float32() -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(100):
        losses = 3 * torch.randn(37, generator=generator)
        got = CVaRDRO(alpha=1.0, eps=0.3)(losses).loss
        torch.testing.assert_close(got, losses.mean() - 0.3 / 2, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("k", [1, 3, 10, 20])
def test_the_value_is_the_mean_of_the_largest_losses(k: int) -> None:
    losses = torch.randn(20, generator=torch.Generator().manual_seed(0), dtype=F64)
    leaf = losses.clone().requires_grad_()
    value = CVaRDRO(alpha=k / 20).exact(leaf)
    (gradient,) = torch.autograd.grad(value, leaf)
    top = losses.topk(k)
    assert value.item() == pytest.approx(top.values.mean().item(), rel=1e-12)
    want = torch.zeros(20, dtype=F64).index_fill(0, top.indices, 1 / k)
    torch.testing.assert_close(gradient, want, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("alpha", [0.3, 0.9, 1.0])
@pytest.mark.parametrize("eps", [0.0, 0.4])
def test_losses_that_fall_below_the_threshold_go_on_training(alpha: float, eps: float) -> None:
    generator, u = torch.Generator().manual_seed(0), dict[int, float]()
    objective = CVaRDRO(alpha=alpha, eps=eps, state_dtype=F64)
    for fall in (0.0, 0.5, 10.0, 10.01, 20.0):
        losses = torch.randn(40, generator=generator, dtype=F64) - fall
        result = evaluate(objective, Batch(losses, torch.zeros(40, dtype=F64)))
        loss, gradient = reference.step(
            losses.tolist(), [0.0] * 40, u, alpha=alpha, lr=0.01, eps=eps
        )
        assert result.loss.item() == pytest.approx(loss, rel=1e-9)
        assert result.gradients["scores"].tolist() == pytest.approx(gradient, rel=1e-7, abs=1e-9)
        assert result.gradients["scores"].sum().item() > 0.1


def test_all_rows_are_the_mean_loss_whatever_the_losses_do() -> None:
    objective = CVaRDRO(alpha=1.0)
    for losses in ([3.0, 4.0, 5.0, 6.0], [2.0, 2.5, 2.7, 2.9], [1.0, 9.0, 2.0, 0.5]):
        result = evaluate(objective, Batch(torch.tensor(losses), torch.zeros(4)))
        assert result.loss.item() == pytest.approx(sum(losses) / 4, rel=1e-6)
        assert result.gradients["scores"].tolist() == pytest.approx([0.25] * 4)


def test_a_batch_without_a_top_row_does_not_move_a_small_share() -> None:
    objective = CVaRDRO(alpha=0.01, nu_lr=0.1)
    evaluate(objective, Batch(torch.tensor([1.0, 5.0]), torch.zeros(2)))
    result = evaluate(objective, Batch(torch.tensor([1.0, 2.0]), torch.zeros(2)))
    assert result.gradients["scores"].tolist() == [0.0, 0.0]  # no top row among two is no news
    assert objective.nu.value.item() < 5.0


def test_a_share_between_two_rows_counts_a_part_of_one() -> None:
    losses = torch.tensor([4.0, 1.0, 2.0, 8.0])
    result = evaluate(CVaRDRO(alpha=0.375), Batch(losses, torch.zeros(4)))  # 1.5 rows
    assert result.loss.item() == pytest.approx((8 + 0.5 * 4) / 1.5)
    assert result.gradients["scores"].tolist() == pytest.approx([0.5 / 1.5, 0, 0, 1 / 1.5])


def test_equal_losses_weigh_alike() -> None:
    result = evaluate(CVaRDRO(alpha=0.1), Batch(torch.full((8,), 0.7), torch.zeros(8)))
    assert result.gradients["scores"].tolist() == pytest.approx([1 / 8] * 8)


def test_everything_counts_at_alpha_one() -> None:
    generator = torch.Generator().manual_seed(0)
    objective = CVaRDRO(alpha=1.0)
    for _ in range(3):
        losses = 3 + torch.rand(8, generator=generator)
        result = evaluate(objective, Batch(losses, torch.zeros(8)))
    assert objective.nu.value.item() <= 4
    fresh = evaluate(CVaRDRO(alpha=1.0), Batch(losses, torch.zeros(8)))
    assert fresh.loss.item() == pytest.approx(losses.mean().item())
    assert fresh.gradients["scores"].tolist() == pytest.approx([1 / 8] * 8)
    assert result.loss.item() >= losses.mean().item() - 1e-6


@pytest.mark.parametrize("eps", [0.5, 0.05, 0.005])
def test_smoothing_lowers_the_value_by_at_most_its_bound(eps: float) -> None:
    losses = torch.randn(40, generator=torch.Generator().manual_seed(0), dtype=F64)
    sharp, smooth = CVaRDRO(alpha=0.2).exact(losses), CVaRDRO(alpha=0.2, eps=eps).exact(losses)
    assert 0 <= (sharp - smooth).item() <= eps / (2 * 0.2)


def test_the_smoothed_value_is_least_at_its_threshold() -> None:
    losses = torch.randn(40, generator=torch.Generator().manual_seed(0), dtype=F64)
    value = CVaRDRO(alpha=0.2, eps=0.3).exact(losses).item()

    def at(nu: float) -> float:
        return nu + sum(reference.hinge(x - nu, 0.3)[0] for x in losses.tolist()) / 40 / 0.2

    assert value == pytest.approx(min(at(i / 1000) for i in range(-2000, 3000)), abs=1e-6)


def test_minibatches_find_the_quantile() -> None:
    generator = torch.Generator().manual_seed(0)
    losses = torch.rand(1000, generator=generator)
    objective, found = CVaRDRO(alpha=0.2, nu_lr=0.01), 0.0
    for step in range(1500):
        nu = objective(losses[torch.randint(1000, (16,), generator=generator)]).metrics["nu"]
        found += nu.item() / 1000 if step >= 500 else 0.0
    assert found == pytest.approx(losses.quantile(0.8).item(), abs=0.02)
    assert abs(nu.item() - found) < 0.1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alpha": 0.0}, r"alpha must be in \(0, 1\], got 0.0"),
        ({"alpha": 1.5}, r"alpha must be in \(0, 1\], got 1.5"),
        ({"eps": -1.0}, r"eps must not be negative, got -1.0"),
        ({"nu_beta": 0.0}, r"need lr > 0 and beta in \(0, 1\]"),
    ],
)
def test_bad_settings_are_refused(options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CVaRDRO(**options)
