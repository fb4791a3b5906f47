"""OPAUCSoft (SOPA-s, Algorithm 30)."""

import math
from typing import Any, ClassVar

import pytest
import torch

from llm_xrisk.objectives import Objective, OPAUCSoft
from llm_xrisk.objectives.surrogates import Logistic
from tests.contract import Batch, ObjectiveContract, evaluate
from tests.objectives.several_labels import each_label, three_labels
from tests.objectives.test_average_precision import imbalanced
from tests.reference import opauc_soft as reference

F64 = torch.float64


class TestOPAUCSoft(ObjectiveContract):
    objective_class: ClassVar[type[Objective]] = OPAUCSoft
    options: ClassVar[dict[str, Any]] = {"tau": 0.7}
    compile_backend: ClassVar[str] = "inductor"

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
            tau=0.7,
        )
        return loss, {"scores": gradient}

    def tracked(self, objective: Objective) -> dict[int, Any]:
        inner = objective.inner
        return {i: math.exp(inner.u[i]) for i in inner.visited.nonzero().flatten().tolist()}

    def test_worked_example(self) -> None:
        batch = Batch(
            torch.tensor([1.0, 0.5, 0.0]),
            torch.tensor([1, 0, 0]),
            {"index": torch.tensor([0, 1, 2])},
        )
        # l = ((1 + 0.5 - 1)^2, (1 + 0 - 1)^2)
        weights = [math.exp(0.25 / 0.5), math.exp(0 / 0.5)]
        result = evaluate(OPAUCSoft(num_samples=3, tau=0.5), batch)
        assert result.loss.item() == pytest.approx(0.5 * math.log(sum(weights) / 2))
        push = weights[0] / sum(weights) * 2 * 0.5
        assert result.gradients["scores"].tolist() == pytest.approx([-push, push, 0.0])


class TestOPAUCSoftOfSeveralLabels(TestOPAUCSoft):
    options: ClassVar[dict[str, Any]] = {"tau": 0.7, "num_labels": 3}
    compile_backend: ClassVar[str] = "aot_eager"

    def make_batch(self, generator: torch.Generator) -> Batch:
        return three_labels(generator)

    def reference(
        self, batch: Batch, u: dict[int, Any], gamma: float
    ) -> tuple[float, dict[str, Any]]:
        index = batch.groups["index"].tolist()

        def one(label: int, scores: list[float], positive: list[bool], own: dict[int, Any]) -> Any:
            return reference.step(scores, positive, index, own, gamma=gamma, tau=0.7)

        return each_label(batch, u, one, lambda column: any(column) and not all(column))

    def test_worked_example(self) -> None:
        scores = torch.tensor([[1.0, 0.0], [0.5, 0.0], [0.0, 0.5]])
        targets = torch.tensor([[1, 0], [0, 1], [0, 0]])
        batch = Batch(scores, targets, {"index": torch.arange(3)})
        # l = ((1 + 0.5 - 1)^2, (1 + 0 - 1)^2) of the first label, (1, 1.5^2) of the second
        sums = [math.exp(0.25 / 0.5) + math.exp(0), math.exp(1 / 0.5) + math.exp(2.25 / 0.5)]
        result = evaluate(OPAUCSoft(num_samples=3, tau=0.5, num_labels=2), batch)
        want = [0.5 * math.log(total / 2) for total in sums]
        assert result.loss.item() == pytest.approx(sum(want) / 2)


@pytest.mark.parametrize("tau", [1.0, 0.1, 0.01, 0.001])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_are_those_of_float64_at_any_temperature(tau: float, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    scores = (torch.rand(16, generator=generator) * 200 - 100).to(dtype)
    batch = Batch(scores, (torch.arange(16) < 5).long(), {"index": torch.arange(16)})
    got = evaluate(OPAUCSoft(16, tau=tau, surrogate=Logistic()), batch)
    precise = OPAUCSoft(16, tau=tau, surrogate=Logistic(), state_dtype=F64)
    want = evaluate(precise, batch.to(F64))
    assert got.loss.item() == pytest.approx(want.loss.item(), rel=1e-3)
    gap = (got.gradients["scores"].to(F64) - want.gradients["scores"]).norm()
    assert gap < (1e-3 if dtype == torch.float32 else 4e-3) * want.gradients["scores"].norm()


def test_a_small_gamma_averages_the_sampling_of_negatives_out() -> None:
    generator = torch.Generator().manual_seed(0)
    targets = (torch.arange(120) < 20).long()
    scores = torch.randn(120, generator=generator, dtype=F64)
    leaf = scores.clone().requires_grad_()
    whole = OPAUCSoft(120, tau=0.1, state_dtype=F64)
    (exact,) = torch.autograd.grad(whole.exact(leaf, targets), leaf)

    def cosine(gamma: float) -> float:
        objective, total = OPAUCSoft(120, gamma=gamma, tau=0.1, state_dtype=F64), torch.zeros(120)
        for step in range(400):
            pos = torch.randperm(20, generator=generator)[:8]
            rows = torch.cat([pos, 20 + torch.randperm(100, generator=generator)[:8]])
            batch = Batch(scores[rows], targets[rows], {"index": rows})
            gradient = evaluate(objective, batch).gradients["scores"].float()
            total[rows] += gradient * (step >= 100)
        return float(torch.cosine_similarity(total, exact.float(), dim=0))

    small, large = cosine(0.02), cosine(1.0)
    assert small > 0.985
    assert small > large + 0.01


def test_a_temperature_of_zero_is_refused() -> None:
    with pytest.raises(ValueError, match=r"tau must be positive, got 0; the authors use 1.0"):
        OPAUCSoft(num_samples=3, tau=0)
