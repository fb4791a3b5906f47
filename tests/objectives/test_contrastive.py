"""GlobalContrastive (SogCLR, Algorithm 34)."""

import math
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F

from llm_xrisk.objectives import GlobalContrastive, Objective
from llm_xrisk.objectives.contrastive_robust import RobustGlobalContrastive
from llm_xrisk.objectives.temperatures import ConstantTemperature, GlobalTemperature
from tests.contract import Batch, ObjectiveContract, evaluate
from tests.reference import contrastive as reference

F64 = torch.float64


class TestGlobalContrastive(ObjectiveContract):
    objective_class: ClassVar[type[Objective]] = GlobalContrastive
    options: ClassVar[dict[str, Any]] = {"tau": 0.5}
    eps: ClassVar[float] = 0.0
    compile_backend: ClassVar[str] = "inductor"

    def make_batch(self, generator: torch.Generator) -> Batch:
        """Six pairs of views of five samples."""
        samples = torch.randperm(12, generator=generator)[:5]
        index = samples[torch.tensor([0, 1, 2, 3, 4, 1])]
        first = torch.randn(6, 3, generator=generator, dtype=F64)
        second = first + 0.3 * torch.randn(6, 3, generator=generator, dtype=F64)
        return Batch(first, second, {"index": index}, leaves=("scores", "targets"))

    def reference(
        self, batch: Batch, u: dict[int, Any], gamma: float
    ) -> tuple[float, dict[str, Any]]:
        loss, first, second = reference.step(
            batch.scores.tolist(),
            batch.targets.tolist(),
            batch.groups["index"].tolist(),
            u,
            gamma=gamma,
            tau=0.5,
            eps=self.eps,
        )
        return loss, {"scores": first, "targets": second}

    def tracked(self, objective: Objective) -> dict[int, Any]:
        inner = objective.inner
        return {i: math.exp(inner.u[i]) for i in inner.visited.nonzero().flatten().tolist()}

    def degenerate(self, batch: Batch) -> list[Batch]:
        """One sample, once and twice."""
        return [batch.rows(slice(0, 1)), batch.rows(torch.tensor([1, 5]))]

    def test_worked_example(self) -> None:
        batch = Batch(
            torch.tensor([[2.0, 0.0], [0.0, 1.0]]),
            torch.tensor([[3.0, 0.0], [1.0, 0.0]]),
            {"index": torch.tensor([0, 1])},
            leaves=("scores", "targets"),
        )
        result = evaluate(GlobalContrastive(num_samples=2, tau=0.5), batch)
        # views e1, e2, e1, e1: of sample 0 both have negatives e2 and e1, so g = (1 + e^2) / 2;
        # of sample 1, e2 has e1 twice, so g = 1, and e1 has e1 twice, so g = e^2
        g = [(1 + math.exp(2)) / 2, 1.0, (1 + math.exp(2)) / 2, math.exp(2)]
        positives = [1.0, 0.0, 1.0, 0.0]
        want = 0.5 * sum(math.log(value) for value in g) / 4 - sum(positives) / 4
        assert result.loss.item() == pytest.approx(want)


class TestGlobalContrastiveWithEpsilon(TestGlobalContrastive):
    options: ClassVar[dict[str, Any]] = {"tau": 0.5, "eps": 0.3}
    eps: ClassVar[float] = 0.3

    def test_worked_example(self) -> None:
        views = torch.eye(2)
        batch = Batch(views, views, {"index": torch.arange(2)}, leaves=("scores", "targets"))
        result = evaluate(GlobalContrastive(num_samples=2, tau=0.5, eps=0.3), batch)
        assert result.loss.item() == pytest.approx(0.5 * math.log(0.3 + math.exp(0)) - 1)


def test_gamma_one_is_the_decoupled_infonce_of_all_other_views() -> None:
    generator = torch.Generator().manual_seed(0)
    first, second = torch.randn(2, 8, 4, generator=generator, dtype=F64)
    views = F.normalize(torch.cat([first, second]), dim=-1)
    logits = views @ views.T / 0.2
    positive = logits[torch.arange(16), torch.arange(16).roll(8)]
    index = torch.arange(8).repeat(2)
    negatives = logits.masked_fill(index[:, None] == index, -math.inf).logsumexp(-1) - math.log(14)
    got = GlobalContrastive(8, 1.0, 0.2)(first, second, index=torch.arange(8)).loss
    torch.testing.assert_close(got, 0.2 * (negatives - positive).mean(), rtol=1e-6, atol=0)


def test_a_well_separated_batch_keeps_its_gradient() -> None:
    """Sixty temperatures below the positive, where clamped implementations have none left."""
    angle = torch.linspace(0, 0.3, 4, dtype=F64)
    first = torch.stack([angle.cos(), angle.sin()], -1) * torch.tensor([[1], [-1], [1], [-1]])
    batch = Batch(first, first, {"index": torch.arange(4)}, leaves=("scores", "targets"))
    tau = 1 / 60
    got = evaluate(GlobalContrastive(4, tau=tau), batch.to(torch.float32))
    want = evaluate(GlobalContrastive(4, tau=tau, state_dtype=F64), batch)
    for name in batch.leaves:
        torch.testing.assert_close(
            got.gradients[name].to(F64), want.gradients[name], rtol=1e-3, atol=1e-4
        )
    assert want.gradients["scores"].norm() > 0.05


@pytest.mark.parametrize("relative", [False, True], ids=["SogCLR", "iSogCLR"])
@pytest.mark.parametrize(("tau", "gamma"), [(0.1, 0.02), (0.01, 0.01)])
def test_the_averaged_gradient_has_direction_and_scale_of_the_exact_one(
    tau: float, gamma: float, relative: bool
) -> None:
    """Of 32 samples, 16 in a batch, at fixed features; exactly, u is the mean of both views' g."""
    generator = torch.Generator().manual_seed(0)
    centre = torch.randn(4, 6, generator=generator, dtype=F64)[torch.arange(32) % 4]
    sample = centre + 0.7 * torch.randn(32, 6, generator=generator, dtype=F64)
    views = sample + 0.4 * torch.randn(2, 32, 6, generator=generator, dtype=F64)
    fixed = {"temperature": ConstantTemperature(tau)} if relative else {"tau": tau}
    kind = RobustGlobalContrastive if relative else GlobalContrastive
    objective = kind(32, gamma, state_dtype=F64, **fixed)
    leaf, index = views.clone().requires_grad_(), torch.arange(32).repeat(2)
    h = F.normalize(leaf.flatten(0, 1), dim=-1)
    log_g = (h @ h.T / tau).masked_fill(index == index[:, None], -math.inf).logsumexp(-1)
    exact = tau * log_g.reshape(2, 32).logsumexp(0).mean() - (h[:32] * h[32:]).sum(-1).mean()
    (want,) = torch.autograd.grad(exact, leaf)
    total, steps = torch.zeros_like(views), 800
    for step in range(steps):
        rows = torch.randperm(32, generator=generator)[:16]
        leaf = views[:, rows].requires_grad_()
        loss = objective(*leaf, index=rows).loss
        if step >= steps // 4:
            total[:, rows] += torch.autograd.grad(loss, leaf)[0]
    got = total / (steps - steps // 4)
    assert torch.cosine_similarity(got.flatten(), want.flatten(), dim=0) > 0.99
    assert 0.9 < got.norm() / want.norm() < 1.1


@pytest.mark.parametrize("options", [{"tau": 0.0}, {"eps": -1.0}])
def test_bad_settings_are_refused(options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=r"need tau > 0 and eps >= 0, got tau=.* and eps="):
        GlobalContrastive(num_samples=3, **options)


def test_a_tau_that_learns_is_refused_with_the_way_out() -> None:
    message = r"needs a tau that stays, got a GlobalTemperature; pass RobustGlobal.*temperature="
    with pytest.raises(ValueError, match=message):
        GlobalContrastive(num_samples=3, tau=GlobalTemperature(0.1))


def test_a_constant_temperature_is_its_number() -> None:
    first, second = torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(0))
    number, module = (
        GlobalContrastive(4, tau=tau)(first, second, index=torch.arange(4)).loss
        for tau in (0.2, ConstantTemperature(0.2))
    )
    assert torch.equal(number, module)
