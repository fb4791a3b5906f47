"""GRPO, Dr. GRPO and DAPO: the baselines, against their objectives token by token."""

import math
from typing import Any, ClassVar

import pytest
import torch

from llm_xrisk.objectives import DAPO, GRPO, DrGRPO, Objective
from tests.contract import Batch, ObjectiveContract, evaluate
from tests.objectives.test_disco import TestDisCO as DisCOContract
from tests.reference import grpo as reference

F64 = torch.float64


class TestGRPO(ObjectiveContract):
    objective_class: ClassVar[type[Objective]] = GRPO
    kind: ClassVar[str] = "grpo"
    std: ClassVar[str | None] = "population"
    valid_only: ClassVar[bool] = False

    def make_batch(self, generator: torch.Generator) -> Batch:
        return DisCOContract().make_batch(generator)

    def reference(
        self, batch: Batch, u: dict[int, Any], gamma: float
    ) -> tuple[float, dict[str, Any]]:
        rewards, group = batch.targets.tolist(), batch.groups["group"].tolist()
        length = batch.groups["length"].tolist()
        advantage = reference.advantages(rewards, group, self.std)
        weight = reference.row_weights(rewards, group, length, self.kind, self.valid_only)
        # the score of a row is the mean over its tokens
        gradient = [-w * n * a for w, n, a in zip(weight, length, advantage, strict=True)]
        loss = sum(g * s for g, s in zip(gradient, batch.scores.tolist(), strict=True))
        return loss, {"scores": gradient, "kl": [0.0] * 12}

    def test_worked_example(self) -> None:
        batch = Batch(
            torch.tensor([1.1, 0.9, 0.8, 5.0]),
            torch.tensor([1.0, 0.0, 0.0, 1.0]),
            {"group": torch.tensor([3, 3, 3, 4])},  # question 4 has one answer, advantage 0
        )
        result = evaluate(GRPO(), batch)
        std = math.sqrt(1 / 3 * 2 / 3)
        advantage = [(1 - 1 / 3) / std, (0 - 1 / 3) / std, (0 - 1 / 3) / std, 0.0]
        weights = [1 / 2 / 3, 1 / 2 / 3, 1 / 2 / 3, 1 / 2]  # 1/m sum_i 1/K sum_j
        want = [-a * w for a, w in zip(advantage, weights, strict=True)]
        assert result.gradients["scores"].tolist() == pytest.approx(want)
        loss = want[0] * 1.1 + want[1] * 0.9 + want[2] * 0.8
        assert result.loss.item() == pytest.approx(loss)
        assert result.metrics["groups/valid_fraction"].item() == 0.5


class TestDrGRPO(TestGRPO):
    objective_class: ClassVar[type[Objective]] = DrGRPO
    options: ClassVar[dict[str, Any]] = {"max_length": 10}
    kind: ClassVar[str] = "dr_grpo"
    std: ClassVar[str | None] = None

    def test_worked_example(self) -> None:
        batch = Batch(
            torch.tensor([1.0, 0.5]),
            torch.tensor([1.0, 0.0]),
            {"group": torch.tensor([0, 0]), "length": torch.tensor([4, 2])},
        )
        result = evaluate(DrGRPO(max_length=8), batch)
        # advantages 1/2 and -1/2, sums over tokens 4 * 1 and 2 * 0.5, over 8, mean over 2
        assert result.loss.item() == pytest.approx(-(0.5 * 4 * 1 - 0.5 * 2 * 0.5) / 8 / 2)


class TestDAPO(TestGRPO):
    objective_class: ClassVar[type[Objective]] = DAPO
    kind: ClassVar[str] = "dapo"
    valid_only: ClassVar[bool] = True

    def test_worked_example(self) -> None:
        batch = Batch(
            torch.tensor([1.0, 0.5, 9.0]),
            torch.tensor([1.0, 0.0, 1.0]),
            {"group": torch.tensor([0, 0, 1]), "length": torch.tensor([6, 2, 5])},
        )
        result = evaluate(DAPO(), batch)
        assert result.loss.item() == pytest.approx(-(6 * 1.0 * 1 - 2 * 0.5 * 1) / (6 + 2))


def test_the_scores_times_the_advantage_are_the_clipped_objective_of_every_token() -> None:
    generator = torch.Generator().manual_seed(0)
    log_probs = torch.randn(6, 5, generator=generator, dtype=F64)
    old = torch.randn(6, 5, generator=generator, dtype=F64)
    mask = torch.arange(5) < torch.tensor([5, 3, 1, 4, 2, 5])[:, None]
    rewards = torch.tensor([1.0, 0.0, 0.0, 1.0, 1.0, 0.0])
    objective = GRPO(clip_low=0.2, clip_high=0.28)
    scores = objective.row_scores(log_probs, mask, old, rewards)["scores"]
    for row in range(6):
        advantage = 0.7 if rewards[row] == 1 else -1.3
        terms = [
            reference.token_term(
                math.exp(log_probs[row, t] - old[row, t]), advantage, low=0.2, high=0.28
            )
            for t in range(5)
            if mask[row, t]
        ]
        assert advantage * scores[row].item() == pytest.approx(sum(terms) / len(terms), rel=1e-12)


@pytest.mark.parametrize("right", range(1, 8))
def test_the_difficulty_weight_is_the_one_of_proposition_6_1(right: int) -> None:
    generator = torch.Generator().manual_seed(right)
    scores = torch.randn(8, generator=generator, dtype=F64)
    rewards = (torch.arange(8) < right).to(F64)
    group, length = torch.zeros(8, dtype=torch.long), torch.ones(8)
    gap = (scores[:right].mean() - scores[right:].mean()).item()
    p = right / 8

    def value(objective: Objective) -> float:
        return -objective(scores, rewards, group=group, length=length).loss.item()

    assert value(GRPO()) == pytest.approx(math.sqrt(p * (1 - p)) * gap, abs=1e-12)
    sample = math.sqrt(7 / 8) * math.sqrt(p * (1 - p)) * gap
    assert value(GRPO(std="sample")) == pytest.approx(sample, abs=1e-12)
    assert value(DrGRPO(max_length=1)) == pytest.approx(p * (1 - p) * gap, abs=1e-12)


def test_the_kl_is_measured_and_not_optimised() -> None:
    batch = DisCOContract().batches(1)[0]
    result = evaluate(GRPO(), batch)
    tokens = batch.groups["length"].sum()
    assert result.metrics["kl/k3"].item() == pytest.approx(
        (batch.groups["kl"].sum() / tokens).item()
    )
    assert not result.gradients["kl"].any()


def test_valid_leaves_out_the_questions_without_a_signal() -> None:
    batch = DisCOContract().batches(1)[0]  # two of four questions are mixed
    want = 2 * evaluate(GRPO(), batch).loss
    torch.testing.assert_close(evaluate(GRPO(normalizer="valid"), batch).loss, want)


@pytest.mark.parametrize("objective", [DrGRPO(max_length=4), DAPO()])
def test_a_missing_length_is_refused_with_the_way_out(objective: Objective) -> None:
    with pytest.raises(ValueError, match=r"weighs tokens and got no length; pass length="):
        objective(torch.zeros(2), torch.zeros(2), group=torch.zeros(2, dtype=torch.long))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: GRPO(clip_low=-0.1), "clip ranges must not be negative, got -0.1 and 0.2"),
        (lambda: GRPO(std="none"), 'std must be "population" or "sample", got \'none\''),
        (lambda: GRPO(normalizer="x"), 'normalizer must be "valid" or "all", got \'x\''),
        (lambda: DrGRPO(max_length=0), "max_length must be positive, got 0"),
    ],
)
def test_bad_settings_are_refused(build: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()
