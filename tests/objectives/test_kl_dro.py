"""KLDRO (ABSGD, Algorithm 24)."""

import math
from typing import Any, ClassVar

import pytest
import torch

from llm_xrisk.objectives import Objective
from llm_xrisk.objectives.kl_dro import KLDRO
from tests.contract import Batch, ObjectiveContract, assert_same, evaluate, state
from tests.reference import kl_dro as reference

F64 = torch.float64


def losses_of(generator: torch.Generator, count: int = 9) -> Batch:
    """Losses of rows and of a reference model, two rows alike, in no particular order."""
    scores = torch.empty(count, dtype=F64).exponential_(generator=generator)
    targets = 0.5 * torch.rand(count, generator=generator, dtype=F64)
    scores[1], targets[1] = scores[0], targets[0]
    return Batch(scores, targets).rows(torch.randperm(count, generator=generator))


class RobustContract(ObjectiveContract):
    """The contract on losses: rows need no pair, so only no rows at all are degenerate."""

    def make_batch(self, generator: torch.Generator) -> Batch:
        return losses_of(generator)

    def degenerate(self, batch: Batch) -> list[Batch]:
        return [batch.rows(slice(0, 0))]

    def reach(self, tau: float) -> float:
        return 1e4 * tau

    def test_a_checkpoint_of_another_dataset_is_refused(self) -> None:
        """It is not: one state for all rows does not know how many there are."""
        saved = self.build().state_dict()
        self.build().load_state_dict(saved)
        assert saved


class TestKLDRO(RobustContract):
    objective_class: ClassVar[type[Objective]] = KLDRO
    options: ClassVar[dict[str, Any]] = {"tau": 0.7}
    alpha: ClassVar[float | None] = None

    def reference(
        self, batch: Batch, u: dict[int, Any], gamma: float
    ) -> tuple[float, dict[str, Any]]:
        loss, gradient = reference.step(
            batch.scores.tolist(),
            batch.targets.tolist(),
            u,
            gamma=gamma,
            tau=self.options["tau"],
            alpha=self.alpha,
        )
        return loss, {"scores": gradient}

    def tracked(self, objective: Objective) -> dict[int, Any]:
        return {0: math.exp(objective.inner.u[0])}

    def test_worked_example(self) -> None:
        objective = KLDRO(gamma=0.25, tau=2.0)
        first = evaluate(objective, Batch(torch.tensor([1.0, 3.0]), torch.zeros(2)))
        weights = [math.exp(1 / 2), math.exp(3 / 2)]
        u = sum(weights) / 2
        assert first.loss.item() == pytest.approx(2 * math.log(u))
        assert first.gradients["scores"].tolist() == pytest.approx([w / u / 2 for w in weights])
        second = evaluate(objective, Batch(torch.tensor([4.0]), torch.tensor([1.0])))
        u = 0.75 * u + 0.25 * math.exp((4 - 1) / 2)
        assert second.loss.item() == pytest.approx(2 * math.log(u))
        assert second.gradients["scores"].tolist() == pytest.approx([math.exp(3 / 2) / u])


@pytest.mark.parametrize(
    ("options", "alpha"),
    [({"tau": -0.7}, None), ({"tau": 0.7, "log_alpha": -1.5}, math.exp(-1.5))],
    ids=["noisy labels", "scent"],
)
def test_variants_equal_the_loops(options: dict[str, float], alpha: float | None) -> None:
    generator, u = torch.Generator().manual_seed(0), dict[int, float]()
    objective = KLDRO(gamma=0.3, **options, state_dtype=F64)
    for _ in range(4):
        batch = losses_of(generator)
        result = evaluate(objective, batch)
        rows = (batch.scores.tolist(), batch.targets.tolist())
        loss, gradient = reference.step(*rows, u, gamma=0.3, tau=options["tau"], alpha=alpha)
        assert result.loss.item() == pytest.approx(loss, rel=1e-10)
        assert result.gradients["scores"].tolist() == pytest.approx(gradient, rel=1e-10)
    assert math.exp(objective.inner.u[0]) == pytest.approx(u[0], rel=1e-10)


def test_a_tau_below_zero_trusts_the_rows_of_small_loss() -> None:
    result = evaluate(KLDRO(tau=-2.0), Batch(torch.tensor([1.0, 3.0]), torch.zeros(2)))
    weights = [math.exp(-1 / 2), math.exp(-3 / 2)]
    assert result.loss.item() == pytest.approx(-2 * math.log(sum(weights) / 2))
    want = [w / sum(weights) for w in weights]
    assert result.gradients["scores"].tolist() == pytest.approx(want)


def test_the_gamma_of_scent_follows_the_tracked_value() -> None:
    objective = KLDRO(tau=1.0, log_alpha=0.0)
    evaluate(objective, Batch(torch.tensor([math.log(3)]), torch.zeros(1)))  # u = 3
    result = evaluate(objective, Batch(torch.tensor([math.log(7)]), torch.zeros(1)))
    # gamma = 3 / (1 + 3)
    assert result.loss.item() == pytest.approx(math.log(3 / 4 * 7 + 1 / 4 * 3))


def test_a_scent_multiplier_of_zero_is_a_moving_average() -> None:
    generator = torch.Generator().manual_seed(0)
    gamma = 1 / (1 + math.exp(1.5))
    average = KLDRO(gamma=gamma, state_dtype=F64)
    adaptive = KLDRO(log_alpha=-1.5, multiplier=0.0, state_dtype=F64)
    for _ in range(4):
        batch = losses_of(generator)
        evaluate(average, batch), evaluate(adaptive, batch)
    torch.testing.assert_close(adaptive.inner.u, average.inner.u, rtol=1e-12, atol=0)


def test_losses_that_scent_never_expected_stay_finite() -> None:
    """After losses of -5000 temperatures its gamma is 0, and g / u of an ordinary row infinite."""
    objective = KLDRO(tau=0.01, log_alpha=0.0)
    for loss in (-50.0, 1.0, -50.0, 2.0):
        result = evaluate(objective, Batch(torch.full((2,), loss), torch.zeros(2)))
        assert result.loss.isfinite() and result.gradients["scores"].isfinite().all()
        assert loss < 0 or result.gradients["scores"].min() > 0.5


@pytest.mark.parametrize("tau", [2.0, 0.3, -0.5])
def test_weights_of_the_whole_set_are_its_softmax(tau: float) -> None:
    batch = losses_of(torch.Generator().manual_seed(0))
    want = torch.softmax((batch.scores - batch.targets) / tau, 0)
    got = evaluate(KLDRO(gamma=0.1, tau=tau, state_dtype=F64), batch).gradients["scores"]
    torch.testing.assert_close(got, want, rtol=1e-10, atol=0)


def test_the_temperature_leads_from_the_largest_loss_to_the_mean_to_the_smallest() -> None:
    losses = torch.rand(50, generator=torch.Generator().manual_seed(0), dtype=F64)
    risk = {tau: KLDRO(tau=tau).exact(losses).item() for tau in (1e-5, 1e5, -1e5, -1e-5)}
    assert risk[1e-5] == pytest.approx(losses.max().item(), abs=1e-4)
    assert risk[1e5] == pytest.approx(losses.mean().item(), abs=1e-4)
    assert risk[-1e5] == pytest.approx(losses.mean().item(), abs=1e-4)
    assert risk[-1e-5] == pytest.approx(losses.min().item(), abs=1e-4)


def test_a_hard_row_alone_in_its_batch_outweighs_an_easy_one_only_through_the_past() -> None:
    """The book's case of a mini-batch of one row."""

    def last(gamma: float, loss: float) -> float:
        objective = KLDRO(gamma=gamma, tau=1.0)
        for value in (1.0, 1.0, 1.0, loss):
            result = evaluate(objective, Batch(torch.tensor([value]), torch.zeros(1)))
        return result.gradients["scores"].item()

    assert last(1.0, 3.0) == last(1.0, 0.0) == 1.0
    assert last(0.2, 3.0) > 3 > 1 > 0.5 > last(0.2, 0.0)


def test_a_small_gamma_averages_the_sampling_of_rows_out() -> None:
    generator = torch.Generator().manual_seed(0)
    losses = torch.empty(60, dtype=F64).exponential_(generator=generator)
    exact = torch.softmax(losses / 0.5, 0)

    def error(gamma: float) -> float:
        objective, total = KLDRO(gamma=gamma, tau=0.5, state_dtype=F64), torch.zeros(60, dtype=F64)
        for _ in range(1000):
            rows = torch.randint(60, (4,), generator=generator)
            leaf = losses[rows].requires_grad_()
            (gradient,) = torch.autograd.grad(objective(leaf).loss, leaf)
            total.index_add_(0, rows, gradient)
        return float((total / 1000 - exact).norm() / exact.norm())

    assert error(0.02) < 0.2 < 0.7 < error(1.0)


def test_training_ends_at_the_optimum_that_minibatches_miss() -> None:
    """Where 5 % of the rows want 3 and the others 0: the bias of gamma = 1 does not vanish."""
    generator = torch.Generator().manual_seed(0)
    places = torch.where(torch.arange(60) < 3, 3.0, 0.0).to(F64)

    def losses(w: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        return (w - rows).square() / 2

    def trained(gamma: float) -> float:
        objective, tail = KLDRO(gamma=gamma, tau=0.2, state_dtype=F64), 0.0
        w = torch.zeros((), dtype=F64, requires_grad=True)
        for step in range(1500):
            rows = places[torch.randint(60, (4,), generator=generator)]
            (gradient,) = torch.autograd.grad(objective(losses(w, rows)).loss, w)
            with torch.no_grad():
                w -= 0.02 / (1 + step / 50) ** 0.75 * gradient
            tail += w.item() / 500 if step >= 1000 else 0.0
        return tail

    grid = torch.linspace(0, 3, 301, dtype=F64)
    risk = torch.stack([KLDRO(tau=0.2).exact(losses(w, places)) for w in grid])
    best = grid[risk.argmin()].item()
    small, large = abs(trained(0.05) - best), abs(trained(1.0) - best)
    assert small < 0.04 < 0.5 < large, (small, large)


def test_another_temperature_starts_from_its_first_minibatch() -> None:
    first, second = (losses_of(torch.Generator().manual_seed(seed)) for seed in (0, 1))
    objective = KLDRO(gamma=0.1, tau=200.0)
    evaluate(objective, first)
    objective.set_tau(5 / 3)
    got, want = evaluate(objective, second), evaluate(KLDRO(gamma=0.1, tau=5 / 3), second)
    assert torch.equal(got.loss, want.loss)
    assert_same(got.gradients, want.gradients)
    assert got.metrics["tau"].item() == pytest.approx(5 / 3)


def test_a_resumed_run_keeps_the_temperature_of_its_stage() -> None:
    objective = KLDRO(gamma=0.1, tau=200.0)
    objective.set_tau(5 / 3)
    evaluate(objective, losses_of(torch.Generator().manual_seed(0)))
    resumed = KLDRO(gamma=0.1, tau=200.0)
    resumed.load_state_dict(objective.state_dict())
    batch = losses_of(torch.Generator().manual_seed(1))
    assert torch.equal(evaluate(resumed, batch).loss, evaluate(objective, batch).loss)
    assert_same(state(resumed), state(objective))


def test_a_temperature_of_zero_is_refused() -> None:
    with pytest.raises(ValueError, match=r"tau must not be 0; take 0.5, or below 0 for noisy"):
        KLDRO(tau=0.0)
