"""PairwiseAUC (section 6.4.1, method 1)."""

import math
from typing import Any, ClassVar

import pytest
import torch

from llm_xrisk.objectives import Objective
from llm_xrisk.objectives.pairwise_auc import PairwiseAUC
from llm_xrisk.objectives.surrogates import Hinge, Logistic, Squared, SquaredHinge, Surrogate
from tests.contract import Batch, ObjectiveContract, evaluate
from tests.objectives.several_labels import each_label, three_labels
from tests.objectives.test_average_precision import imbalanced
from tests.reference import pairwise_auc as reference

F64 = torch.float64


def without_index(batch: Batch) -> Batch:
    return Batch(batch.scores, batch.targets)


class TestPairwiseAUC(ObjectiveContract):
    objective_class: ClassVar[type[Objective]] = PairwiseAUC

    def make_batch(self, generator: torch.Generator) -> Batch:
        return without_index(imbalanced(generator))

    def reference(
        self, batch: Batch, u: dict[int, Any], gamma: float
    ) -> tuple[float, dict[str, Any]]:
        loss, gradient = reference.step(batch.scores.tolist(), batch.targets.bool().tolist())
        return loss, {"scores": gradient}

    def test_worked_example(self) -> None:
        batch = Batch(torch.tensor([1.0, 0.5, 0.0, 0.0]), torch.tensor([1, 0, 0, 1]))
        # of the first positive (1 + 0.5 - 1)^2 and 0, of the second (1 + 0.5)^2 and 1
        result = evaluate(PairwiseAUC(), batch)
        assert result.loss.item() == pytest.approx((0.25 + 0 + 2.25 + 1) / 4)
        slopes = [2 * 0.5 / 4, 0, 2 * 1.5 / 4, 2 / 4]
        want = [-slopes[0], slopes[0] + slopes[2], slopes[3], -slopes[2] - slopes[3]]
        assert result.gradients["scores"].tolist() == pytest.approx(want)


class TestPairwiseAUCOfSeveralLabels(TestPairwiseAUC):
    options: ClassVar[dict[str, Any]] = {"num_labels": 3}

    def make_batch(self, generator: torch.Generator) -> Batch:
        return without_index(three_labels(generator))

    def reference(
        self, batch: Batch, u: dict[int, Any], gamma: float
    ) -> tuple[float, dict[str, Any]]:
        def one(label: int, scores: list[float], positive: list[bool], own: dict[int, Any]) -> Any:
            return reference.step(scores, positive)

        return each_label(batch, u, one, lambda column: any(column) and not all(column))

    def test_worked_example(self) -> None:
        scores = torch.tensor([[1.0, 0.0, 7.0], [0.5, 0.0, 8.0], [0.0, 0.5, 9.0]])
        batch = Batch(scores, torch.tensor([[1, 0, 1], [0, 1, 1], [0, 0, 1]]))
        # (0.5^2 + 0) / 2 and (1 + 1.5^2) / 2; the third label has no negatives
        result = evaluate(PairwiseAUC(num_labels=3), batch)
        assert result.loss.item() == pytest.approx((0.25 / 2 + (1 + 2.25) / 2) / 2)
        assert not result.gradients["scores"][:, 2].any()


SURROGATES: list[tuple[Surrogate, Any, Any]] = [
    (SquaredHinge(0.3), lambda s: max(s + 0.3, 0) ** 2, lambda s: 2 * max(s + 0.3, 0)),
    (Squared(), lambda s: (1 + s) ** 2, lambda s: 2 * (1 + s)),
    (Hinge(0.5), lambda s: max(s + 0.5, 0), lambda s: float(s > -0.5)),
    (Logistic(2.0), lambda s: math.log1p(math.exp(s / 2)), lambda s: 0.5 / (1 + math.exp(-s / 2))),
]


@pytest.mark.parametrize(("surrogate", "loss", "slope"), SURROGATES)
def test_any_surrogate_equals_the_enumeration_of_pairs(
    surrogate: Surrogate, loss: Any, slope: Any
) -> None:
    batch = without_index(imbalanced(torch.Generator().manual_seed(3)))
    rows = (batch.scores.tolist(), batch.targets.bool().tolist())
    value, gradient = reference.step(*rows, loss, slope)
    result = evaluate(PairwiseAUC(surrogate=surrogate), batch)
    assert result.loss.item() == pytest.approx(value, rel=1e-12)
    assert result.gradients["scores"].tolist() == pytest.approx(gradient, abs=1e-12)


def test_a_steep_surrogate_counts_the_pairs_that_the_sum_of_ranks_counts() -> None:
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(60, generator=generator, dtype=F64)
    targets = (torch.rand(60, generator=generator) < 0.2).long()

    class Misranked:
        """1 for a pair in the wrong order."""

        def __call__(self, s: torch.Tensor) -> torch.Tensor:
            return (s > 0).to(s.dtype)

        def with_slope(self, s: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return self(s), s.new_zeros(())

    loss = PairwiseAUC(surrogate=Misranked()).exact(scores, targets)
    auc = reference.rank_auc(scores.tolist(), targets.bool().tolist())
    assert loss.item() == pytest.approx(1 - auc, abs=1e-12)


def test_the_mean_over_mini_batches_is_the_objective_of_the_data() -> None:
    """Over all pairs of two of four positives and two of four negatives, exactly."""
    scores = torch.randn(8, generator=torch.Generator().manual_seed(0), dtype=F64)
    targets = torch.tensor([1, 1, 1, 1, 0, 0, 0, 0])
    objective = PairwiseAUC()
    two = torch.combinations(torch.arange(4))
    draws = [torch.cat([p, 4 + q]) for p in two for q in two]
    losses = torch.stack([objective(scores[r], targets[r]).loss for r in draws])
    torch.testing.assert_close(losses.mean(), objective.exact(scores, targets))


def test_training_raises_the_auc_of_a_toy() -> None:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(200, 5, generator=generator)
    targets = (features[:, 0] + 0.5 * torch.randn(200, generator=generator) > 1.3).long()
    weights = torch.tensor([0.0, 0.1, 0.0, 0.0, 0.0], requires_grad=True)
    objective, optimizer = PairwiseAUC(), torch.optim.Adam([weights], lr=0.05)

    def auc() -> float:
        return reference.rank_auc((features @ weights).tolist(), targets.bool().tolist())

    assert auc() < 0.7
    for _ in range(60):
        rows = torch.randperm(200, generator=generator)[:64]
        optimizer.zero_grad()
        objective(features[rows] @ weights, targets[rows]).loss.backward()
        optimizer.step()
    assert auc() > 0.9


def test_no_label_at_all_is_refused() -> None:
    with pytest.raises(ValueError, match="num_labels must be at least 1, got 0"):
        PairwiseAUC(num_labels=0)
