"""ListwiseCrossEntropy (ListNet, eq. 2.47)."""

import math
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F

from llm_xrisk.objectives import Objective
from llm_xrisk.objectives.listwise_cross_entropy import ListwiseCrossEntropy
from llm_xrisk.objectives.ndcg import ranking_statistics
from tests.contract import Batch, ObjectiveContract, evaluate
from tests.objectives.test_ndcg import QUERIES, RELEVANCE, drawn, lists, rows_of, toy, whole
from tests.reference import listwise_cross_entropy as reference
from tests.reference.ndcg import statistics

F64 = torch.float64


class TestListwiseCrossEntropy(ObjectiveContract):
    objective_class: ClassVar[type[Objective]] = ListwiseCrossEntropy
    statistics = ranking_statistics(RELEVANCE, QUERIES)
    options: ClassVar[dict[str, Any]] = {
        "num_items": statistics[0],
        "num_relevant": statistics[1],
        "tau": 0.7,
    }
    average: ClassVar[str] = "queries"

    def make_batch(self, generator: torch.Generator) -> Batch:
        return lists(generator)

    def reach(self, tau: float) -> float:
        return 1e4 * tau

    def reference(
        self, batch: Batch, u: dict[int, Any], gamma: float
    ) -> tuple[float, dict[str, Any]]:
        loss, gradient = reference.step(
            *rows_of(batch),
            u,
            gamma=gamma,
            lists=statistics(RELEVANCE.tolist(), QUERIES.tolist()),
            tau=0.7,
            average=self.average,
        )
        return loss, {"scores": gradient}

    def tracked(self, objective: Objective) -> dict[int, Any]:
        inner = objective.inner
        return {q: math.exp(inner.u[q]) for q in inner.visited.nonzero().flatten().tolist()}

    def test_worked_example(self) -> None:
        objective = ListwiseCrossEntropy(3, torch.tensor([3]), torch.tensor([1]))
        scores, query = torch.tensor([1.0, 0.0, 2.0]), torch.zeros(3, dtype=torch.long)
        result = evaluate(objective, whole(scores, torch.tensor([2, 0, 0]), query))
        shares = [math.exp(s) / (math.exp(1) + 1 + math.exp(2)) for s in (1.0, 0.0, 2.0)]
        assert result.loss.item() == pytest.approx(-2 * math.log(shares[0]) / 3)
        want = [2 / 3 * (share - one) for share, one in zip(shares, (1, 0, 0), strict=True)]
        assert result.gradients["scores"].tolist() == pytest.approx(want)

    def test_a_checkpoint_of_another_dataset_is_refused(self) -> None:
        other = ListwiseCrossEntropy(12, torch.tensor([3, 3]), torch.tensor([1, 1]))
        with pytest.raises(ValueError, match=r"num_samples=3.*num_samples=2"):
            other.load_state_dict(self.build().state_dict())


class TestListwiseCrossEntropyOfPairs(TestListwiseCrossEntropy):
    options: ClassVar[dict[str, Any]] = TestListwiseCrossEntropy.options | {"average": "pairs"}
    average: ClassVar[str] = "pairs"

    def test_worked_example(self) -> None:
        statistics = torch.tensor([2, 4]), torch.tensor([1, 2])
        objective = ListwiseCrossEntropy(6, *statistics, average="pairs")
        query, relevance = torch.tensor([0, 0, 1, 1, 1, 1]), torch.tensor([1, 0, 1, 1, 0, 0])
        result = evaluate(objective, whole(torch.zeros(6), relevance, query))
        want = (math.log(2) / 2 + 2 * math.log(4) / 4) / 3
        assert result.loss.item() == pytest.approx(want)


@pytest.mark.parametrize("gamma", [1.0, 0.1])
@pytest.mark.parametrize("tau", [1.0, 0.1])
def test_full_lists_are_the_cross_entropy_of_torch(gamma: float, tau: float) -> None:
    scores, relevance, query = toy(torch.Generator().manual_seed(0))
    leaf = scores.clone().requires_grad_()
    total = leaf.new_zeros(())
    for q in range(6):
        weight = relevance[query == q].double() / int((query == q).sum())
        total = total + F.cross_entropy(leaf[query == q] / tau, weight) / 6
    (want,) = torch.autograd.grad(total, leaf)
    items, relevant, _ = ranking_statistics(relevance, query)
    objective = ListwiseCrossEntropy(
        len(scores), items, relevant, gamma=gamma, tau=tau, state_dtype=F64
    )
    for _ in range(2):  # while the scores stand, the second step is the same for any gamma
        got = evaluate(objective, whole(scores, relevance, query))
        torch.testing.assert_close(got.loss, total.detach(), rtol=1e-12, atol=0)
        torch.testing.assert_close(got.gradients["scores"], want, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("size", [3.0, 10.0])
def test_a_small_gamma_averages_the_sampling_of_lists_out(size: float) -> None:
    generator = torch.Generator().manual_seed(0)
    scores, relevance, query = toy(generator, queries=2, copies=16)
    scores = scores * (size / scores.std())
    items, relevant, _ = ranking_statistics(relevance, query)
    leaf, batch = scores.clone().requires_grad_(), whole(scores, relevance, query)
    objective = ListwiseCrossEntropy(len(scores), items, relevant, gamma=0.005, state_dtype=F64)
    (want,) = torch.autograd.grad(objective.exact(leaf, relevance, query=query), leaf)
    total = torch.zeros_like(scores)
    for step in range(1200):
        rows = drawn(relevance, query, generator, pos=2, neg=6)  # of lists of 20 to 40
        gradient = evaluate(objective, batch.rows(rows)).gradients["scores"]
        total[rows] += gradient / 500 * (step >= 700)
    total, want = total.view(16, -1).mean(0), want.view(16, -1).mean(0)
    assert torch.cosine_similarity(total, want, dim=0) >= 0.998
    assert float(total.norm() / want.norm()) == pytest.approx(1.0, abs=0.1)


def test_a_temperature_of_zero_is_refused() -> None:
    with pytest.raises(ValueError, match=r"tau must be positive, got 0; the book has 1.0"):
        ListwiseCrossEntropy(3, torch.tensor([3]), torch.tensor([1]), tau=0)
