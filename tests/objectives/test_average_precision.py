"""AveragePrecision (SOAP, Algorithm 28)."""

from typing import Any, ClassVar

import pytest
import torch

from llm_xrisk.objectives import AveragePrecision, Objective
from tests.contract import Batch, ObjectiveContract, evaluate
from tests.objectives.several_labels import each_label, three_labels
from tests.reference import average_precision as reference

F64 = torch.float64


def imbalanced(generator: torch.Generator) -> Batch:
    """Four positives among nine rows, one positive and one negative standing twice."""
    samples = torch.randperm(12, generator=generator)[:7]
    index = samples[torch.tensor([0, 1, 2, 0, 3, 4, 5, 6, 6])]
    targets = torch.tensor([1, 1, 1, 1, 0, 0, 0, 0, 0])
    scores = torch.randn(9, generator=generator, dtype=F64)
    order = torch.randperm(9, generator=generator)
    return Batch(scores, targets, {"index": index}).rows(order)


class TestAveragePrecision(ObjectiveContract):
    objective_class: ClassVar[type[Objective]] = AveragePrecision
    prior: ClassVar[float | None] = None

    def make_batch(self, generator: torch.Generator) -> Batch:
        return imbalanced(generator)

    def reference(
        self, batch: Batch, u: dict[int, Any], gamma: float
    ) -> tuple[float, dict[str, Any]]:
        loss, gradient = reference.step(
            batch.scores.tolist(),
            batch.targets.bool().tolist(),
            batch.groups["index"].tolist(),
            u,
            gamma=gamma,
            prior=self.prior,
        )
        return loss, {"scores": gradient}

    def tracked(self, objective: Objective) -> dict[int, Any]:
        inner = objective.inner
        return {i: tuple(inner.u[i].tolist()) for i in inner.visited.nonzero().flatten().tolist()}

    def degenerate(self, batch: Batch) -> list[Batch]:
        return super().degenerate(batch)[:1]  # all positive is a batch: every precision is 1

    def test_worked_example(self) -> None:
        batch = Batch(
            torch.tensor([2.0, 1.0, 0.0]),
            torch.tensor([1, 0, 1]),
            {"index": torch.tensor([0, 1, 2])},
        )
        # row of the first positive: l = (1, 0, 0); of the second: (3^2, 2^2, 1)
        result = evaluate(AveragePrecision(num_samples=3), batch)
        assert result.loss.item() == pytest.approx(-(1 / 1 + (9 + 1) / (9 + 4 + 1)) / 2)
        # weights (u1 - u2 1[y = 1]) / u2^2 of 3 l' = (6, 4, 2) for the second positive
        u1, u2 = 10, 14
        first, middle = (u1 - u2) / u2**2 * 6 / 2, u1 / u2**2 * 4 / 2
        got = result.gradients["scores"].tolist()
        assert got == pytest.approx([first, middle, -first - middle], abs=1e-6)


class TestAveragePrecisionAtAPrior(TestAveragePrecision):
    options: ClassVar[dict[str, Any]] = {"prior": 0.1}
    prior: ClassVar[float | None] = 0.1

    def test_worked_example(self) -> None:
        batch = Batch(
            torch.tensor([2.0, 1.0, 0.0, 1.0]),
            torch.tensor([1, 0, 1, 0]),
            {"index": torch.tensor([0, 1, 2, 3])},
        )
        # each class has two rows, a positive weighs 0.1 / 2 and a negative 0.9 / 2
        result = evaluate(AveragePrecision(num_samples=4, prior=0.1), batch)
        positives, negatives = 0.05 * (9 + 1), 0.45 * (4 + 4)
        assert result.loss.item() == pytest.approx(-(1 + positives / (positives + negatives)) / 2)


class TestAveragePrecisionOfSeveralLabels(TestAveragePrecision):
    options: ClassVar[dict[str, Any]] = {"num_labels": 3, "prior": [0.1, 0.2, 0.4]}

    def make_batch(self, generator: torch.Generator) -> Batch:
        return three_labels(generator)

    def reference(
        self, batch: Batch, u: dict[int, Any], gamma: float
    ) -> tuple[float, dict[str, Any]]:
        index, prior = batch.groups["index"].tolist(), self.options["prior"]

        def one(label: int, scores: list[float], positive: list[bool], own: dict[int, Any]) -> Any:
            return reference.step(scores, positive, index, own, gamma=gamma, prior=prior[label])

        return each_label(batch, u, one, any)

    def test_worked_example(self) -> None:
        scores = torch.tensor([[2.0, 0.0], [1.0, 1.0], [0.0, 2.0]])
        batch = Batch(scores, torch.tensor([[1, 0], [0, 0], [1, 0]]), {"index": torch.arange(3)})
        # the first label is the example of one label, the second has no positive and is left out
        result = evaluate(AveragePrecision(num_samples=3, num_labels=2), batch)
        assert result.loss.item() == pytest.approx(-(1 / 1 + (9 + 1) / (9 + 4 + 1)) / 2)
        assert not result.gradients["scores"][:, 1].any()


def test_all_positive_is_perfect_and_has_no_gradient() -> None:
    batch = Batch(torch.randn(5, dtype=F64), torch.ones(5), {"index": torch.arange(5)})
    result = evaluate(AveragePrecision(num_samples=5, state_dtype=F64), batch)
    assert result.loss.item() == pytest.approx(-1.0, abs=1e-14)
    assert result.gradients["scores"].abs().max() < 1e-14


@pytest.mark.parametrize("positives", [4, 10, 20])
def test_with_its_prior_the_fixed_point_does_not_depend_on_the_sampler(positives: int) -> None:
    generator = torch.Generator().manual_seed(0)
    targets = (torch.arange(200) < 20).long()
    scores = torch.randn(200, generator=generator, dtype=F64) + targets
    objective = AveragePrecision(num_samples=200, gamma=0.02, prior=0.1, state_dtype=F64)
    plain = AveragePrecision(num_samples=200, gamma=0.02, state_dtype=F64)
    want = objective.exact(scores, targets).item()
    total = torch.zeros(2, dtype=F64)
    for step in range(800):
        pos = torch.randperm(20, generator=generator)[:positives]
        neg = 20 + torch.randperm(180, generator=generator)[: 40 - positives]
        rows = torch.cat([pos, neg])
        losses = [o(scores[rows], targets[rows], index=rows).loss for o in (objective, plain)]
        total += torch.stack(losses) * (step >= 400)
    got = (total / 400).tolist()
    assert got[0] == pytest.approx(want, abs=0.015)
    assert positives == 4 or abs(got[1] - want) > 0.2  # the AP at the sampler's prior


def test_training_raises_the_average_precision_of_a_toy() -> None:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(200, 5, generator=generator)
    targets = (features[:, 0] + 0.5 * torch.randn(200, generator=generator) > 1.3).long()
    weights = torch.zeros(5, requires_grad=True)
    objective = AveragePrecision(num_samples=200, gamma=0.3)
    optimizer = torch.optim.Adam([weights], lr=0.05)

    def average_precision() -> float:
        order = (features @ weights).argsort(descending=True, stable=True)
        hits = targets[order].cumsum(0)
        precision = hits / torch.arange(1, 201)
        return float(precision[targets[order] == 1].mean())

    with torch.no_grad():
        weights[1] = 0.1
    before = average_precision()
    for _ in range(60):
        rows = torch.randperm(200, generator=generator)[:64]
        optimizer.zero_grad()
        objective(features[rows] @ weights, targets[rows], index=rows).loss.backward()
        optimizer.step()
    assert before < 0.3
    assert average_precision() > 0.8


def test_one_prior_serves_all_labels_and_two_do_not_serve_three() -> None:
    batch = three_labels(torch.Generator().manual_seed(0))
    options = {"num_samples": 12, "num_labels": 3, "state_dtype": F64}
    shared = evaluate(AveragePrecision(prior=0.2, **options), batch)
    repeated = evaluate(AveragePrecision(prior=[0.2] * 3, **options), batch)
    assert torch.equal(shared.loss, repeated.loss)
    with pytest.raises(ValueError, match=r"got 2 priors for num_labels=3.*one for each"):
        AveragePrecision(prior=[0.1, 0.2], **options)


@pytest.mark.parametrize("prior", [0.0, 1.0, 1.5])
def test_a_prior_outside_zero_and_one_is_refused(prior: float) -> None:
    with pytest.raises(ValueError, match=rf"prior must be in \(0, 1\), got {prior}; pass"):
        AveragePrecision(num_samples=3, prior=prior)
