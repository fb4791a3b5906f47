"""NDCG (SONG, Algorithm 33)."""

import math
from dataclasses import replace
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from llm_xrisk.objectives import Objective
from llm_xrisk.objectives.ndcg import NDCG, ranking_statistics
from llm_xrisk.objectives.surrogates import Logistic
from tests.contract import Batch, ObjectiveContract, evaluate
from tests.reference import ndcg as reference

F64 = torch.float64
QUERIES = torch.tensor([0, 0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2])
RELEVANCE = torch.tensor([2, 0, 1, 0, 0, 1, 0, 3, 0, 0, 1, 0])


def lists(generator: torch.Generator) -> Batch:
    """Eight of twelve pairs of three queries, two of them standing twice."""
    samples = torch.randperm(12, generator=generator)[:8]
    index = torch.cat([samples, samples[:2]])[torch.randperm(10, generator=generator)]
    scores = torch.randn(10, generator=generator, dtype=F64)
    return Batch(scores, RELEVANCE[index], {"index": index, "query": QUERIES[index]})


def whole(scores: Tensor, relevance: Tensor, query: Tensor) -> Batch:
    """All pairs of a data set as one batch."""
    return Batch(scores, relevance, {"index": torch.arange(len(scores)), "query": query})


def rows_of(batch: Batch) -> tuple[list[Any], ...]:
    tensors = (batch.scores, batch.targets, batch.groups["index"], batch.groups["query"])
    return tuple(tensor.tolist() for tensor in tensors)


class TestNDCG(ObjectiveContract):
    objective_class: ClassVar[type[Objective]] = NDCG
    statistics = ranking_statistics(RELEVANCE, QUERIES)
    names = ("num_items", "num_relevant", "ideal_dcg")
    options: ClassVar[dict[str, Any]] = dict(zip(names, statistics, strict=True))
    average: ClassVar[str] = "queries"
    lists = reference.statistics(RELEVANCE.tolist(), QUERIES.tolist())

    def make_batch(self, generator: torch.Generator) -> Batch:
        return lists(generator)

    def reference(
        self, batch: Batch, u: dict[int, Any], gamma: float
    ) -> tuple[float, dict[str, Any]]:
        loss, gradient = reference.step(
            *rows_of(batch), u, gamma=gamma, lists=self.lists, average=self.average
        )
        return loss, {"scores": gradient}

    def tracked(self, objective: Objective) -> dict[int, Any]:
        inner = objective.inner
        return {i: float(inner.u[i]) for i in inner.visited.nonzero().flatten().tolist()}

    def test_worked_example(self) -> None:
        relevance, query = torch.tensor([2, 0, 1]), torch.zeros(3, dtype=torch.long)
        objective = NDCG(3, *ranking_statistics(relevance, query))
        result = evaluate(objective, whole(torch.tensor([1.0, 0.5, 0.0]), relevance, query))
        # rank of the first: 1 + (1 - 0.5)^2 + (1 - 1)^2; of the last: (1 + 1)^2 + (1 + 0.5)^2 + 1
        first, last = 1 + 0.25 + 0, 4 + 2.25 + 1
        ideal = (2**2 - 1) / math.log2(1 + 1) + (2**1 - 1) / math.log2(1 + 2)
        value = (3 / math.log2(1 + first) + 1 / math.log2(1 + last)) / ideal
        assert result.loss.item() == pytest.approx(-value)
        # d(-gain / log2(1 + r)) = gain ln2 / ((1 + r) ln(1 + r)^2), l' = 2 (1 + s)
        steep = [g * math.log(2) / ((1 + r) * math.log(1 + r) ** 2) / ideal
                 for g, r in ((3, first), (1, last))]  # fmt: skip
        top = steep[1] * 2 * 2 - steep[0] * 2 * 0.5
        middle = steep[0] * 2 * 0.5 + steep[1] * 2 * 1.5
        assert result.gradients["scores"].tolist() == pytest.approx([top, middle, -top - middle])


class TestNDCGOfPairs(TestNDCG):
    options: ClassVar[dict[str, Any]] = TestNDCG.options | {"average": "pairs"}
    average: ClassVar[str] = "pairs"

    def test_worked_example(self) -> None:
        relevance, query = torch.tensor([1, 0, 1, 1]), torch.tensor([0, 0, 1, 1])
        objective = NDCG(4, *ranking_statistics(relevance, query), average="pairs")
        result = evaluate(objective, whole(torch.zeros(4), relevance, query))
        # every rank is 1 + 1; Z_0 = 1 and Z_1 = 1 + 1 / log2(3)
        one = 1 / math.log2(3)
        assert result.loss.item() == pytest.approx(-(one + 2 * one / (1 + one)) / 3)


def toy(
    generator: torch.Generator, queries: int = 6, copies: int = 1
) -> tuple[Tensor, Tensor, Tensor]:
    """Scores, relevance and queries of lists of 20 to 40 items, about a quarter relevant.

    The copies of all lists have queries of their own: draws from them are draws repeated.
    """
    sizes = torch.randint(20, 41, (queries,), generator=generator)
    query = torch.arange(queries).repeat_interleave(sizes)
    hidden = torch.randn(len(query), generator=generator, dtype=F64)
    relevance = (hidden > 0.6).long() + (hidden > 1.2).long()
    scores = hidden + torch.randn(len(query), generator=generator, dtype=F64)
    query = (queries * torch.arange(copies)[:, None] + query).flatten()
    return scores.repeat(copies), relevance.repeat(copies), query


def drawn(
    relevance: Tensor, query: Tensor, generator: torch.Generator, *, pos: int, neg: int
) -> Tensor:
    """Rows of ``pos`` relevant and ``neg`` irrelevant items of each list, at random."""
    kind = 2 * query + (relevance > 0)
    order = torch.randperm(len(query), generator=generator)
    order = order[kind[order].argsort(stable=True)]
    count = kind.bincount()
    place = torch.arange(len(order)) - (count.cumsum(0) - count)[kind[order]]
    return order[place < torch.where(kind[order] % 2 == 1, pos, neg)]


@pytest.mark.parametrize("average", ["queries", "pairs"])
def test_full_lists_have_the_gradient_of_the_objective_written_in_autograd(average: Any) -> None:
    scores, relevance, query = toy(torch.Generator().manual_seed(1))
    leaf = scores.clone().requires_grad_()
    total, pairs, count = scores.new_zeros(()), int((relevance > 0).sum()), int(query.max()) + 1
    for q in range(count):
        s, y = leaf[query == q], relevance[query == q]
        rank = (1 + s[None, :] - s[:, None]).relu().square().sum(1)
        best = (2.0 ** y.sort(descending=True).values - 1).double()
        ideal = (best / torch.log2(2 + torch.arange(len(y)).double())).sum()
        total = total - ((2.0**y - 1) / torch.log2(1 + rank)).sum() / ideal
    loss = total / (count if average == "queries" else pairs)
    (want,) = torch.autograd.grad(loss, leaf)
    statistics = ranking_statistics(relevance, query)
    for gamma in (1.0, 0.1):  # the first visit makes u exact for any gamma
        objective = NDCG(len(scores), *statistics, gamma=gamma, average=average, state_dtype=F64)
        got = evaluate(objective, whole(scores, relevance, query))
        torch.testing.assert_close(got.loss, loss.detach(), rtol=1e-12, atol=0)
        torch.testing.assert_close(got.gradients["scores"], want, rtol=1e-10, atol=1e-13)


def test_the_weight_of_a_pair_is_line_seven_of_the_algorithm() -> None:
    relevance, query = torch.tensor([3, 0]), torch.tensor([0, 0])
    objective = NDCG(2, *ranking_statistics(relevance, query), state_dtype=F64)
    got = evaluate(objective, whole(torch.tensor([0.0, 0.5], dtype=F64), relevance, query))
    u, n, z = (1 + 1.5**2) / 2, 2, 7.0
    p = 7 * n / (z * (n * u + 1) * math.log2(n * u + 1) ** 2 * math.log(2))
    assert got.gradients["scores"][1].item() == pytest.approx(p * 2 * 1.5 / n, rel=1e-12)


@pytest.mark.parametrize(("pos", "neg"), [(3, 24), (4, 12), (6, 6)])
def test_the_fixed_point_does_not_depend_on_the_rate_of_relevant_items(pos: int, neg: int) -> None:
    generator = torch.Generator().manual_seed(0)
    scores, relevance, query = toy(generator, queries=2, copies=8)
    items, relevant, ideal = ranking_statistics(relevance, query)
    objective = NDCG(len(scores), items, relevant, ideal, gamma=0.02, state_dtype=F64)
    # what the plain mean of Algorithm 33, line 6, tracks: the sampler's share of relevant items
    sampled = (items * pos / (pos + neg)).long()
    plain = NDCG(len(scores), items, sampled, ideal, gamma=0.02, state_dtype=F64)
    batch, leaf = whole(scores, relevance, query), scores.clone().requires_grad_()
    exact = objective.exact(leaf, relevance, query=query)
    (want,) = torch.autograd.grad(exact, leaf)
    is_relevant = relevance > 0
    rows = objective.list_rows(scores, relevance, batch.groups["index"], query)
    rank = objective.inner_values(scores, rows)
    loss, total, ratio = 0.0, torch.zeros_like(scores), torch.zeros(2)
    for step in range(600):
        rows = drawn(relevance, query, generator, pos=pos, neg=neg)
        result, _ = evaluate(objective, batch.rows(rows)), evaluate(plain, batch.rows(rows))
        if step >= 300:
            loss += float(result.loss) / 300
            total[rows] += result.gradients["scores"] / 300
            found = [(o.inner.u[is_relevant] / rank).mean() / 300 for o in (objective, plain)]
            ratio += torch.tensor(found)
    total, want = total.view(8, -1).mean(0), want.view(8, -1).mean(0)
    assert loss == pytest.approx(exact.item(), rel=0.01)
    assert torch.cosine_similarity(total, want, dim=0) > 0.99
    assert float(total.norm() / want.norm()) == pytest.approx(1.0, abs=0.1)
    assert ratio[0].item() == pytest.approx(1.0, abs=0.01)
    assert pos == 4 or abs(ratio[1].item() - 1) > 0.1


def test_a_small_gamma_averages_the_sampling_of_lists_out() -> None:
    generator = torch.Generator().manual_seed(2)
    scores, relevance, query = toy(generator, queries=2, copies=8)
    leaf, statistics = scores.clone().requires_grad_(), ranking_statistics(relevance, query)
    batch = whole(scores, relevance, query)

    def figures(gamma: float) -> tuple[float, float, float]:
        objective = NDCG(len(scores), *statistics, gamma=gamma, state_dtype=F64)
        exact = objective.exact(leaf, relevance, query=query)
        (want,) = torch.autograd.grad(exact, leaf)
        loss, total = 0.0, torch.zeros_like(scores)
        for step in range(300):
            rows = drawn(relevance, query, generator, pos=3, neg=5)  # of lists of 20 to 40
            result = evaluate(objective, batch.rows(rows))
            if step >= 100:
                loss += float(result.loss) / 200
                total[rows] += result.gradients["scores"] / 200
        mean, want = total.view(8, -1).mean(0), want.view(8, -1).mean(0)
        cosine = torch.cosine_similarity(mean, want, dim=0)
        return loss / exact.item(), float(cosine), float(mean.norm() / want.norm())

    loss, cosine, scale = figures(0.1)
    assert loss == pytest.approx(1.0, abs=0.01)
    assert cosine > 0.998
    assert scale == pytest.approx(1.0, abs=0.05)
    loss, cosine, _ = figures(1.0)
    assert loss > 1.15
    assert cosine < 0.9


def test_a_list_whose_irrelevant_items_are_all_missing_is_left_out() -> None:
    contract = TestNDCG()
    objective = contract.build()
    batch = whole(torch.randn(12, dtype=F64), RELEVANCE, QUERIES)
    rows = torch.tensor([0, 2, 5, 6, 7])  # of query 0 the relevant rows alone
    result = evaluate(objective, batch.rows(rows))
    assert objective.inner.visited.nonzero().flatten().tolist() == [5, 7]
    assert result.gradients["scores"][:2].tolist() == [0.0, 0.0]
    assert result.metrics["relevant/usable"].item() == pytest.approx(2 / 4)


def test_a_list_of_relevant_items_alone_and_a_list_of_one_are_lists() -> None:
    relevance, query = torch.tensor([2, 1, 1]), torch.tensor([0, 0, 1])
    statistics = ranking_statistics(relevance, query)
    result = evaluate(NDCG(3, *statistics), whole(torch.tensor([2.0, 0.0, 0.0]), relevance, query))
    ideal = 3 + 1 / math.log2(3)
    first = (3 / 1 + 1 / math.log2(1 + 1 + 9)) / ideal
    assert result.loss.item() == pytest.approx(-(first + 1) / 2)  # the list of one is perfect


def test_relevant_items_that_were_not_drawn_tie_with_a_single_relevant_row() -> None:
    relevance, query = torch.tensor([1, 1, 1, 0]), torch.zeros(4, dtype=torch.long)
    objective = NDCG(4, *ranking_statistics(relevance, query))
    batch = whole(torch.zeros(4), relevance, query).rows(torch.tensor([0, 3]))
    assert evaluate(objective, batch).metrics["rank/mean"].item() == pytest.approx(4.0)


def test_statistics_are_those_of_the_ranks() -> None:
    order = torch.randperm(12)
    items, relevant, ideal = ranking_statistics(RELEVANCE[order], QUERIES[order])
    assert items.tolist() == [5, 4, 3]
    assert relevant.tolist() == [2, 2, 1]
    third = 1 / math.log2(3)
    assert ideal.tolist() == pytest.approx([3 + third, 7 + third, 1])
    assert ranking_statistics(RELEVANCE, QUERIES, top_k=1)[2].tolist() == [3, 7, 1]


def test_a_query_out_of_range_or_missing_is_refused_with_the_way_out() -> None:
    contract = TestNDCG()
    (batch,) = contract.batches(1)
    for wrong in (-1, 3):
        query = batch.groups["query"].clone()
        query[4] = wrong
        with pytest.raises(IndexError, match=rf"{wrong}.*out of range for 3 queries; number"):
            evaluate(contract.build(), replace(batch, groups=batch.groups | {"query": query}))
    groups = {"index": batch.groups["index"]}
    with pytest.raises(ValueError, match=r"got no query; pass query=batch\['query'\]"):
        evaluate(contract.build(), replace(batch, groups=groups))


def test_constructor_refuses_what_cannot_be_a_rank_or_a_list() -> None:
    with pytest.raises(ValueError, match=r"at least 1 at 0, got 0.6931.*SquaredHinge"):
        NDCG(12, *TestNDCG.statistics, surrogate=Logistic())
    items, relevant, ideal = TestNDCG.statistics
    with pytest.raises(ValueError, match=r"num_items \(3,\) and num_relevant \(2,\).*one entry"):
        NDCG(12, items, relevant[:2], ideal)
    with pytest.raises(ValueError, match="more relevant items than items"):
        NDCG(12, relevant, items, ideal)
    with pytest.raises(ValueError, match="ideal_dcg must be positive"):
        NDCG(12, items, relevant, torch.zeros(3))
    with pytest.raises(ValueError, match="average must be 'queries' or 'pairs', got 'rows'"):
        NDCG(12, items, relevant, ideal, average="rows")  # pyright: ignore[reportArgumentType]


def test_training_raises_the_ndcg_of_a_toy() -> None:
    generator = torch.Generator().manual_seed(0)
    _, relevance, query = toy(generator, queries=8)
    features = torch.randn(len(query), 5, generator=generator)
    features[:, 0] += relevance
    weights = torch.zeros(5, requires_grad=True)
    statistics = ranking_statistics(relevance, query)
    objective = NDCG(len(query), *statistics, gamma=0.3)
    optimizer = torch.optim.Adam([weights], lr=0.05)

    def ndcg() -> float:
        found = []
        for q in range(8):
            y = relevance[query == q][(features @ weights)[query == q].argsort(descending=True)]
            discount = torch.log2(2 + torch.arange(len(y)))
            found.append(((2.0**y - 1) / discount).sum() / statistics[2][q])
        return float(torch.stack(found).mean())

    with torch.no_grad():
        weights[1] = 0.1
    before = ndcg()
    for _ in range(80):
        rows = drawn(relevance, query, generator, pos=3, neg=6)
        optimizer.zero_grad()
        loss = objective(features[rows] @ weights, relevance[rows], index=rows, query=query[rows])
        loss.loss.backward()
        optimizer.step()
    assert before < 0.65
    assert ndcg() > before + 0.15


@pytest.mark.parametrize("grade", [-1.0, float("nan")])
def test_grades_that_are_none_are_refused(grade: float) -> None:
    targets, query = torch.tensor([2.0, 0.0, 1.0]), torch.zeros(3, dtype=torch.long)
    objective = NDCG(3, *ranking_statistics(targets, query))
    targets[1] = grade
    rows = {"index": torch.arange(3), "query": query}
    for call in (objective, objective.exact):
        with pytest.raises(ValueError, match="NDCG needs grades of relevance >= 0"):
            call(torch.zeros(3), targets, **rows)
