"""TopKNDCG (K-SONG; 6.36 and 6.37)."""

import math
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from llm_xrisk.objectives import Objective
from llm_xrisk.objectives.ndcg import NDCG, ranking_statistics
from llm_xrisk.objectives.ndcg_top_k import TopKNDCG
from llm_xrisk.objectives.thresholds import upper_quantile
from tests.contract import Batch, ObjectiveContract, evaluate
from tests.objectives.test_ndcg import QUERIES, RELEVANCE, drawn, lists, rows_of, toy, whole
from tests.reference import ndcg_top_k as reference
from tests.reference.ndcg import statistics

F64 = torch.float64
NAMES = ("num_items", "num_relevant", "ideal_dcg")


class TestTopKNDCG(ObjectiveContract):
    objective_class: ClassVar[type[Objective]] = TopKNDCG
    has_duals: ClassVar[bool] = True
    settings: ClassVar[dict[str, Any]] = {"approach": "bilevel", "eps": 0.37, "lr": 0.05}
    # K = 3 makes the list of three one whose items are all in its first K places
    top_k: ClassVar[int] = 3

    @property
    def options(self) -> dict[str, Any]:  # pyright: ignore[reportIncompatibleVariableOverride]
        found = ranking_statistics(RELEVANCE, QUERIES, top_k=self.top_k)
        return dict(zip(NAMES, found, strict=True)) | {"top_k": self.top_k} | self.settings

    def make_batch(self, generator: torch.Generator) -> Batch:
        return lists(generator)

    def reference(
        self, batch: Batch, u: dict[int, Any], gamma: float
    ) -> tuple[float, dict[str, Any]]:
        found = statistics(RELEVANCE.tolist(), QUERIES.tolist(), self.top_k)
        loss, gradient = reference.step(
            *rows_of(batch),
            u,
            gamma=gamma,
            lists=found,
            top_k=self.top_k,
            **{"alpha": 2.0} | self.settings,
        )
        return loss, {"scores": gradient}

    def tracked(self, objective: Objective) -> dict[Any, Any]:
        def seen(visited: Tensor) -> list[int]:
            return visited.nonzero().flatten().tolist()

        found: dict[Any, Any] = {
            i: float(objective.inner.u[i]) for i in seen(objective.inner.visited)
        }
        if objective.thresholds is not None:
            duals = objective.thresholds
            found |= {("lambda", q): float(duals.value[q]) for q in seen(duals.visited)}
        if self.settings.get("gradient") == "theoretical":
            hessian = objective.hessian
            found |= {("s", q): float(hessian.u[q]) for q in seen(hessian.visited)}
        return found

    def test_gamma_one_is_the_minibatch_loss(self) -> None:
        for batch in self.batches(
            3
        ):  # lambda has a memory of its own; new queries take the batch's
            result = evaluate(self.build(gamma=1.0), batch)
            want = self.build().exact(batch.scores, batch.targets, **batch.groups)
            torch.testing.assert_close(result.loss, want, rtol=1e-12, atol=1e-12)

    def test_worked_example(self) -> None:
        relevance, query = torch.tensor([2, 0, 1]), torch.zeros(3, dtype=torch.long)
        objective = TopKNDCG(3, *ranking_statistics(relevance, query, top_k=1), top_k=1)
        result = evaluate(objective, whole(torch.tensor([1.0, 0.5, 0.0]), relevance, query))
        # lambda is the second score; psi = sigmoid(2 (s - 0.5)), the ideal DCG of one place is 3
        inside = [1 / (1 + math.exp(-2 * (s - 0.5))) for s in (1.0, 0.0)]
        first, last = 1 + 0.25 + 0, 4 + 2.25 + 1
        gains = [3 / math.log2(1 + first), 1 / math.log2(1 + last)]
        assert objective.thresholds.value.tolist() == [0.5]
        want = -(inside[0] * gains[0] + inside[1] * gains[1]) / 3
        assert result.loss.item() == pytest.approx(want)


class TestTopKNDCGInTheory(TestTopKNDCG):
    settings: ClassVar[dict[str, Any]] = TestTopKNDCG.settings | {
        "gradient": "theoretical",
        "tau1": 0.3,
        "tau2": 0.01,
        "gamma_hessian": 0.6,
    }

    def test_worked_example(self) -> None:
        relevance, query = torch.tensor([1, 0]), torch.zeros(2, dtype=torch.long)
        found = ranking_statistics(relevance, query, top_k=1)
        options: Any = {"top_k": 1, "tau1": 1.0, "tau2": 0.25, "gradient": "theoretical"}
        objective = TopKNDCG(2, *found, **options)
        result = evaluate(objective, whole(torch.tensor([1.0, 0.0]), relevance, query))
        # lambda = 0, the second score; t = sigma'(1 - 0), sigma'(0); s_q = mean t + tau2
        t = [math.exp(-1) / (1 + math.exp(-1)) ** 2, 0.25]
        pull = [x / 2 / ((t[0] + t[1]) / 2 + 0.25) for x in t]
        inside = 1 / (1 + math.exp(-2))
        steep = -2 * inside * (1 - inside)  # -alpha psi' times the gain 1 / log2(1 + 1)
        want = [steep * (1 - pull[0]), -steep * pull[1]]  # l' is 0 at -1
        assert result.gradients["scores"].tolist() == pytest.approx(want)


class TestTopKNDCGByProduct(TestTopKNDCG):
    settings: ClassVar[dict[str, Any]] = {"approach": "product", "alpha": 0.3}
    has_duals: ClassVar[bool] = False

    def test_gamma_one_is_the_minibatch_loss(self) -> None:
        ObjectiveContract.test_gamma_one_is_the_minibatch_loss(self)

    def test_worked_example(self) -> None:
        relevance, query = torch.tensor([1, 0]), torch.zeros(2, dtype=torch.long)
        found = ranking_statistics(relevance, query, top_k=1)
        objective = TopKNDCG(2, *found, top_k=1, approach="product", alpha=0.5)
        result = evaluate(objective, whole(torch.tensor([0.0, 0.0]), relevance, query))
        # rank 2: psi = sigmoid(0.5 (1 - 2)), gain 1 / log2(3)
        inside = 1 / (1 + math.exp(0.5))
        assert result.loss.item() == pytest.approx(-inside / math.log2(3))
        # in the rank r: -psi / log2(1 + r) has -psi' (-1) / log2(1 + r) + psi ln2 / ((1+r) ln^2)
        steep = 0.5 * inside * (1 - inside) / math.log2(3)
        steep += inside * math.log(2) / (3 * math.log(3) ** 2)
        assert result.gradients["scores"].tolist() == pytest.approx([-2 * steep, 2 * steep])


def smoothed(scores: Tensor, top_k: int, tau1: float, tau2: float) -> Tensor:
    """Lambda of one list's smoothed lower level, by bisection of its increasing derivative."""
    low, high = scores.min().item() - 50, scores.max().item() + 50
    level = (top_k + 0.5) / len(scores)
    for _ in range(200):
        middle = (low + high) / 2
        share = torch.sigmoid((scores - middle) / tau1).mean().item()
        low, high = (low, middle) if level - share + tau2 * middle > 0 else (middle, high)
    return scores.new_tensor((low + high) / 2)


def test_the_theoretical_gradient_is_that_of_the_bilevel_objective() -> None:
    scores, relevance, query = toy(torch.Generator().manual_seed(3), queries=3)
    tau1, tau2, top_k = 0.2, 1e-3, 5
    found = ranking_statistics(relevance, query, top_k=top_k)
    options: Any = {"top_k": top_k, "alpha": 1.7, "tau1": tau1, "tau2": tau2, "state_dtype": F64}
    objective = TopKNDCG(len(scores), *found, gradient="theoretical", lr=1e-12, **options)

    def bilevel(s: Tensor, implicit: bool = False) -> Tensor:
        total = s.new_zeros(())
        for q in range(3):
            own, y = s[query == q], relevance[query == q]
            place = smoothed(own.detach(), top_k, tau1, tau2)
            if implicit:  # one Newton step from the solution has the solution's gradient
                share = torch.sigmoid((own - place) / tau1)
                slope = (top_k + 0.5) / len(own) - share.mean() + tau2 * place
                curvature = (share * (1 - share) / tau1).mean() + tau2
                place = place - slope / curvature.detach()
            rank = (1 + own[None, :] - own[:, None]).relu().square().sum(1)
            gain = (2.0 ** y.double() - 1) / (found[2][q] * torch.log2(1 + rank))
            total = total - (torch.sigmoid(1.7 * (own - place)) * gain).sum() / 3
        return total

    leaf = scores.clone().requires_grad_()
    (want,) = torch.autograd.grad(bilevel(leaf, implicit=True), leaf)
    duals = objective.thresholds
    for q in range(3):
        duals.value[q] = smoothed(scores[query == q], top_k, tau1, tau2)
    duals.visited.fill_(True)
    got = evaluate(objective, whole(scores, relevance, query)).gradients["scores"]
    torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-12)
    # and without autograd: central differences along a direction, lambda solved anew
    direction = torch.randn(len(scores), generator=torch.Generator().manual_seed(0), dtype=F64)
    step = 1e-4 * direction
    difference = (bilevel(scores + step) - bilevel(scores - step)) / 2e-4
    assert float(got @ direction) == pytest.approx(difference.item(), rel=1e-5)


def test_the_practical_gradient_leaves_that_of_psi_out() -> None:
    scores, relevance, query = toy(torch.Generator().manual_seed(3), queries=1)
    found = ranking_statistics(relevance, query, top_k=5)
    objective = TopKNDCG(len(scores), *found, top_k=5, state_dtype=F64)
    got = evaluate(objective, whole(scores, relevance, query))
    leaf = scores.clone().requires_grad_()
    inside = torch.sigmoid(2 * (scores - scores.sort(descending=True).values[5]))
    rank = (1 + leaf[None, :] - leaf[:, None]).relu().square().sum(1)
    loss = -(inside * (2.0**relevance - 1) / torch.log2(1 + rank)).sum() / found[2][0]
    (want,) = torch.autograd.grad(loss, leaf)
    torch.testing.assert_close(got.loss, loss.detach(), rtol=1e-12, atol=0)
    torch.testing.assert_close(got.gradients["scores"], want, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("gradient", ["practical", "theoretical"])
def test_lambda_finds_the_score_after_the_first_k(gradient: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    scores, relevance, query = toy(generator, queries=4, copies=2)
    found = ranking_statistics(relevance, query, top_k=5)
    options: Any = {"top_k": 5, "gradient": gradient, "tau1": 1e-3}
    objective = TopKNDCG(len(scores), *found, **options)
    batch, values = whole(scores, relevance, query), torch.zeros(8)
    want = torch.stack([scores[query == q].topk(6).values[-1] for q in range(8)])
    for lr, steps in ((0.1, 500), (0.01, 250), (0.003, 250)):
        objective.thresholds.lr = lr
        for step in range(steps):
            part = batch.rows(drawn(relevance, query, generator, pos=4, neg=12))
            objective(part.scores, part.targets, **part.groups)
            values += objective.thresholds.value / 200 * (lr == 0.003 and step >= 50)
    assert (values - want).abs().max() < 0.01


def test_the_printed_sign_would_let_lambda_fall_for_ever() -> None:
    scores, query = torch.arange(8.0), torch.zeros(8, dtype=torch.long)
    relevance = torch.tensor([0, 0, 0, 0, 1, 1, 0, 1])
    found = ranking_statistics(relevance, query, top_k=2)
    objective = TopKNDCG(8, *found, top_k=2, lr=0.1)
    batch = whole(scores, relevance, query)
    for start in (0.0, 9.0):
        objective.thresholds.value.fill_(start)
        objective.thresholds.visited.fill_(True)
        for _ in range(450):
            objective(batch.scores, batch.targets, **batch.groups)
        assert objective.thresholds.value.item() == pytest.approx(5.0, abs=0.1)


def test_with_k_of_the_longest_list_it_is_ndcg() -> None:
    (batch,) = TestTopKNDCG().batches(1)
    found = ranking_statistics(RELEVANCE, QUERIES, top_k=5)
    want = evaluate(NDCG(12, *ranking_statistics(RELEVANCE, QUERIES), state_dtype=F64), batch)
    for approach in ("bilevel", "product"):
        options: Any = {"top_k": 5, "approach": approach, "state_dtype": F64}
        got = evaluate(TopKNDCG(12, *found, **options), batch)
        assert torch.equal(got.loss, want.loss)
        assert torch.equal(got.gradients["scores"], want.gradients["scores"])


def test_upper_quantile_is_one_score_of_each_list_at_ties() -> None:
    """Levels that a sum of weights reaches exactly, as sampled lists have them."""
    slot = torch.arange(60) // 3
    weight = torch.tensor([2.0, 3.5, 3.5]).repeat(20) / 9
    scores = torch.randn(60, generator=torch.Generator().manual_seed(0))
    for level in (2.0, 3.5, 5.5, 7.0, 9.0):
        got = upper_quantile(scores, weight, slot, torch.full((60,), level / 9)).view(20, 3)
        own = scores.view(20, 3)
        assert (got == got[:, :1]).all()
        assert (got[:, :1] == own).any(1).all()


def test_upper_quantile_solves_the_lower_level_of_each_list() -> None:
    generator = torch.Generator().manual_seed(0)
    slot = torch.randint(0, 5, (60,), generator=generator)
    scores = torch.randn(60, generator=generator, dtype=F64)
    weight = torch.rand(60, generator=generator, dtype=F64)
    weight = weight / torch.zeros(5, dtype=F64).index_add(0, slot, weight)[slot]
    got = upper_quantile(scores, weight, slot, torch.full((60,), 0.3, dtype=F64))
    for q in range(5):
        own = slot == q
        pairs = dict(enumerate(weight[own].tolist()))
        assert set(got[own].tolist()) == {reference.solve(scores[own].tolist(), pairs, 0.3)}


def test_unknown_options_and_impossible_numbers_are_refused() -> None:
    found = ranking_statistics(RELEVANCE, QUERIES, top_k=2)
    for wrong in ({"approach": "sum"}, {"gradient": "exact"}):
        with pytest.raises(ValueError, match="need approach 'bilevel' or 'product'"):
            TopKNDCG(12, *found, **{"top_k": 2} | wrong)
    for wrong in ({"top_k": 0}, {"eps": 1.0}, {"alpha": 0.0}, {"tau1": 0.0}, {"tau2": 0.0}):
        with pytest.raises(ValueError, match="need top_k >= 1, eps in"):
            TopKNDCG(12, *found, **{"top_k": 2} | wrong)


def test_in_eval_lambda_is_the_batchs_and_nothing_moves() -> None:
    contract = TestTopKNDCG()
    first, second = contract.batches(2)
    objective = contract.build()
    evaluate(objective, first)
    got = evaluate(objective.eval(), second).loss
    torch.testing.assert_close(got, objective.exact(**second.tensors()), rtol=1e-12, atol=0)
