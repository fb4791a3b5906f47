"""TemperatureNetwork: CLIP-TempNet, (6.50)."""

import copy
import math
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from llm_xrisk.objectives import (
    CLIPLoss,
    GlobalCLIP,
    Objective,
    RobustGlobalContrastive,
    TemperatureNetwork,
)
from tests.contract import Batch, assert_same, evaluate, state
from tests.objectives.test_clip import TestGlobalCLIP as CLIPContract
from tests.objectives.test_clip import embedded
from tests.reference import clip as reference
from tests.reference.temperature_network import Network

F64 = torch.float64
RHO = (0.4, 0.7)


def network(width: int = 3, **options: Any) -> TemperatureNetwork:
    chosen = {"lower": 0.25, "upper": 1.0, "num_prototypes": 4, "state_dtype": F64} | options
    return TemperatureNetwork(width, **chosen)


def loops(module: TemperatureNetwork) -> Network:
    """What the loops know of a network."""
    return Network(
        weight=module.weight.tolist(),
        bias=module.bias.tolist(),
        prototypes=module.prototypes.tolist(),
        scaler=module.scaler.item(),
        pool=module.pool.tolist(),
        offset=module.offset.item(),
        bounds=(module.lower, module.upper),
        dropout=module.dropout,
        seed=module.seed,
    )


class TestGlobalCLIPWithTemperatureNetworks(CLIPContract):
    """CLIP-TempNet, with dropout."""

    has_duals: ClassVar[bool] = True
    networks: list[Network]

    def build(self, **overrides: Any) -> Objective:
        dtype, tau = overrides.get("state_dtype", F64), overrides.get("tau", 0.5)
        sides = [
            network(
                rho=rho, lower=tau / 2, upper=2 * tau, dropout=0.4, seed=seed, state_dtype=dtype
            )
            for seed, rho in enumerate(RHO)
        ]
        return super().build(**overrides | {"tau": sides[0], "text_tau": sides[1]})

    def predicted(self, batch: Batch, u: dict[Any, Any]) -> list[list[tuple[float, Any]]]:
        """Temperatures and their gradients of the images and of the texts, row by row."""
        index = batch.groups["index"].tolist()
        sides = [batch.scores.tolist(), batch.targets.tolist()]
        if not u:
            objective = self.build()
            self.networks = [loops(objective.image_tau), loops(objective.text_tau)]
            for own, partners in zip(self.networks, reversed(sides), strict=True):
                own.start(partners, index)
        for own in self.networks:
            own.steps += 1
        return [
            [own.predict(x, i) for x, i in zip(side, index, strict=True)]
            for own, side in zip(self.networks, sides, strict=True)
        ]

    def step(
        self, batch: Batch, u: dict[Any, Any], gamma: float
    ) -> tuple[float, dict[str, Any], list[dict[str, list[float]]]]:
        """A step of the loops, with the gradients in both networks' weights."""
        both, size = self.predicted(batch, u), len(batch.scores)
        sides = tuple({i: u[i][side] for i in u} for side in (0, 1))
        loss, first, second, z = reference.step(
            batch.scores.tolist(),
            batch.targets.tolist(),
            batch.groups["index"].tolist(),
            sides,
            gamma=gamma,
            tau=[[tau for tau, _ in side] for side in both],
        )
        u.update({i: [sides[0][i], sides[1][i]] for i in sides[0]})
        weights = []
        for rho, own, side in zip(RHO, z, both, strict=True):
            loss += sum(tau * rho for tau, _ in side) / size
            total = {name: [0.0] * len(values) for name, values in side[0][1].items()}
            for value, (_, gradient) in zip(own, side, strict=True):
                for name, parts in gradient.items():  # of the mean of tau sg[z]
                    added = [(value + rho) * part / size for part in parts]
                    total[name] = [a + b for a, b in zip(total[name], added, strict=True)]
            weights.append(total)
        return loss, {"scores": first, "targets": second}, weights

    def reference(
        self, batch: Batch, u: dict[Any, Any], gamma: float
    ) -> tuple[float, dict[str, Any]]:
        return self.step(batch, u, gamma)[:2]

    def test_the_gradient_in_the_weights_is_that_of_the_loops(self) -> None:
        objective, u = self.build(), dict[int, Any]()
        for batch in self.batches(3):
            result = evaluate(objective, batch)
            *_, weights = self.step(batch, u, 0.3)
            for side, total in zip(("image", "text"), weights, strict=True):
                for name, want in total.items():
                    got = result.parameters[f"{side}_tau.{name}"].flatten()
                    exact = torch.tensor(want, dtype=F64)
                    torch.testing.assert_close(got, exact, rtol=1e-10, atol=1e-13)
                    assert exact.abs().max() > 1e-8

    def test_worked_example(self) -> None:
        sides = [network(2, rho=rho, num_prototypes=2, dropout=0.0) for rho in RHO]
        for module in sides:
            module.weight.data.zero_()
            module.bias.data.zero_()
        eye = torch.eye(2, dtype=F64)
        batch = Batch(eye, eye, {"index": torch.arange(2)}, leaves=("scores", "targets"))
        objective = GlobalCLIP(2, tau=sides[0], text_tau=sides[1], state_dtype=F64)
        result = evaluate(objective, batch)
        # hidden units of 1/2 have the product 1/2 with either prototype, e1 and e2 of the other
        # side, so p = 1/2 and tau is in the middle, 0.625; every l is 0 - 1, and tau log g = l
        assert objective.image_tau.prototypes.tolist() == [[1.0, 0.0], [0.0, 1.0]]
        assert result.loss.item() == pytest.approx(-2 + 0.625 * sum(RHO))
        # z = log u + rho - l / tau = rho, and d tau / d offset = (1 - 0.25) / 4
        for side, rho in zip(("image", "text"), RHO, strict=True):
            got = result.parameters[f"{side}_tau.offset"].item()
            assert got == pytest.approx(rho * 0.75 / 4)


def test_a_temperature_by_hand() -> None:
    module = network(2, num_prototypes=2).eval()
    module.weight.data.zero_()
    module.bias.data = torch.tensor([math.log(3), -math.log(3)], dtype=F64)  # units 3/4, 1/4
    module.prototypes.data = 2 * torch.eye(2, dtype=F64)
    module.scaler.data.zero_()
    p = 1 / (1 + math.exp(-0.5))
    gates = [1 / (1 + math.exp(-0.75)), 1 / (1 + math.exp(-0.25))]
    pooled = (p - 1 / 2) * gates[0] + (1 - p - 1 / 2) * gates[1]
    want = 0.25 + 0.75 / (1 + math.exp(-pooled))
    assert module(torch.randn(3, 2, dtype=F64), None).tolist() == pytest.approx([want] * 3)


def test_with_gamma_one_it_has_the_gradient_of_6_50_by_autograd() -> None:
    """In eval mode of the networks: autograd of the formula, whose tau is their forward."""
    images, texts = embedded(9, torch.Generator().manual_seed(0))
    sides = [network(6, rho=rho, seed=k) for k, rho in enumerate(RHO)]
    objective = GlobalCLIP(9, 1.0, sides[0], text_tau=sides[1], state_dtype=F64)
    batch = Batch(images, texts, {"index": torch.arange(9)}, leaves=("scores", "targets"))
    result, copies = evaluate(objective, batch), batch.copy()
    h, g = F.normalize(copies.scores, dim=-1), F.normalize(copies.targets, dim=-1)
    total, own = torch.zeros((), dtype=F64), torch.eye(9, dtype=torch.bool)
    for module, x, s in zip(sides, (h, g), (h @ g.T, g @ h.T), strict=True):
        tau = module(x.detach(), torch.arange(9))  # the same step: the same dropout
        exponent = ((s - s.diagonal()[:, None]) / tau[:, None]).masked_fill(own, -math.inf)
        total = total + (tau * (exponent.logsumexp(-1) - math.log(8) + module.rho)).mean()
    torch.testing.assert_close(result.loss, total.detach(), rtol=1e-12, atol=1e-12)
    leaves = [copies.scores, copies.targets, *objective.parameters()]
    got = [*result.gradients.values(), *result.parameters.values()]
    for mine, exact in zip(got, torch.autograd.grad(total, leaves), strict=True):
        torch.testing.assert_close(mine, exact, rtol=1e-9, atol=1e-13)


def entropic(images: Tensor, texts: Tensor, taus: Tensor, rho: float) -> Tensor:
    """(6.48) of all pairs at the given taus (2, n)."""
    s = F.normalize(images, dim=-1) @ F.normalize(texts, dim=-1).T
    total = torch.zeros((), dtype=F64)
    for tau, side in zip(taus, (s, s.T), strict=True):
        exponent = (side - s.diagonal()[:, None]) / tau[:, None]
        exponent = exponent.masked_fill(torch.eye(len(s), dtype=torch.bool), -math.inf)
        total = total + (tau * (exponent.logsumexp(-1) - math.log(len(s) - 1) + rho)).mean()
    return total


def test_it_learns_taus_better_than_any_constant_one() -> None:
    """On frozen features of clusters of unlike size, whose samples want unlike taus."""
    generator = torch.Generator().manual_seed(0)
    cluster = torch.tensor([0] * 20 + [1] * 8 + [2] * 4)
    centre = torch.randn(3, 6, generator=generator, dtype=F64)[cluster]
    images, texts = centre + 0.3 * torch.randn(2, 32, 6, generator=generator, dtype=F64)
    sides = [
        network(6, rho=0.8, lower=0.02, upper=1.0, num_prototypes=16, dropout=0.0, seed=k)
        for k in range(2)
    ]
    objective = GlobalCLIP(32, 1.0, sides[0], text_tau=sides[1], state_dtype=F64)
    optimizer, index = torch.optim.Adam(objective.parameters(), lr=0.02), torch.arange(32)
    for _ in range(400):
        optimizer.zero_grad()
        objective(images, texts, index=index).loss.backward()
        optimizer.step()
    got = objective.eval().exact(images, texts, index=index).item()
    constants = torch.linspace(0.02, 1.0, 200, dtype=F64)
    best = min(entropic(images, texts, t.expand(2, 32), 0.8).item() for t in constants)
    free = torch.full((2, 32), math.log(0.3), dtype=F64, requires_grad=True)
    freely = torch.optim.Adam([free], lr=0.02)
    for _ in range(400):
        freely.zero_grad()
        entropic(images, texts, free.exp().clamp(0.02, 1.0), 0.8).backward()
        freely.step()
    floor = entropic(images, texts, free.detach().exp().clamp(0.02, 1.0), 0.8).item()
    assert floor - 1e-6 <= got < best
    assert (best - got) / (best - floor) > 0.6, "most of what a tau for each sample can gain"


def test_prototypes_start_from_the_other_modality_once_and_spread_over_its_samples() -> None:
    sides = [network(6, num_prototypes=4, seed=k) for k in range(2)]
    objective = GlobalCLIP(12, tau=sides[0], text_tau=sides[1])
    images, texts = embedded(8, torch.Generator().manual_seed(0))
    order = torch.tensor([5, 2, 7, 0, 1, 6, 3, 4])
    objective(images, texts, index=order)
    by_id = F.normalize(texts, dim=-1)[order.argsort()]
    torch.testing.assert_close(sides[0].prototypes.detach(), by_id[[0, 2, 4, 6]])
    before = state(objective)
    objective(texts, images, index=order)
    assert torch.equal(sides[0].prototypes, before["image_tau.prototypes"])
    assert sides[0].steps.item() == 2


def test_prototypes_beyond_the_first_batch_stay_random() -> None:
    module = network(6, num_prototypes=11)
    drawn = module.prototypes.detach().clone()
    rows = torch.randn(8, 6, generator=torch.Generator().manual_seed(0), dtype=F64)
    module.begin(rows, torch.arange(8))
    torch.testing.assert_close(module.prototypes[:8].detach(), F.normalize(rows, dim=-1))
    assert torch.equal(module.prototypes[8:], drawn[8:])


@pytest.mark.parametrize(
    ("rows", "index"),
    [
        (torch.full((3, 6), math.nan), torch.arange(3)),
        (torch.ones(2, 6), torch.tensor([4, 4])),
        (torch.ones(0, 6), torch.arange(0)),
    ],
    ids=["NaN", "one sample", "no rows"],
)
def test_a_batch_of_no_use_does_not_start_it(rows: Tensor, index: Tensor) -> None:
    module = network(6)
    before = module.prototypes.detach().clone()
    module.begin(rows.to(F64), index)
    assert not module.started
    assert torch.equal(module.prototypes, before)


def test_a_checkpoint_tells_that_it_started() -> None:
    module, other = network(6), network(6, seed=3)
    rows = torch.randn(2, 8, 6, generator=torch.Generator().manual_seed(0), dtype=F64)
    module.begin(rows[0], torch.arange(8))
    other.load_state_dict(module.state_dict())
    other.seed = module.seed
    other.begin(rows[1], torch.arange(8))
    module.begin(rows[1], torch.arange(8))
    assert_same(dict(other.state_dict()), dict(module.state_dict()))
    index = torch.arange(8)
    assert torch.equal(other(rows[0], index), module(rows[0], index))


def test_dropout_is_a_function_of_seed_step_sample_and_unit() -> None:
    module = network(40, dropout=0.3)
    index, partners = torch.arange(500), torch.randn(500, 40, dtype=F64)

    def kept() -> Tensor:
        return module._kept(index)

    module.begin(partners, index)
    first = kept()
    assert torch.equal(kept(), first)
    assert torch.equal(module._kept(index.flip(0)), first.flip(0))
    assert first.mean().item() == pytest.approx(0.7, abs=0.01)
    assert first.mean(0).sub(0.7).abs().max() < 0.09  # 4.4 deviations of 500 draws
    assert first.mean(1).sub(0.7).abs().max() < 0.33
    module.begin(partners, index)
    correlation = torch.corrcoef(torch.stack([first.flatten(), kept().flatten()]))[0, 1]
    assert abs(correlation.item()) < 0.03
    module.seed = 1
    assert not torch.equal(kept(), first)


def test_in_eval_nothing_is_dropped_and_nothing_moves() -> None:
    module = network(6).eval()
    before, rows = state(module), torch.randn(8, 6, dtype=F64)
    module.begin(rows, torch.arange(8))
    taus = module(rows, torch.arange(8))
    assert torch.equal(taus, module(rows, None))
    assert_same(state(module), before)
    assert taus.ge(0.25).all() and taus.le(1.0).all()


def test_its_weights_do_not_depend_on_what_was_drawn_before() -> None:
    torch.manual_seed(0)
    one = network(6)
    torch.manual_seed(1)
    assert_same(state(network(6)), state(one))
    assert not torch.equal(network(6, seed=1).weight, one.weight)


def test_casting_the_model_does_not_cast_its_weights() -> None:
    module = TemperatureNetwork(6, num_prototypes=3)
    cast = copy.deepcopy(module).to(torch.bfloat16)
    assert all(weight.dtype == torch.float32 for weight in cast.parameters())
    rows = torch.randn(4, 6).to(torch.bfloat16)
    assert cast.eval()(rows, None).dtype == torch.bfloat16
    assert TemperatureNetwork(6).rho == 7.0


def test_two_views_and_minibatch_losses_take_it_too() -> None:
    images, texts = embedded(6, torch.Generator().manual_seed(0))
    for objective in (
        RobustGlobalContrastive(6, temperature=network(6), state_dtype=F64),
        CLIPLoss(network(6, rho=0.0)),
    ):
        result = evaluate(
            objective, Batch(images, texts, {"index": torch.arange(6)}, leaves=("scores",))
        )
        assert all(g.abs().max() > 0 for g in result.parameters.values())
        assert bool(next(m for m in objective.modules() if m is not objective).started)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"width": 0}, "need width >= 1, num_prototypes >= 1 and dropout .*got 0, 256 and 0.5"),
        ({"dropout": 1.0}, "dropout in .0, 1., got 4, 256 and 1.0"),
        ({"lower": 0.0}, "need 0 < lower <= tau <= upper, got lower=0.0"),
        ({"rho": -1.0}, "rho must be >= 0, got -1.0"),
    ],
)
def test_bad_settings_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TemperatureNetwork(**{"width": 4} | options)


def test_features_of_another_width_are_refused_with_the_way_out() -> None:
    images, texts = embedded(6, torch.Generator().manual_seed(0))
    objective = GlobalCLIP(6, tau=network(4))
    with pytest.raises(ValueError, match=r"features \(rows, 4\), got \(6, 6\); .*width=6"):
        objective(images, texts, index=torch.arange(6))
