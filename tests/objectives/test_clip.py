"""GlobalCLIP: FastCLIP-v1, v2 and v3 by its temperature."""

import math
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from llm_xrisk.fcco import cosine
from llm_xrisk.objectives import Objective
from llm_xrisk.objectives.clip import GlobalCLIP
from llm_xrisk.objectives.contrastive_baselines import CLIPLoss
from llm_xrisk.objectives.temperatures import GlobalTemperature, IndividualTemperature
from tests.contract import Batch, ObjectiveContract, evaluate, exact_loss
from tests.objectives.test_contrastive import TestGlobalContrastive as ViewsContract
from tests.reference import clip as reference

F64 = torch.float64
RHO, STEP = 0.4, 0.05


class TestGlobalCLIP(ObjectiveContract):
    objective_class: ClassVar[type[Objective]] = GlobalCLIP
    options: ClassVar[dict[str, Any]] = {"tau": 0.5}
    rho: float = 0.0
    eps: float = 0.0
    start: ClassVar[list[float]] = [0.0, 0.0]  # both u of a pair, and its taus where they move

    make_batch = ViewsContract.make_batch
    degenerate = ViewsContract.degenerate

    def taus(self, batch: Batch, u: dict[Any, Any]) -> reference.Taus:
        """Of the images and of the texts, row by row."""
        return [[0.5] * len(batch.scores)] * 2

    def after(self, batch: Batch, u: dict[Any, Any], z: reference.Taus) -> None:
        """What the temperatures do with their gradients."""

    def reference(
        self, batch: Batch, u: dict[Any, Any], gamma: float
    ) -> tuple[float, dict[str, Any]]:
        index = batch.groups["index"].tolist()
        sides = tuple({i: u[i][side] for i in u} for side in (0, 1))
        taus = self.taus(batch, u)
        loss, first, second, z = reference.step(
            batch.scores.tolist(),
            batch.targets.tolist(),
            index,
            sides,
            gamma=gamma,
            tau=taus,
            rho=self.rho,
            eps=self.eps,
        )
        for i in set(index):
            u[i] = [sides[0][i], sides[1][i], *u.get(i, self.start)[2:]]
        self.after(batch, u, z)
        return loss, {"scores": first, "targets": second}

    def tracked(self, objective: Objective) -> dict[int, Any]:
        inner, duals = objective.inner, self.duals(objective)
        return {
            i: [*inner.u[i].exp().tolist(), *(dual.value[i].item() for dual in duals)]
            for i in inner.visited.nonzero().flatten().tolist()
        }

    def duals(self, objective: Objective) -> list[Any]:
        return []

    def test_worked_example(self) -> None:
        batch = Batch(
            torch.tensor([[2.0, 0.0], [0.0, 1.0]]),
            torch.tensor([[3.0, 0.0], [1.0, 0.0]]),
            {"index": torch.tensor([0, 1])},
            leaves=("scores", "targets"),
        )
        # images e1, e2, texts e1, e1, partners at 1 and 0: image 0 has l = 1 - 1, image 1
        # l = 0 - 0, text 0 l = 0 - 1, text 1 l = 1 - 0; each has one negative, log g = l / tau
        want = (0 + 0 - 1 + 1) / 2 + 4 * 0.5 * 0.3 / 2
        module = GlobalTemperature(0.5, rho=0.3)
        result = evaluate(GlobalCLIP(2, tau=module), batch)
        assert result.loss.item() == pytest.approx(want)
        # tau log g = l has no tau in it: rho on either side is left, and d tau = -tau d log(1/tau)
        assert result.parameters["image_tau.logit_scale"].item() == pytest.approx(-0.5 * 2 * 0.3)


class TestGlobalCLIPWithIndividualTemperatures(TestGlobalCLIP):
    """FastCLIP-v2, (6.48), with eps."""

    has_duals: ClassVar[bool] = True
    rho = RHO
    eps = 0.3
    start: ClassVar[list[float]] = [0.0, 0.0, 0.5, 0.5]

    def build(self, **overrides: Any) -> Objective:
        dtype = overrides.get("state_dtype", F64)
        count, tau = overrides.get("num_samples", 12), overrides.get("tau", 0.5)
        bounds = {"lower": tau / 2, "upper": 2 * tau}
        sides = [
            IndividualTemperature(count, tau, RHO, lr=STEP, beta=1.0, state_dtype=dtype, **bounds)
            for _ in range(2)
        ]
        own = {"tau": sides[0], "text_tau": sides[1], "eps": 0.3}
        return super().build(**overrides | own)

    def taus(self, batch: Batch, u: dict[Any, Any]) -> reference.Taus:
        index = batch.groups["index"].tolist()
        return [[u.get(i, self.start)[2 + side] for i in index] for side in (0, 1)]

    def after(self, batch: Batch, u: dict[Any, Any], z: reference.Taus) -> None:
        index = batch.groups["index"].tolist()
        for i in set(index):
            for side in (0, 1):
                own = [value for value, other in zip(z[side], index, strict=True) if other == i]
                moved = u[i][2 + side] - STEP * sum(own) / len(own)
                u[i][2 + side] = min(max(moved, 0.25), 1.0)

    def duals(self, objective: Objective) -> list[Any]:
        return [objective.image_tau.dual, objective.text_tau.dual]

    def test_worked_example(self) -> None:
        views = torch.eye(2, dtype=F64)
        batch = Batch(views, views, {"index": torch.arange(2)}, leaves=("scores", "targets"))
        objective = self.build(num_samples=2)
        result = evaluate(objective, batch)
        g = math.exp(-1 / 0.5)  # every l is 0 - 1
        assert result.loss.item() == pytest.approx(2 * 0.5 * (math.log(0.3 + g) + RHO))
        z = math.log(0.3 + g) + RHO - g / (0.3 + g) * -1 / 0.5
        for dual in self.duals(objective):
            assert dual.value.tolist() == pytest.approx([0.5 - STEP * z] * 2)

    def test_gamma_one_is_the_minibatch_loss(self) -> None:
        """At the taus before the step that forward takes."""
        objective = self.build(gamma=1.0)
        for batch in self.batches(2):
            copies = batch.copy()
            loss = exact_loss(objective, copies)
            want = torch.autograd.grad(loss, [copies.scores, copies.targets])
            result = evaluate(objective, batch)
            torch.testing.assert_close(result.loss, loss.detach(), rtol=1e-12, atol=1e-12)
            for name, gradient in zip(batch.leaves, want, strict=True):
                torch.testing.assert_close(result.gradients[name], gradient, rtol=1e-10, atol=1e-12)


class TestGlobalCLIPWithAGlobalTemperature(TestGlobalCLIP):
    """FastCLIP-v3, (6.49) with one tau."""

    has_duals: ClassVar[bool] = True
    rho = RHO

    def build(self, **overrides: Any) -> Objective:
        dtype, tau = overrides.get("state_dtype", F64), overrides.get("tau", 0.5)
        module = GlobalTemperature(tau, RHO, lower=tau / 2, upper=2 * tau, state_dtype=dtype)
        return super().build(**overrides | {"tau": module})

    def test_worked_example(self) -> None:
        module = GlobalTemperature(0.5, RHO, lower=0.25, upper=1.0)
        eye = torch.eye(2)
        batch = Batch(eye, eye, {"index": torch.arange(2)}, leaves=("scores", "targets"))
        result = evaluate(GlobalCLIP(num_samples=2, tau=module), batch)
        # of both sides: l = -1, so log u = -2, and tau (log u + rho)
        assert result.loss.item() == pytest.approx(2 * 0.5 * (-2 + RHO))
        # z = log u + rho - l / tau = rho on each side, and d tau / d log(1 / tau) = -tau
        assert [g.item() for g in result.parameters.values()] == pytest.approx([-0.5 * 2 * RHO])

    def test_the_gradient_in_tau_is_that_of_the_loops(self) -> None:
        objective, u = self.build(), ({}, {})
        for batch in self.batches(3):
            size = len(batch.scores)
            result = evaluate(objective, batch)
            *_, z = reference.step(
                batch.scores.tolist(),
                batch.targets.tolist(),
                batch.groups["index"].tolist(),
                u,
                gamma=0.3,
                tau=[[0.5] * size] * 2,
                rho=RHO,
            )
            want = -0.5 * (sum(z[0]) + sum(z[1])) / size  # d tau = -tau d log(1 / tau)
            got = result.parameters["image_tau.logit_scale"].item()
            assert got == pytest.approx(want, rel=1e-10)


def embedded(count: int, generator: torch.Generator, width: int = 6) -> tuple[Tensor, Tensor]:
    """Images and texts of pairs in a few clusters."""
    centre = torch.randn(4, width, generator=generator, dtype=F64)[torch.arange(count) % 4]
    pair = centre + 0.7 * torch.randn(count, width, generator=generator, dtype=F64)
    images, texts = pair + 0.4 * torch.randn(2, count, width, generator=generator, dtype=F64)
    return images, texts


def objective_in_tau(images: Tensor, texts: Tensor, tau: float, rho: float) -> float:
    """(6.49) with one tau, from its formula."""
    s = F.normalize(images, dim=-1) @ F.normalize(texts, dim=-1).T
    total = 2 * tau * rho
    for similarity in (s, s.T):
        exponent = ((similarity - s.diagonal()[:, None]) / tau).fill_diagonal_(-math.inf)
        total += tau * (exponent.logsumexp(-1) - math.log(len(s) - 1)).mean().item()
    return total


def minimiser(images: Tensor, texts: Tensor, rho: float) -> float:
    """tau* in [0.01, 1] by golden section; the objective is convex in tau."""
    low, high = 0.01, 1.0
    for _ in range(60):
        left, right = high - 0.618 * (high - low), low + 0.618 * (high - low)
        values = [objective_in_tau(images, texts, tau, rho) for tau in (left, right)]
        low, high = (low, right) if values[0] < values[1] else (left, high)
    return low


@pytest.mark.parametrize("start", [0.02, 0.9])
@pytest.mark.parametrize(
    ("gamma", "lr", "size", "tolerance"), [(0.2, 0.3, 64, 1e-6), (cosine(0.05, 10), 0.5, 16, 0.01)]
)
def test_a_global_tau_reaches_the_minimiser_and_not_its_floor(
    start: float, gamma: Any, lr: float, size: int, tolerance: float
) -> None:
    """From all pairs exactly, from a quarter of them in a batch as the authors' schedule goes."""
    generator = torch.Generator().manual_seed(0)
    images, texts = embedded(64, generator)
    want = minimiser(images, texts, 1.0)
    assert 0.05 < want < 0.5, "it should lie well inside the bounds"
    module = GlobalTemperature(start, rho=1.0, state_dtype=F64)
    objective = GlobalCLIP(64, gamma, module, state_dtype=F64)
    optimizer, taus = torch.optim.SGD(objective.parameters(), lr=lr), []
    for step in range(600):
        objective.set_epoch(step / 30)
        optimizer.param_groups[0]["lr"] = lr if step < 300 else 0.2 * lr
        rows = torch.randperm(64, generator=generator)[:size]
        optimizer.zero_grad()
        objective(images[rows], texts[rows], index=rows).loss.backward()
        optimizer.step()
        taus.append(math.exp(-module.logit_scale.item()))
    assert sum(taus[-100:]) / 100 == pytest.approx(want, rel=tolerance)


def average_gradient(
    images: Tensor, texts: Tensor, tau: float, size: int, gamma: float, steps: int
) -> Tensor:
    """Mean over steps of the stochastic gradient at fixed features, after a burn-in."""
    generator = torch.Generator().manual_seed(1)
    count = len(images)
    objective = GlobalCLIP(count, gamma, tau, state_dtype=F64)
    total, burn_in = torch.zeros(2, *images.shape, dtype=F64), steps // 4
    for step in range(steps):
        rows = torch.randperm(count, generator=generator)[:size]
        leaves = [side[rows].requires_grad_() for side in (images, texts)]
        loss = objective(*leaves, index=rows).loss
        if step >= burn_in:
            gradients = torch.autograd.grad(loss, leaves)
            for side, gradient in enumerate(gradients):
                total[side, rows] += gradient
    return total / (steps - burn_in)


def exact_gradient(images: Tensor, texts: Tensor, tau: float) -> Tensor:
    leaves = [side.clone().requires_grad_() for side in (images, texts)]
    index = torch.arange(len(images))
    loss = GlobalCLIP(len(images), 1.0, tau, state_dtype=F64).exact(*leaves, index=index)
    return torch.stack(torch.autograd.grad(loss, leaves))


@pytest.mark.parametrize(("tau", "gamma"), [(0.1, 0.02), (0.01, 0.01)])
def test_the_averaged_gradient_has_direction_and_scale_of_the_exact_one(
    tau: float, gamma: float
) -> None:
    images, texts = embedded(32, torch.Generator().manual_seed(0))
    want = exact_gradient(images, texts, tau).flatten()
    got = average_gradient(images, texts, tau, 16, gamma, 1000).flatten()
    assert torch.cosine_similarity(got, want, dim=0) > 0.99
    assert 0.9 < got.norm() / want.norm() < 1.1


def test_the_scale_of_the_gradient_does_not_depend_on_the_batch() -> None:
    images, texts = embedded(32, torch.Generator().manual_seed(0))
    want = exact_gradient(images, texts, 0.2).norm()
    for size, steps in ((4, 800), (16, 300), (32, 4)):
        got = average_gradient(images, texts, 0.2, size, 0.05, steps).norm()
        assert got / want == pytest.approx(1.0, abs=0.06)


def test_well_separated_pairs_keep_their_gradient() -> None:
    """Sixty temperatures below the positive, where clamped implementations have none left."""
    angle = torch.linspace(0, 0.3, 4, dtype=F64)
    side = torch.stack([angle.cos(), angle.sin()], -1) * torch.tensor([[1], [-1], [1], [-1]])
    pairs = {"index": torch.tensor([0, 1])}
    batch = Batch(side[:2], side[:2], pairs, leaves=("scores", "targets"))
    tau = 2 / 60
    got = evaluate(GlobalCLIP(2, tau=tau), batch.to(torch.float32))
    want = evaluate(GlobalCLIP(2, tau=tau, state_dtype=F64), batch)
    for name in batch.leaves:
        gap = got.gradients[name].to(F64) - want.gradients[name]
        assert gap.norm() <= 1e-3 * want.gradients[name].norm()
        assert want.gradients[name].norm() > 0.05


def test_one_individual_temperature_for_both_sides_is_one_tau_for_each_pair() -> None:
    images, texts = embedded(6, torch.Generator().manual_seed(0))
    module = IndividualTemperature(6, 0.3, 0.5, lr=0.1, beta=1.0, state_dtype=F64)
    objective = GlobalCLIP(6, 1.0, module, state_dtype=F64)
    objective(images, texts, index=torch.arange(6))
    leaf = torch.full((6,), 0.3, dtype=F64, requires_grad=True)
    s = F.normalize(images, dim=-1) @ F.normalize(texts, dim=-1).T
    total = torch.zeros((), dtype=F64)
    for side in (s, s.T):
        exponent = (side - s.diagonal()[:, None]) / leaf[:, None]
        exponent = exponent.masked_fill(torch.eye(6, dtype=torch.bool), -math.inf)
        total = total + (leaf * (exponent.logsumexp(-1) - math.log(5) + 0.5)).sum()
    (z,) = torch.autograd.grad(total, leaf)
    want = (0.3 - 0.1 * z).clamp(0.05, 0.7)
    torch.testing.assert_close(module.dual.value, want, rtol=1e-10, atol=1e-10)


def test_gamma_follows_the_cosine_schedule_of_the_authors() -> None:
    objective = GlobalCLIP(4, cosine(gamma_min=0.2, epochs=4))
    gammas = []
    for epoch in (0, 2, 4, 9):
        objective.set_epoch(epoch)
        gammas.append(objective.inner.gamma.item())
    assert gammas == pytest.approx([1.0, 0.6, 0.2, 0.2])


def test_far_from_its_negatives_it_is_the_minibatch_loss_but_for_the_positive() -> None:
    """exp(CLIP) - 1 is the sum that the global loss takes the mean of, for one pair of rows."""
    images, texts = embedded(2, torch.Generator().manual_seed(0))
    index = torch.arange(2)
    sides = GlobalCLIP(2, 1.0, 0.2, state_dtype=F64)
    sides(images, texts, index=index)
    want = F.softplus(sides.inner.u).sum(-1).mean()  # log(1 + m g), m = 1
    torch.testing.assert_close(CLIPLoss(0.2)(images, texts).loss, want, rtol=1e-12, atol=0)


@pytest.mark.parametrize(("options", "message"), [({"eps": -1.0}, "eps must be >= 0, got -1.0")])
def test_bad_settings_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GlobalCLIP(3, **options)
