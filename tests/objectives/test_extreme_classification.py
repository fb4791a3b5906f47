"""ExtremeClassification (SCENT, Algorithm 26) and SOX, BSGD, ASGD and U-max on it."""

import itertools
import math
from dataclasses import replace
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from llm_xrisk.objectives import Objective
from llm_xrisk.objectives.extreme_classification import ExtremeClassification
from tests.contract import Batch, ObjectiveContract, evaluate
from tests.reference import extreme_classification as reference

F64 = torch.float64
CLASSES = 20
METHODS = ("scent", "sox", "bsgd", "asgd", "umax")


def logits(generator: torch.Generator, rows: int = 6, columns: int = CLASSES) -> Tensor:
    return torch.randn(rows, columns, generator=generator, dtype=F64)


class TestExtremeClassification(ObjectiveContract):
    """SCENT; gamma = 1 is an alpha so large that nothing of the past is left."""

    objective_class: ClassVar[type[Objective]] = ExtremeClassification
    options: ClassVar[dict[str, Any]] = {"num_classes": CLASSES, "method": "scent"}
    alpha: ClassVar[dict[str, float]] = {"log_alpha": 1.5}

    def build(self, **overrides: Any) -> Objective:
        gamma = overrides.pop("gamma", 0.3)
        return super().build(**overrides | {"log_alpha": 900.0 if gamma == 1 else 1.5})

    def make_batch(self, generator: torch.Generator) -> Batch:
        """Seven rows of five samples, with four other classes each, weighted unevenly."""
        samples = torch.randperm(12, generator=generator)[:5]
        index = samples[torch.tensor([0, 1, 2, 3, 4, 1, 0])]
        scores = logits(generator, 7, 5)
        targets = torch.randint(5, (7,), generator=generator)
        weight = 0.1 + 0.3 * torch.rand(7, 5, generator=generator, dtype=F64)
        return Batch(scores, targets, {"index": index, "weight": weight})

    def reference(
        self, batch: Batch, u: dict[int, Any], gamma: float
    ) -> tuple[float, dict[str, Any]]:
        loss, gradient = reference.step(
            batch.scores.tolist(),
            batch.targets.tolist(),
            batch.groups["index"].tolist(),
            batch.groups["weight"].tolist(),
            u,
            num_classes=CLASSES,
            method=self.options["method"],
            **{"gamma": gamma, "delta": 0.5} | self.alpha,
        )
        return loss, {"scores": gradient}

    def tracked(self, objective: Objective) -> dict[int, Any]:
        inner = objective.inner
        return {i: float(inner.u[i]) for i in inner.visited.nonzero().flatten().tolist()}

    def degenerate(self, batch: Batch) -> list[Batch]:
        """No class but the own one: no other column, or none with a weight."""
        alone = batch.rows(torch.arange(len(batch.targets)))
        alone = replace(alone, scores=batch.scores[:, :1], targets=torch.zeros_like(batch.targets))
        alone = replace(alone, groups=batch.groups | {"weight": batch.groups["weight"][:, :1]})
        nothing = batch.groups | {"weight": torch.zeros_like(batch.groups["weight"])}
        return [alone, replace(batch, groups=nothing)]

    def test_worked_example(self) -> None:
        objective = ExtremeClassification(num_samples=1, num_classes=3, log_alpha=math.log(0.5))
        own, index = torch.tensor([0]), torch.tensor([0])
        first = evaluate(objective, Batch(torch.zeros(1, 3), own, {"index": index}))
        assert first.loss.item() == pytest.approx(0.0)  # g = (1 + 1 + 1) / 3, nu = 0
        far = torch.tensor([[0.0, math.log(4), math.log(4)]])
        second = evaluate(objective, Batch(far, own, {"index": index}))
        # g = (1 + 4 + 4) / 3 = 3; line 6: nu = 0 + log(1 + 0.5 * 3) - log(1 + 0.5 * e^0)
        nu = math.log(2.5) - math.log(1.5)
        assert second.loss.item() == pytest.approx(nu)
        p = 4 / 3 / math.exp(nu)  # line 8: exp(R) / K / e^nu
        assert second.gradients["scores"][0].tolist() == pytest.approx([-2 * p, p, p])


class TestSOX(TestExtremeClassification):
    options: ClassVar[dict[str, Any]] = {"num_classes": CLASSES, "method": "sox"}
    alpha: ClassVar[dict[str, float]] = {}

    def build(self, **overrides: Any) -> Objective:
        return ObjectiveContract.build(self, **overrides)

    def test_worked_example(self) -> None:
        objective = ExtremeClassification(1, 3, gamma=0.25, method="sox")
        own, index = torch.tensor([0]), torch.tensor([0])
        evaluate(objective, Batch(torch.zeros(1, 3), own, {"index": index}))
        far = torch.tensor([[0.0, math.log(4), math.log(4)]])
        result = evaluate(objective, Batch(far, own, {"index": index}))
        assert result.loss.item() == pytest.approx(math.log(0.75 * 1 + 0.25 * 3))


class TestASGD(TestSOX):
    options: ClassVar[dict[str, Any]] = {
        "num_classes": CLASSES,
        "method": "asgd",
        "log_alpha": math.log(0.4),
    }
    alpha: ClassVar[dict[str, float]] = {"log_alpha": math.log(0.4)}

    def test_gamma_one_is_the_minibatch_loss(self) -> None:
        """It has no gamma: what it shares with the others is the first visit."""
        for batch in self.batches(2):
            got, want = evaluate(self.build(), batch), evaluate(TestBSGD().build(), batch)
            torch.testing.assert_close(got.loss, want.loss, rtol=1e-12, atol=1e-12)
            torch.testing.assert_close(got.gradients["scores"], want.gradients["scores"])

    def test_worked_example(self) -> None:
        objective = ExtremeClassification(1, 3, method="asgd", log_alpha=math.log(0.1))
        own, index = torch.tensor([0]), torch.tensor([0])
        far = Batch(torch.tensor([[0.0, math.log(4), math.log(4)]]), own, {"index": index})
        evaluate(objective, Batch(torch.zeros(1, 3), own, {"index": index}))
        result = evaluate(objective, far)
        assert result.gradients["scores"][0].tolist() == pytest.approx([-8 / 3, 4 / 3, 4 / 3])
        assert evaluate(objective, far).loss.item() == pytest.approx(0 - 0.1 * (1 - 3 / 1))


class TestUMax(TestASGD):
    options: ClassVar[dict[str, Any]] = {
        "num_classes": CLASSES,
        "method": "umax",
        "log_alpha": math.log(0.4),
        "delta": 0.5,
    }

    def test_worked_example(self) -> None:
        objective = ExtremeClassification(1, 3, method="umax", delta=0.5)
        own, index = torch.tensor([0]), torch.tensor([0])
        evaluate(objective, Batch(torch.zeros(1, 3), own, {"index": index}))
        far = torch.tensor([[0.0, math.log(4), math.log(4)]])
        result = evaluate(objective, Batch(far, own, {"index": index}))
        assert result.loss.item() == pytest.approx(math.log(3))  # 0 < log 3 - 0.5: set to log 3


class TestBSGD(TestSOX):
    options: ClassVar[dict[str, Any]] = {"num_classes": CLASSES, "method": "bsgd"}

    def tracked(self, objective: Objective) -> dict[int, Any]:
        return {}

    def test_worked_example(self) -> None:
        objective = ExtremeClassification(1, 5, method="bsgd")
        scores = torch.tensor([[math.log(2), 0.0, math.log(6)]])
        # two of four other classes: g = 1/5 + (4/5) (1/2 + 6/2) / 2
        got = objective(scores, torch.tensor([0])).loss
        assert got.item() == pytest.approx(math.log(0.2 + 0.8 * 3.5 / 2))


@pytest.mark.parametrize("method", METHODS)
def test_all_classes_give_the_cross_entropy_minus_log_k(method: str) -> None:
    """Value and gradient; the first visit for every method, and every visit for gamma = 1."""
    generator = torch.Generator().manual_seed(0)
    objective = ExtremeClassification(6, CLASSES, method=method, state_dtype=F64)
    always = ExtremeClassification(6, CLASSES, gamma=1.0, method="sox", state_dtype=F64)
    own = torch.randint(CLASSES, (6,), generator=generator)
    for visit in range(3):
        batch = Batch(3 * logits(generator), own, {"index": torch.arange(6)})
        scores = batch.scores.clone().requires_grad_()
        entropy = F.cross_entropy(scores, own)
        (gradient,) = torch.autograd.grad(entropy, scores)
        for each in (always, objective)[: 2 if visit == 0 else 1]:
            got = evaluate(each, batch)
            torch.testing.assert_close(
                got.loss, entropy.detach() - math.log(CLASSES), rtol=1e-12, atol=1e-12
            )
            torch.testing.assert_close(got.gradients["scores"], gradient, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("method", METHODS)
def test_with_frozen_scores_of_all_classes_every_visit_is_exact(method: str) -> None:
    generator = torch.Generator().manual_seed(1)
    objective = ExtremeClassification(6, CLASSES, gamma=0.2, method=method, state_dtype=F64)
    groups = {"index": torch.arange(6)}
    batch = Batch(logits(generator), torch.randint(CLASSES, (6,), generator=generator), groups)
    first = evaluate(objective, batch)
    for _ in range(3):
        again = evaluate(objective, batch)
        torch.testing.assert_close(again.loss, first.loss, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(again.gradients, first.gradients, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("method", ["asgd", "umax"])
def test_given_nu_the_gradient_is_unbiased_over_all_samples_of_classes(method: str) -> None:
    """Mean over all 3-subsets of the other classes = gradient of g e^-nu, at the old nu."""
    generator = torch.Generator().manual_seed(2)
    start = Batch(logits(generator, 1, 7), torch.tensor([0]), {"index": torch.tensor([0])})
    scores = 0.2 * logits(generator, 1, 7)
    subsets = [[0, *chosen] for chosen in itertools.combinations(range(1, 7), 3)]
    mean = torch.zeros(7, dtype=F64)
    for columns in subsets:
        objective = ExtremeClassification(1, 7, method=method, delta=9.0, state_dtype=F64)
        nu = evaluate(objective, start).loss
        batch = replace(start, scores=scores[:, columns])
        mean[columns] += evaluate(objective, batch).gradients["scores"][0] / len(subsets)
    shifted = scores.clone().requires_grad_()
    dual = (shifted - shifted[:, :1]).exp().mean() * torch.exp(-nu)
    torch.testing.assert_close(mean, torch.autograd.grad(dual, shifted)[0][0], rtol=1e-10, atol=0)


@pytest.mark.parametrize("log_alpha", [-2.0, 0.0, 3.0])
def test_scent_solves_the_proximal_problem_of_line_6(log_alpha: float) -> None:
    """Golden-section search on g e^-nu + nu + D(nu, old) / alpha, with phi = e^-nu."""
    old, scores = 0.7, torch.tensor([[0.0, 1.5, -2.0, 3.0]], dtype=F64)
    g, alpha = float(scores.exp().mean()), math.exp(log_alpha)

    def problem(nu: float) -> float:
        bregman = math.exp(-nu) - math.exp(-old) + math.exp(-old) * (nu - old)
        return g * math.exp(-nu) + nu + bregman / alpha

    low, high, ratio = -10.0, 10.0, (math.sqrt(5) - 1) / 2
    for _ in range(80):
        left, right = high - ratio * (high - low), low + ratio * (high - low)
        low, high = (low, right) if problem(left) < problem(right) else (left, high)
    objective = ExtremeClassification(1, 4, log_alpha=log_alpha, state_dtype=F64)
    objective.inner.u.fill_(old)
    objective.inner.visited.fill_(True)
    loss = objective(scores, torch.tensor([0]), index=torch.tensor([0])).loss
    assert float(loss) == pytest.approx(low, abs=1e-6)


def test_sox_is_scent_with_the_alpha_of_its_gamma() -> None:
    """alpha = gamma / (1 - gamma) e^-nu: with multiplier 0, log alpha = logit gamma."""
    generator = torch.Generator().manual_seed(3)
    settings = {"method": "scent", "log_alpha": math.log(0.3 / 0.7), "multiplier": 0.0}
    one = ExtremeClassification(4, CLASSES, **settings, state_dtype=F64)
    other = ExtremeClassification(4, CLASSES, gamma=0.3, method="sox", state_dtype=F64)
    for _ in range(4):
        batch = Batch(logits(generator, 4), torch.arange(4), {"index": torch.arange(4)})
        got, want = evaluate(one, batch), evaluate(other, batch)
        torch.testing.assert_close(got.loss, want.loss, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(got.gradients, want.gradients, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("method", ["scent", "sox", "bsgd", "umax"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_shifted_logits_up_to_500_have_the_gradient_of_float64(
    method: str, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(4)
    own = torch.zeros(8, dtype=torch.long)
    tolerance = {torch.float32: 1e-3, torch.bfloat16: 5e-3, torch.float16: 1e-3}[dtype]
    for size in (500.0, 300.0, 89.0, 1.0):
        got_by = ExtremeClassification(8, CLASSES, method=method)
        want_by = ExtremeClassification(8, CLASSES, method=method, state_dtype=F64)
        start = logits(generator, 8).clamp(-2, 2) * size / 4
        for visit in range(3):
            scores = (start + 0.3 * visit * logits(generator, 8)).to(dtype)
            scores[:, 0] = -size / 2  # the own class: shifted logits from 0 to the size
            batch = Batch(scores, own, {"index": torch.arange(8)})
            got, want = evaluate(got_by, batch), evaluate(want_by, batch.to(F64))
            gradient, wide = got.gradients["scores"].to(F64), want.gradients["scores"]
            assert got.loss.item() == pytest.approx(want.loss.item(), rel=1e-5, abs=1e-5)
            assert (gradient - wide).norm() < tolerance * wide.norm()
            assert wide.norm() > 0.05  # there is one: where exp overflows there is none
        if method != "bsgd":
            error = (got_by.inner.u.to(F64) - want_by.inner.u).abs()
            assert error.max() < 1e-6 * max(size, 10)


def test_a_class_told_apart_by_60_keeps_its_gradient() -> None:
    """The own class's is the others' sum: 1 - share would round to 0."""
    scores = torch.tensor([[60.0, 0.0, -1.0]])
    objective = ExtremeClassification(1, 3)
    got = evaluate(objective, Batch(scores, torch.tensor([0]), {"index": torch.tensor([0])}))
    want = [-(math.exp(-60) + math.exp(-61)), math.exp(-60), math.exp(-61)]
    assert got.gradients["scores"][0].tolist() == pytest.approx(want, rel=1e-5, abs=0)


def test_asgd_ends_a_runaway_sample_at_finite_numbers() -> None:
    """An inner value e^500 times the old one: its weight ends at e^10, and the metric shows it."""
    objective = ExtremeClassification(1, 3, method="asgd")
    groups = {"index": torch.tensor([0])}
    for far in (0.0, 500.0, 0.0, 500.0):
        scores = torch.tensor([[0.0, far, far]])
        result = evaluate(objective, Batch(scores, torch.tensor([0]), groups))
        finite = [result.loss, result.gradients["scores"], objective.inner.u]
        assert all(value.isfinite().all() for value in finite)
        if far:
            runaway = result.metrics["classes/weight"]
            assert runaway.isfinite()
    assert objective.inner.u.item() > 1e3  # a sample without gradient for very long: documented


def test_a_column_of_weight_zero_is_left_out() -> None:
    generator = torch.Generator().manual_seed(5)
    scores, own = logits(generator, 4, 5), torch.tensor([0, 1, 2, 0])
    kept = torch.tensor([0.2, 0.3, 0.1, 0.0, 0.0], dtype=F64)
    objective = ExtremeClassification(4, CLASSES, method="bsgd")
    whole = objective(scores, own, weight=kept).loss
    part = objective(scores[:, :3], own, weight=kept[:3]).loss
    rows = objective(scores, own, weight=kept.expand(4, 5)).loss
    torch.testing.assert_close(whole, part, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(whole, rows, rtol=1e-12, atol=1e-12)


def test_moving_averages_come_nearer_the_optimum_than_the_minibatch() -> None:
    """A linear classifier on two of 29 other classes a step, against the exact objective's fit."""
    gaps = {method: fitted(method) for method in ("bsgd", "sox", "scent")}
    assert gaps["sox"] < gaps["bsgd"] / 5, gaps
    assert gaps["scent"] < gaps["bsgd"] / 5, gaps


def toy() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(6)
    features = torch.randn(12, 4, generator=generator, dtype=F64)
    own = torch.randint(30, (12,), generator=generator)
    return features, own, 0.5 * torch.randn(30, 4, generator=generator, dtype=F64)


def regularised(features: Tensor, own: Tensor, weights: Tensor) -> Tensor:
    return F.cross_entropy(features @ weights.T, own) + 0.05 * weights.square().sum()


def fitted(method: str) -> float:
    """Gap of the averaged iterate to the optimum."""
    features, own, start = toy()
    best = start.clone().requires_grad_()
    solver = torch.optim.LBFGS([best], max_iter=300, tolerance_change=1e-14)

    def closure() -> Tensor:
        solver.zero_grad()
        loss = regularised(features, own, best)
        loss.backward()
        return loss

    solver.step(closure)
    generator = torch.Generator().manual_seed(7)
    objective = ExtremeClassification(
        12, 30, gamma=0.05, method=method, log_alpha=-2.0, state_dtype=F64
    )
    weights, mean, steps = start.clone().requires_grad_(), torch.zeros_like(start), 1500
    for step in range(steps):
        index = torch.randperm(12, generator=generator)[:4]
        others = torch.rand(4, 30, generator=generator).scatter(1, own[index, None], 2.0)
        columns = others.topk(3).indices  # the own class first, then two others at random
        scores = (features[index] @ weights.T).gather(1, columns)
        output = objective(scores, torch.zeros(4, dtype=torch.long), index=index)
        loss = output.loss + 0.05 * weights.square().sum()
        (gradient,) = torch.autograd.grad(loss, weights)
        with torch.no_grad():
            weights -= 0.3 / (1 + step / 200) ** 0.75 * gradient
            mean += weights * (step >= steps // 2) / (steps - steps // 2)
    with torch.no_grad():
        return float(regularised(features, own, mean) - regularised(features, own, best))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "softmax"}, r"method must be one of scent, sox.*got 'softmax'"),
        ({"num_classes": 1}, r"need num_classes >= 2 and delta >= 0, got 1 and"),
        ({"delta": -1.0}, r"need num_classes >= 2 and delta >= 0, got 5 and -1.0"),
        ({"method": "sox", "gamma": 0.0}, r"gamma must be in \(0, 1\], got 0.0"),
    ],
)
def test_bad_settings_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ExtremeClassification(**{"num_samples": 3, "num_classes": 5} | options)


def test_shapes_that_do_not_fit_are_refused_by_name() -> None:
    objective, index = ExtremeClassification(3, 5), torch.tensor([0, 1])
    own = torch.tensor([0, 1])
    with pytest.raises(ValueError, match=r"got scores \(2,\), .* needs scores \(rows, m\)"):
        objective(torch.zeros(2), own, index=index)
    with pytest.raises(ValueError, match=r"weight \(3,\)"):
        objective(torch.zeros(2, 4), own, index=index, weight=torch.ones(3))


def test_class_numbers_in_the_place_of_columns_are_refused() -> None:
    objective = ExtremeClassification(3, 500)
    with pytest.raises(IndexError, match=r"target 400 is no column of scores \(2, 4\); pass the"):
        objective(torch.zeros(2, 4), torch.tensor([1, 400]), index=torch.tensor([0, 1]))
