"""InfoNCE (SimCLR) and CLIPLoss, against loops and against cross_entropy."""

import math
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F

from llm_xrisk.objectives import Objective
from llm_xrisk.objectives.contrastive_baselines import CLIPLoss, InfoNCE
from llm_xrisk.objectives.temperatures import GlobalTemperature, IndividualTemperature
from tests.contract import Batch, ObjectiveContract, evaluate
from tests.objectives.test_contrastive import TestGlobalContrastive as ViewsContract
from tests.reference import clip as reference

F64 = torch.float64


class TestInfoNCE(ObjectiveContract):
    objective_class: ClassVar[type[Objective]] = InfoNCE
    options: ClassVar[dict[str, Any]] = {"tau": 0.5}

    make_batch = ViewsContract.make_batch
    degenerate = ViewsContract.degenerate

    def reference(
        self, batch: Batch, u: dict[int, Any], gamma: float
    ) -> tuple[float, dict[str, Any]]:
        owner = batch.groups["index"].tolist() * 2
        size, rows = len(batch.scores), range(len(owner))
        choices = [[j for j in rows if owner[j] != owner[i]] for i in rows]
        loss, gradient = reference.minibatch(
            batch.scores.tolist() + batch.targets.tolist(),
            choices,
            [(i + size) % len(owner) for i in rows],
            tau=0.5,
        )
        return mean(loss, gradient, size, len(owner))

    def test_worked_example(self) -> None:
        batch = Batch(
            torch.tensor([[2.0, 0.0], [0.0, 1.0]]),
            torch.tensor([[3.0, 0.0], [1.0, 0.0]]),
            {"index": torch.tensor([0, 1])},
            leaves=("scores", "targets"),
        )
        # views e1, e2, e1, e1: those of sample 0 have the positive e1 and the negatives e2, e1;
        # of sample 1, e2 has the positive e1 and e1 twice, e1 has the positive e2 and e1 twice
        e = math.exp(2)
        losses = [-math.log(e / (e + 1 + e))] * 2 + [-math.log(1 / 3), -math.log(1 / (1 + 2 * e))]
        assert evaluate(InfoNCE(tau=0.5), batch).loss.item() == pytest.approx(sum(losses) / 4)

    def test_a_batch_given_twice_is_the_same_batch(self) -> None:
        """It is not: the sum in the denominator has every negative twice."""
        batch = self.batches(1)[0]
        twice = batch.rows(torch.arange(6).repeat(2))
        got = evaluate(self.build(), twice).loss
        loss, _ = self.reference(twice, {}, 1.0)
        assert got.item() == pytest.approx(loss, rel=1e-10)
        assert got > evaluate(self.build(), batch).loss + 0.1


class TestCLIPLoss(TestInfoNCE):
    objective_class: ClassVar[type[Objective]] = CLIPLoss

    def reference(
        self, batch: Batch, u: dict[int, Any], gamma: float
    ) -> tuple[float, dict[str, Any]]:
        owner = batch.groups["index"].tolist()
        size, rows = len(owner), range(len(owner))
        choices = [[size + j for j in rows if owner[j] != owner[i]] for i in rows]
        choices += [[j for j in rows if owner[j] != owner[i]] for i in rows]
        loss, gradient = reference.minibatch(
            batch.scores.tolist() + batch.targets.tolist(),
            choices,
            [(i + size) % (2 * size) for i in range(2 * size)],
            tau=0.5,
        )
        return mean(loss, gradient, size, size)

    def test_worked_example(self) -> None:
        batch = Batch(
            torch.tensor([[2.0, 0.0], [0.0, 1.0]]),
            torch.tensor([[3.0, 0.0], [1.0, 0.0]]),
            {"index": torch.tensor([0, 1])},
            leaves=("scores", "targets"),
        )
        # images e1, e2, texts e1, e1: each image is as close to one text as to the other;
        # text 0 has its image at 1 and the other at 0, text 1 the reverse
        e = math.exp(2)
        losses = [math.log(2), math.log(2), -math.log(e / (e + 1)), -math.log(1 / (e + 1))]
        assert evaluate(CLIPLoss(tau=0.5), batch).loss.item() == pytest.approx(sum(losses) / 2)


def mean(
    loss: float, gradient: list[list[float]], size: int, count: int
) -> tuple[float, dict[str, Any]]:
    scaled = [[x / count for x in row] for row in gradient]
    return loss / count, {"scores": scaled[:size], "targets": scaled[size:]}


def test_without_repeated_samples_they_are_cross_entropies() -> None:
    generator = torch.Generator().manual_seed(0)
    first, second = torch.randn(2, 6, 4, generator=generator, dtype=F64)
    h, g = F.normalize(first, dim=-1), F.normalize(second, dim=-1)
    views = torch.cat([h, g])
    logits = (views @ views.T / 0.2).fill_diagonal_(-math.inf)
    want = F.cross_entropy(logits, torch.arange(12).roll(6))
    torch.testing.assert_close(InfoNCE(0.2)(first, second).loss, want, rtol=1e-12, atol=0)
    diagonal, cross = torch.arange(6), h @ g.T / 0.2
    want = F.cross_entropy(cross, diagonal) + F.cross_entropy(cross.T, diagonal)
    torch.testing.assert_close(CLIPLoss(0.2)(first, second).loss, want, rtol=1e-12, atol=0)


@pytest.mark.parametrize("objective_class", [InfoNCE, CLIPLoss])
def test_a_learned_temperature_has_the_gradient_of_autograd(objective_class: type) -> None:
    generator = torch.Generator().manual_seed(0)
    first, second = torch.randn(2, 6, 4, generator=generator, dtype=F64)
    module = GlobalTemperature(0.2, rho=0.0, state_dtype=F64)
    loss = objective_class(module)(first, second).loss
    (got,) = torch.autograd.grad(loss, module.logit_scale)
    value = [objective_class(0.2 * math.exp(-h))(first, second).loss for h in (1e-5, -1e-5)]
    assert got.item() == pytest.approx((value[0] - value[1]).item() / 2e-5, rel=1e-7)


def test_a_temperature_for_each_sample_is_refused() -> None:
    with pytest.raises(ValueError, match="InfoNCE keeps nothing for samples, got a temperature"):
        InfoNCE(IndividualTemperature(4))
