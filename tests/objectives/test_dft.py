"""DFT and DFT2 (Algorithm 36)."""

import math
from dataclasses import replace
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from llm_xrisk.objectives import DFT, DFT2, Objective
from tests.contract import Batch, ObjectiveContract, evaluate
from tests.gloo import GlooPool
from tests.reference import dft as reference

F64 = torch.float64


class TestDFT(ObjectiveContract):
    objective_class: ClassVar[type[Objective]] = DFT
    weighted = True

    def make_batch(self, generator: torch.Generator) -> Batch:
        """Five prompts of 12 with one, two or three negatives, one of them without; shuffled."""
        prompts = torch.randperm(self.num_samples, generator=generator)[:5]
        index = prompts[torch.tensor([0, 0, 1, 1, 1, 2, 2, 2, 2, 3, 4, 4, 0, 0])]
        targets = torch.tensor([1, 0, 1, 0, 0, 1, 0, 0, 0, 1, 1, 0, 1, 0])  # prompt 0 stands twice
        scores = torch.randn(14, generator=generator, dtype=F64) - 2
        ref = torch.randn(14, generator=generator, dtype=F64) - 2
        order = torch.randperm(14, generator=generator)
        groups = {"index": index} | ({"ref_log_likelihood": ref} if self.weighted else {})
        return Batch(scores, targets, groups).rows(order)

    def reference(
        self, batch: Batch, u: dict[int, Any], gamma: float
    ) -> tuple[float, dict[str, Any]]:
        ref = batch.groups.get("ref_log_likelihood", torch.zeros_like(batch.scores))
        loss, gradient = reference.step(
            batch.scores.tolist(),
            batch.targets.bool().tolist(),
            batch.groups["index"].tolist(),
            ref.tolist(),
            u,
            gamma=gamma,
            tau=1.0 if self.weighted else 0.3,
        )
        return loss, {"scores": gradient}

    def tracked(self, objective: Objective) -> dict[int, Any]:
        inner = objective.inner
        return {i: math.exp(inner.u[i]) for i in inner.visited.nonzero().flatten().tolist()}

    def test_worked_example(self) -> None:
        objective = DFT(num_samples=9, gamma=0.5, tau=1.0)
        scores = torch.tensor([-2.0, -1.0, -3.0])
        batch = Batch(
            scores,
            torch.tensor([1, 0, 0]),
            {
                "index": torch.tensor([4, 4, 4]),
                "ref_log_likelihood": torch.tensor([0.0, -2.0, -2.0]),
            },
        )
        g = (math.exp(-1 + 2) + math.exp(-3 + 2)) / 2
        u = 0.5 * 1 + 0.5 * g  # u_0 = 1
        result = evaluate(objective, batch)
        assert result.loss.item() == pytest.approx(2 + math.log(u), rel=1e-6)
        weights = [math.exp(-1 + 2) / (2 * u), math.exp(-3 + 2) / (2 * u)]
        assert result.gradients["scores"].tolist() == pytest.approx([-1.0, *weights], rel=1e-6)

    @pytest.mark.dist
    def test_four_processes_are_one(self, gloo_pool: GlooPool) -> None:
        self.assert_ranks_equal_one_process(gloo_pool, (0.25, 0.1, 0.4, 0.25))


class TestDFT2(TestDFT):
    objective_class: ClassVar[type[Objective]] = DFT2
    weighted = False

    def test_worked_example(self) -> None:
        objective = DFT2(num_samples=1, gamma=0.9, tau=0.5)
        batch = Batch(
            torch.tensor([-1.0, -0.5, -1.5]),
            torch.tensor([1, 0, 0]),
            {"index": torch.tensor([0, 0, 0])},
        )
        g = (math.exp(-0.5 / 0.5) + math.exp(-1.5 / 0.5)) / 2
        u = 0.1 * 1 + 0.9 * g
        result = evaluate(objective, batch)
        assert result.loss.item() == pytest.approx(1 + 0.5 * math.log(u), rel=1e-6)
        weights = [math.exp(-1) / (2 * u), math.exp(-3) / (2 * u)]
        assert result.gradients["scores"].tolist() == pytest.approx([-1.0, *weights], rel=1e-6)


def one_prompt(
    scores: list[float], ref: list[float] | None = None, dtype: torch.dtype = F64
) -> Batch:
    """Prompt 3 with its gold answer, of score -1, and negatives with the given scores."""
    rows = len(scores) + 1
    groups = {"index": torch.full((rows,), 3)}
    if ref is not None:
        groups["ref_log_likelihood"] = torch.tensor([0.0, *ref], dtype=dtype)
    values = torch.tensor([-1.0, *scores], dtype=dtype)
    return Batch(values, (torch.arange(rows) == 0).long(), groups)


def negative_weights(objective: Objective, batch: Batch) -> Tensor:
    return evaluate(objective, batch).gradients["scores"][1:]


def build(**options: Any) -> DFT:
    return DFT(num_samples=5, state_dtype=F64, **options)


def build2(**options: Any) -> DFT2:
    return DFT2(num_samples=5, state_dtype=F64, **options)


def test_gamma_one_gradient_is_the_softmax_closed_form() -> None:
    scores, ref, tau = [-1.2, -0.3, -2.5], [-0.7, -1.1, -0.2], 0.8
    gradient = evaluate(build(gamma=1.0, tau=tau), one_prompt(scores, ref)).gradients["scores"]
    exponent = torch.tensor([s / tau - r for s, r in zip(scores, ref, strict=True)], dtype=F64)
    assert gradient[0].item() == -1.0
    torch.testing.assert_close(gradient[1:], exponent.softmax(0), rtol=0, atol=1e-12)


def test_frozen_model_gives_the_geometric_u_and_the_published_weights() -> None:
    objective, g = build(gamma=0.85), math.exp(-3.0)
    for visit, published in ((1, 0.2589), (2, 0.6996), (3, 0.9395)):
        weights = negative_weights(objective, one_prompt([-3.0, -3.0], [0.0, 0.0]))
        u = 0.15**visit + (1 - 0.15**visit) * g
        assert objective.inner.u[3].exp().item() == pytest.approx(u, rel=1e-12)
        assert weights.sum().item() == pytest.approx(g / u, rel=1e-12)
        assert weights.sum().item() == pytest.approx(published, abs=5e-5)


def test_u_is_finite_for_extreme_scores_at_a_small_temperature() -> None:
    objective = DFT(num_samples=5, tau=0.1)
    for score in (-1e5, -10.0, 0.0, -1e5):
        batch = one_prompt([score, score / 2], [-1e4, 0.0], torch.float32)
        result = evaluate(objective, batch)
        assert result.loss.isfinite()
        assert result.gradients["scores"].isfinite().all()
        assert objective.inner.u.isfinite().all()


def test_log_domain_u_is_the_linear_one_where_that_is_representable() -> None:
    objective, u = build2(gamma=0.4, tau=0.1), 1.0
    for scores in ([-3.0, -5.0], [-0.1, -30.0], [0.0, 0.0]):
        evaluate(objective, one_prompt(scores))
        u = 0.6 * u + 0.4 * (math.exp(scores[0] / 0.1) + math.exp(scores[1] / 0.1)) / 2
        assert objective.inner.u[3].exp().item() == pytest.approx(u, rel=1e-12)


@pytest.mark.parametrize("gamma", [1.0, 0.85, 0.1])
def test_at_the_reference_policy_every_negative_weighs_the_same(gamma: float) -> None:
    scores = [-2.0, -7.0, -0.5, -3.0]
    weights = negative_weights(build(gamma=gamma, tau=1.0), one_prompt(scores, scores))
    assert weights.tolist() == pytest.approx([0.25] * 4, rel=1e-12)


def test_dft2_at_a_large_temperature_weighs_uniformly() -> None:
    weights = negative_weights(build2(gamma=1.0, tau=1e9), one_prompt([-1.0, -9.0]))
    assert weights.tolist() == pytest.approx([0.5, 0.5], rel=1e-8)


def test_dft2_at_a_small_temperature_picks_the_most_likely_negative() -> None:
    weights = negative_weights(build2(gamma=1.0, tau=1e-3), one_prompt([-1.0, -1.1, -9.0]))
    assert weights.tolist() == pytest.approx([1.0, 0.0, 0.0], abs=1e-12)


@pytest.mark.parametrize("objective", [build(), build2()])
def test_without_negatives_it_is_supervised_fine_tuning(objective: DFT) -> None:
    batch = Batch(
        torch.tensor([-1.5, -2.5], dtype=F64),
        torch.tensor([1, 1]),
        {"index": torch.tensor([0, 1]), "ref_log_likelihood": torch.zeros(2, dtype=F64)},
    )
    result = evaluate(objective, batch)
    assert result.loss.item() == 2.0
    assert result.gradients["scores"].tolist() == [-0.5, -0.5]
    assert not objective.inner.visited.any()


def test_dft2_cold_start_weight_is_that_of_u_zero_one() -> None:
    batch, g = one_prompt([-1.05, -1.05]), math.exp(-1.05 / 0.3)
    cold = negative_weights(build2(), batch).sum().item()
    assert cold == pytest.approx(g / (0.1 + 0.9 * g), rel=1e-12)
    warm = negative_weights(build2(u_init="first_batch"), batch).sum().item()
    assert warm == pytest.approx(1.0, rel=1e-12)


def test_reported_loss_is_the_objective_at_the_tracked_u() -> None:
    objective = build2(gamma=0.2)
    for scores in ([-1.0, -2.0], [-3.0, -0.5]):
        result = evaluate(objective, one_prompt(scores))
        assert result.loss.item() == pytest.approx(
            1.0 + 0.3 * objective.inner.u[3].item(), abs=1e-12
        )
        assert result.metrics["objective"] == result.loss


def test_never_visited_prompts_stay_at_u_zero_one() -> None:
    objective = build()
    evaluate(objective, one_prompt([-1.0], [-1.0]))
    assert objective.inner.u[[0, 1, 2, 4]].tolist() == [0.0] * 4
    assert objective.inner.visited.tolist() == [False, False, False, True, False]


def test_eight_prompts_at_once_are_eight_accumulated_prompts() -> None:
    generator = torch.Generator().manual_seed(1)
    scores = torch.randn(24, generator=generator, dtype=F64)
    batch = Batch(
        scores,
        torch.tensor([1, 0, 0]).repeat(8),
        {"index": torch.arange(8).repeat_interleave(3)},
    )
    whole = DFT2(num_samples=8, state_dtype=F64)
    parts = DFT2(num_samples=8, state_dtype=F64)
    for _ in range(2):
        want = evaluate(whole, batch).gradients["scores"]
        rows = [slice(3 * k, 3 * k + 3) for k in range(8)]
        got = [evaluate(parts, batch.rows(r)).gradients["scores"] / 8 for r in rows]
        torch.testing.assert_close(torch.cat(got), want, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(parts.inner.u, whole.inner.u, rtol=1e-12, atol=0)


def test_metrics_say_what_they_are_called() -> None:
    batch = one_prompt([-1.0, -3.0])
    metrics = evaluate(build2(gamma=1.0, tau=1.0), batch).metrics
    weights = [math.exp(-1), math.exp(-3)]
    effective = sum(weights) ** 2 / (2 * sum(w * w for w in weights))
    assert metrics["negatives/effective_fraction"].item() == pytest.approx(effective, rel=1e-12)
    assert metrics["negatives/weight"].item() == pytest.approx(1.0, rel=1e-12)
    assert metrics["log_u/mean"].item() == pytest.approx(math.log(sum(weights) / 2), rel=1e-12)
    assert metrics["auc"].item() == 0.5  # -1 > -1 is false, -1 > -3 is true
    assert (metrics["score/gold"].item(), metrics["score/negative"].item()) == (-1.0, -2.0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tau": 0.0}, r"tau must be positive, got 0.0; the authors use"),
        ({"gamma": 1.5}, r"gamma must be in \(0, 1\], got 1.5"),
        ({"gamma": 0.0}, r"gamma must be in \(0, 1\], got 0.0"),
        ({"score": "likelihood_ratio"}, r"score must be .* got 'likelihood_ratio'"),
        ({"u_init": "zero"}, r'u_init must be "one" or "first_batch", got \'zero\''),
    ],
)
def test_bad_settings_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(**options)


def test_missing_reference_likelihoods_are_refused_with_the_way_out() -> None:
    with pytest.raises(ValueError, match=r"got no ref_log_likelihood.*importance_weight=False"):
        evaluate(build(), one_prompt([-1.0]))


def test_the_same_prompt_twice_pools_its_negatives() -> None:
    batch = one_prompt([-1.0, -2.0])
    split = replace(
        batch,
        scores=torch.tensor([-1.0, -1.0, -1.0, -2.0], dtype=F64),
        targets=torch.tensor([1, 0, 1, 0]),
        groups={"index": torch.full((4,), 3)},
    )
    once, twice = build2(), build2()
    want, got = evaluate(once, batch), evaluate(twice, split)
    torch.testing.assert_close(got.loss, want.loss, rtol=1e-12, atol=0)
    torch.testing.assert_close(twice.inner.u, once.inner.u, rtol=1e-12, atol=0)
