"""GlobalCLIP with a reference model: DRRho-CLIP, (6.121)."""

import math
from dataclasses import replace
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F

from llm_xrisk.objectives import GlobalCLIP, GlobalTemperature, Objective
from llm_xrisk.objectives.similarities import contrast_pairs
from tests.contract import Batch, assert_same, evaluate, exact_loss, state
from tests.objectives.test_clip import TestGlobalCLIP as CLIPContract
from tests.objectives.test_clip import embedded
from tests.reference import clip as reference

F64 = torch.float64


class TestGlobalCLIPWithAReference(CLIPContract):
    options: ClassVar[dict[str, Any]] = {"tau": 0.5, "eps": 0.3, "use_reference": True}

    def make_batch(self, generator: torch.Generator) -> Batch:
        """The reference's features have a width of their own."""
        batch = super().make_batch(generator)
        known = torch.randn(2, len(batch.scores), 4, generator=generator, dtype=F64)
        groups = batch.groups | {"ref_scores": known[0], "ref_targets": known[1]}
        return replace(batch, groups=groups)

    def reference(
        self, batch: Batch, u: dict[Any, Any], gamma: float
    ) -> tuple[float, dict[str, Any]]:
        sides = tuple({i: u[i][side] for i in u} for side in (0, 1))
        loss, first, second, _ = reference.step(
            batch.scores.tolist(),
            batch.targets.tolist(),
            batch.groups["index"].tolist(),
            sides,
            gamma=gamma,
            tau=[[0.5] * len(batch.scores)] * 2,
            eps=0.3,
            reference=(batch.groups["ref_scores"].tolist(), batch.groups["ref_targets"].tolist()),
        )
        u.update({i: [sides[0][i], sides[1][i]] for i in sides[0]})
        return loss, {"scores": first, "targets": second}

    def test_worked_example(self) -> None:
        eye = torch.eye(2)
        batch = Batch(
            torch.tensor([[2.0, 0.0], [0.0, 1.0]]),
            torch.tensor([[3.0, 0.0], [1.0, 0.0]]),
            {"index": torch.tensor([0, 1]), "ref_scores": 2 * eye, "ref_targets": eye},
            leaves=("scores", "targets"),
        )
        # images e1, e2, texts e1, e1; the reference tells all apart: its l are 0 - 1. Image 0 has
        # l = 1 - 1, image 1 l = 0 - 0, text 0 l = 0 - 1, text 1 l = 1 - 0, and each 1 more than
        # that; with one negative tau log g = l
        result = evaluate(GlobalCLIP(2, tau=0.5, use_reference=True), batch)
        assert result.loss.item() == pytest.approx((1 + 1 + 0 + 2) / 2)
        assert result.metrics["similarity/reference"].item() == 1.0
        assert result.metrics["similarity/positive"].item() == 0.5


def pairs(count: int = 8) -> Batch:
    generator = torch.Generator().manual_seed(0)
    images, texts = embedded(count, generator)
    known = embedded(count, generator, width=5)
    groups = {"index": torch.arange(count), "ref_scores": known[0], "ref_targets": known[1]}
    return Batch(images, texts, groups, leaves=("scores", "targets"))


def referring(batch: Batch, first: torch.Tensor, second: torch.Tensor) -> Batch:
    return replace(batch, groups=batch.groups | {"ref_scores": first, "ref_targets": second})


def plain(batch: Batch) -> Batch:
    return replace(batch, groups={"index": batch.groups["index"]})


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_a_reference_without_features_is_plain_clip_bit_for_bit(dtype: torch.dtype) -> None:
    one = GlobalCLIP(8, 0.3, GlobalTemperature(0.1, 1.0), use_reference=True)
    other = GlobalCLIP(8, 0.3, GlobalTemperature(0.1, 1.0))
    for _ in range(3):
        batch = pairs().to(dtype)
        nothing = torch.zeros(8, 3, dtype=dtype)
        got = evaluate(one, referring(batch, nothing, nothing))
        want = evaluate(other, plain(batch))
        assert torch.equal(got.loss, want.loss)
        assert_same(got.gradients, want.gradients)
        assert_same(got.parameters, want.parameters)
    assert_same(state(one), state(other))


def test_a_reference_that_cannot_tell_is_plain_clip() -> None:
    batch = pairs()
    same = torch.ones(8, 3, dtype=F64)
    options = {"tau": 0.1, "state_dtype": F64}
    got = evaluate(GlobalCLIP(8, use_reference=True, **options), referring(batch, same, same))
    want = evaluate(GlobalCLIP(8, **options), plain(batch))
    torch.testing.assert_close(got.loss, want.loss, rtol=1e-12, atol=1e-12)
    assert_same(got.gradients, want.gradients, 1e-12)


def test_a_reference_that_is_the_model_weighs_all_negatives_alike() -> None:
    batch = pairs()
    objective = GlobalCLIP(8, tau=0.01, use_reference=True, state_dtype=F64)
    result = evaluate(objective, referring(batch, batch.scores, batch.targets))
    assert result.loss.item() == pytest.approx(0.0, abs=1e-12)
    assert result.metrics["negatives/effective_fraction"].item() == pytest.approx(1.0)
    copies = batch.copy()
    s = F.normalize(copies.scores, dim=-1) @ F.normalize(copies.targets, dim=-1).T
    others = (s.sum() - s.trace()) / (8 * 7)
    want = torch.autograd.grad(2 * (others - s.trace() / 8), [copies.scores, copies.targets])
    assert_same(result.gradients, dict(zip(batch.leaves, want, strict=True)), 1e-12)


def test_a_constant_added_to_the_similarities_of_the_reference_changes_nothing() -> None:
    batch = pairs()
    first, second = F.normalize(batch.scores, dim=-1), F.normalize(batch.targets, dim=-1)
    known = batch.groups["ref_scores"], batch.groups["ref_targets"]
    shifted = tuple(torch.cat([side, torch.full((8, 1), 1.7, dtype=F64)], 1) for side in known)
    tau, ids = torch.full((8, 2), 0.1, dtype=F64), torch.arange(8)
    got, want = (
        contrast_pairs(first, second, ids, tau, learned=True, reference=r).relative(tau)
        for r in (shifted, known)
    )
    torch.testing.assert_close(got.log_g, want.log_g, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(got.energy, want.energy, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(got.fraction, want.fraction, rtol=1e-12, atol=1e-12)


def test_with_gamma_one_it_has_the_gradient_of_the_formula_in_features_and_tau() -> None:
    batch, copies = pairs(), pairs().copy()
    module = GlobalTemperature(0.2, rho=0.7, state_dtype=F64)
    objective = GlobalCLIP(8, 1.0, module, use_reference=True, state_dtype=F64)
    result = evaluate(objective, batch)
    tau = torch.exp(-module.logit_scale)
    s = F.normalize(copies.scores, dim=-1) @ F.normalize(copies.targets, dim=-1).T
    r = F.normalize(batch.groups["ref_scores"], dim=-1)
    r = r @ F.normalize(batch.groups["ref_targets"], dim=-1).T
    total = torch.zeros((), dtype=F64)
    for own, known in ((s, r), (s.T, r.T)):
        gap = (own - own.diagonal()[:, None]) - (known - known.diagonal()[:, None])
        exponent = (gap / tau).masked_fill(torch.eye(8, dtype=torch.bool), -math.inf)
        total = total + (tau * (exponent.logsumexp(-1) - math.log(7) + 0.7)).mean()
    torch.testing.assert_close(result.loss, total.detach(), rtol=1e-12, atol=1e-12)
    leaves = [copies.scores, copies.targets, module.logit_scale]
    want = torch.autograd.grad(total, leaves)
    got = [*result.gradients.values(), *result.parameters.values()]
    for mine, exact in zip(got, want, strict=True):
        torch.testing.assert_close(mine, exact, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(exact_loss(objective, batch), total, rtol=1e-12, atol=1e-12)


def test_a_reference_gets_no_gradient() -> None:
    batch = pairs()
    known = [batch.groups[name].requires_grad_() for name in ("ref_scores", "ref_targets")]
    copies = batch.copy()
    tensors = copies.tensors() | {"ref_scores": known[0], "ref_targets": known[1]}
    GlobalCLIP(8, tau=0.1, use_reference=True)(**tensors).loss.backward()
    assert copies.scores.grad is not None
    assert all(side.grad is None for side in known)


def test_it_takes_no_matrix_more_than_plain_clip() -> None:
    """The largest number of B x B matrices at a time, by the profiler's record of memory."""
    size, width = 256, 8
    features = torch.randn(4, size, width, generator=torch.Generator().manual_seed(0))
    peaks = []
    for known in ({}, {"ref_scores": features[2], "ref_targets": features[3]}):
        objective = GlobalCLIP(size, tau=0.1, use_reference=bool(known))
        leaf = features[0].clone().requires_grad_()
        with torch.profiler.profile(profile_memory=True) as profile:
            objective(leaf, features[1], index=torch.arange(size), **known).loss.backward()
        held = peak = 0
        for event in profile.profiler.kineto_results.events():
            if event.name() == "[memory]":
                held += event.nbytes()
                peak = max(peak, held)
        peaks.append(peak)
    matrix = size * size * 4
    assert peaks[0] > 3 * matrix, "the profiler should have seen the matrices"
    assert peaks[1] - peaks[0] < matrix


def test_evaluation_may_leave_the_reference_out() -> None:
    batch = pairs()
    objective = GlobalCLIP(8, tau=0.1, use_reference=True, state_dtype=F64)
    want = GlobalCLIP(8, tau=0.1, state_dtype=F64).exact(**plain(batch).tensors())
    assert torch.equal(objective.exact(**plain(batch).tensors()), want)
    torch.testing.assert_close(evaluate(objective.eval(), plain(batch)).loss, want)


@pytest.mark.parametrize(
    ("use", "names", "message"),
    [
        (True, (), "use_reference=True needs ref_scores and ref_targets, got neither; compute"),
        (True, ("ref_scores",), "needs ref_scores and ref_targets, got ref_scores; compute"),
        (False, ("ref_scores", "ref_targets"), "was built to do without; build it with use_refer"),
    ],
)
def test_a_reference_that_is_missing_or_not_asked_for_is_refused(
    use: bool, names: tuple[str, ...], message: str
) -> None:
    batch = pairs()
    groups = {name: batch.groups[name] for name in ("index", *names)}
    objective: Objective = GlobalCLIP(8, use_reference=use)
    with pytest.raises(ValueError, match=message):
        objective(**replace(batch, groups=groups).tensors())


def test_features_of_the_reference_that_do_not_fit_are_refused_by_name() -> None:
    batch = pairs()
    narrow = referring(batch, batch.groups["ref_scores"], batch.groups["ref_targets"][:, :3])
    with pytest.raises(ValueError, match=r"ref_targets \(8, 3\) .*ref_targets \(rows, 5\)"):
        GlobalCLIP(8, use_reference=True)(**narrow.tensors())
    short = referring(batch, batch.groups["ref_scores"][1:], batch.groups["ref_targets"])
    with pytest.raises(ValueError, match=r"ref_scores \(7, 5\)"):
        GlobalCLIP(8, use_reference=True)(**short.tensors())
