"""TPAUCSoft (SOTA-s, Algorithm 32)."""

import math
from dataclasses import replace
from typing import Any, ClassVar

import pytest
import torch

from llm_xrisk.objectives import Objective, OPAUCSoft
from llm_xrisk.objectives.tpauc_soft import TPAUCSoft
from tests.contract import Batch, ObjectiveContract, evaluate
from tests.objectives.several_labels import each_label, three_labels
from tests.objectives.test_average_precision import imbalanced
from tests.reference import tpauc_soft as reference

F64 = torch.float64
SETTINGS = {"tau1": 0.8, "tau2": 0.7, "outer_gamma": 0.6}


class TestTPAUCSoft(ObjectiveContract):
    objective_class: ClassVar[type[Objective]] = TPAUCSoft
    options: ClassVar[dict[str, Any]] = SETTINGS
    one_row_a_sample: bool = False

    def build(self, **overrides: Any) -> Objective:
        if overrides.get("gamma") == 1.0:
            overrides["outer_gamma"] = 1.0
        return super().build(**overrides)

    def at_temperature(self, tau: float) -> dict[str, Any]:
        return {"tau1": tau, "tau2": tau}

    def make_batch(self, generator: torch.Generator) -> Batch:
        return self.numbered(imbalanced(generator))

    def numbered(self, batch: Batch) -> Batch:
        groups = {"index": torch.arange(9)} if self.one_row_a_sample else batch.groups
        return replace(batch, groups=groups)

    def reference(
        self, batch: Batch, u: dict[int, Any], gamma: float
    ) -> tuple[float, dict[str, Any]]:
        index = batch.groups["index"].tolist()
        rows = (batch.scores.tolist(), batch.targets.bool().tolist(), index)
        loss, gradient = reference.step(*rows, u, gamma=gamma, **SETTINGS)
        return loss, {"scores": gradient}

    def tracked(self, objective: Objective) -> dict[int, Any]:
        inner, outer = objective.inner, objective.outer
        own = {i: math.exp(inner.u[i]) for i in inner.visited.nonzero().flatten().tolist()}
        labels = outer.visited.nonzero().flatten().tolist()
        return own | {k - len(outer.u): math.exp(outer.u[k]) for k in labels}

    def test_with_frozen_scores_the_state_approaches_the_inner_values(self) -> None:
        # rows of one sample blend their u with the one they share: v depends on gamma then
        self.one_row_a_sample = True
        super().test_with_frozen_scores_the_state_approaches_the_inner_values()

    def test_worked_example(self) -> None:
        batch = Batch(
            torch.tensor([1.0, 0.5, 0.0, 0.5]),
            torch.tensor([1, 0, 0, 1]),
            {"index": torch.arange(4)},
        )
        # losses 0.5^2 and 0 of the first positive, 1 and 0.5^2 of the second
        exps = [[math.exp(0.25 / 0.5), 1.0], [math.exp(1 / 0.5), math.exp(0.25 / 0.5)]]
        u = [sum(row) / 2 for row in exps]
        v = (u[0] ** (0.5 / 2) + u[1] ** (0.5 / 2)) / 2
        result = evaluate(TPAUCSoft(num_samples=4, tau1=2.0, tau2=0.5), batch)
        assert result.loss.item() == pytest.approx(2 * math.log(v))
        slope = [[2 * 0.5, 0.0], [2 * 1.0, 2 * 0.5]]
        push = [
            [exps[i][j] * u[i] ** (0.5 / 2 - 1) / v * slope[i][j] / 4 for j in (0, 1)]
            for i in (0, 1)
        ]
        columns = [push[0][j] + push[1][j] for j in (0, 1)]
        want = [-sum(push[0]), *columns, -sum(push[1])]
        assert result.gradients["scores"].tolist() == pytest.approx(want)


class TestTPAUCSoftOfSeveralLabels(TestTPAUCSoft):
    options: ClassVar[dict[str, Any]] = SETTINGS | {"num_labels": 3}

    def make_batch(self, generator: torch.Generator) -> Batch:
        return self.numbered(three_labels(generator))

    def reference(
        self, batch: Batch, u: dict[int, Any], gamma: float
    ) -> tuple[float, dict[str, Any]]:
        index = batch.groups["index"].tolist()

        def one(label: int, scores: list[float], positive: list[bool], own: dict[int, Any]) -> Any:
            return reference.step(scores, positive, index, own, gamma=gamma, **SETTINGS)

        return each_label(batch, u, one, lambda column: any(column) and not all(column))

    def test_worked_example(self) -> None:
        scores = torch.tensor([[1.0, 0.0], [0.5, 0.0], [0.0, 0.5]])
        batch = Batch(scores, torch.tensor([[1, 0], [0, 1], [0, 0]]), {"index": torch.arange(3)})
        # one positive a label: the mean over positives does nothing
        sums = [math.exp(0.25 / 0.5) + math.exp(0), math.exp(1 / 0.5) + math.exp(2.25 / 0.5)]
        result = evaluate(TPAUCSoft(num_samples=3, tau1=2.0, tau2=0.5, num_labels=2), batch)
        want = [0.5 * math.log(total / 2) for total in sums]
        assert result.loss.item() == pytest.approx(sum(want) / 2)


def pairwise(batch: Batch) -> torch.Tensor:
    positive = batch.targets == 1
    gap = batch.scores[~positive][None] - batch.scores[positive][:, None]
    return (1 + gap).relu().square()


def test_the_objective_in_autograd_has_the_same_value_and_gradient() -> None:
    batch = imbalanced(torch.Generator().manual_seed(0))
    leaf = batch.copy()
    g = torch.exp(pairwise(leaf) / 0.3).mean(1)
    want = 1.5 * torch.log((g ** (0.3 / 1.5)).mean())
    (gradient,) = torch.autograd.grad(want, leaf.scores)
    objective = TPAUCSoft(12, gamma=1.0, tau1=1.5, tau2=0.3, state_dtype=F64)
    result = evaluate(objective, batch)
    torch.testing.assert_close(result.loss, want.detach())
    torch.testing.assert_close(result.gradients["scores"], gradient)


def test_equal_temperatures_are_the_robust_mean_of_all_pairs() -> None:
    batch = imbalanced(torch.Generator().manual_seed(0))
    objective = TPAUCSoft(12, tau1=0.5, tau2=0.5)
    want = 0.5 * torch.log(torch.exp(pairwise(batch) / 0.5).mean())
    torch.testing.assert_close(objective.exact(batch.scores, batch.targets), want)


def test_a_large_temperature_of_the_positives_is_the_one_way_partial_auc() -> None:
    batch = imbalanced(torch.Generator().manual_seed(0))
    two = TPAUCSoft(12, tau1=1e6, tau2=0.5).exact(batch.scores, batch.targets)
    one = OPAUCSoft(12, tau=0.5).exact(batch.scores, batch.targets)
    torch.testing.assert_close(two, one, rtol=1e-5, atol=0.0)


def test_logarithms_are_the_averages_themselves_where_these_do_not_overflow() -> None:
    generator = torch.Generator().manual_seed(0)
    objective = TPAUCSoft(12, gamma=0.2, tau1=0.5, tau2=0.4, state_dtype=F64)
    u: dict[int, float] = {}
    for _ in range(20):
        batch = imbalanced(generator)
        rows = (batch.scores.tolist(), batch.targets.bool().tolist())
        settings = {"gamma": 0.2, "outer_gamma": 0.2, "tau1": 0.5, "tau2": 0.4}
        loss, _ = reference.step(*rows, batch.groups["index"].tolist(), u, **settings)
        got = objective(batch.scores, batch.targets, index=batch.groups["index"]).loss
        assert got.item() == pytest.approx(loss, rel=1e-10)


def test_each_average_has_a_weight_of_its_own() -> None:
    shared, own = TPAUCSoft(4, gamma=0.3), TPAUCSoft(4, gamma=0.3, outer_gamma=0.5)
    assert [o.outer.gamma.item() for o in (shared, own)] == pytest.approx([0.3, 0.5])
    assert own.inner.gamma.item() == pytest.approx(0.3)


@pytest.mark.parametrize("options", [{"tau1": 0.0}, {"tau2": -1.0}])
def test_a_temperature_that_is_none_is_refused(options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="tau1 and tau2 must be positive, got"):
        TPAUCSoft(3, **options)
