"""Temperatures: values, gradients, bounds, and a network in their place."""

import copy
import math

import pytest
import torch
from torch import Tensor, nn

from llm_xrisk.objectives.clip import GlobalCLIP
from llm_xrisk.objectives.temperatures import (
    ConstantTemperature,
    GlobalTemperature,
    IndividualTemperature,
    Temperature,
    as_temperature,
)

ROWS, IDS = torch.zeros(3, 4), torch.tensor([2, 0, 1])


def test_a_number_is_a_constant_temperature_and_a_module_is_itself() -> None:
    assert as_temperature(0.2)(ROWS, IDS).tolist() == pytest.approx([0.2] * 3)
    module = GlobalTemperature()
    assert as_temperature(module) is module


def test_the_global_temperature_is_a_parameter_with_the_gradient_of_its_tau() -> None:
    module = GlobalTemperature(0.25)
    tau = module(ROWS, None)
    assert tau.tolist() == pytest.approx([0.25] * 3)
    tau.sum().backward()
    assert module.logit_scale.grad is not None
    assert module.logit_scale.grad.item() == pytest.approx(-3 * 0.25)  # d exp(-s) = -tau ds
    assert [name for name, _ in module.named_parameters()] == ["logit_scale"]


@pytest.mark.parametrize(("given", "inside"), [(1e-5, 0.01), (30.0, 1.0)])
def test_the_global_temperature_is_projected_and_keeps_its_gradient_there(
    given: float, inside: float
) -> None:
    module = GlobalTemperature(0.5)
    module.logit_scale.data.fill_(-math.log(given))
    evaluated = copy.deepcopy(module).eval()
    assert evaluated(ROWS, None)[0].item() == pytest.approx(inside)
    assert evaluated.logit_scale.item() == pytest.approx(-math.log(given))
    module(ROWS, None).sum().backward()
    assert module.logit_scale.item() == pytest.approx(-math.log(inside))
    assert module.logit_scale.grad is not None and module.logit_scale.grad.abs() > 0


def test_casting_the_model_does_not_cast_what_is_learned() -> None:
    for module in (GlobalTemperature(), IndividualTemperature(3)):
        module.to(torch.bfloat16)
        assert all(v.dtype == torch.float32 for v in module.state_dict().values())


def test_individual_temperatures_move_for_the_samples_of_the_batch_alone() -> None:
    module = IndividualTemperature(4, tau=0.5, lr=0.1, beta=1.0, clip=2.0)
    where = torch.tensor([True, True, False])
    module.step(torch.tensor([1.0, -9.0, 1.0]), IDS, where)
    assert module(torch.zeros(4, 1), torch.arange(4)).tolist() == pytest.approx(
        [0.5 + 0.1 * 2.0, 0.5, 0.5 - 0.1 * 1.0, 0.5]
    )
    assert module.eval()(ROWS, IDS).tolist() == [0.5] * 3


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: ConstantTemperature(0.0), "tau must be positive, got 0.0"),
        (lambda: ConstantTemperature(0.1, rho=-1.0), "rho must be >= 0, got -1.0"),
        (lambda: GlobalTemperature(0.001), "need 0 < lower <= tau <= upper, got lower=0.01"),
        (lambda: IndividualTemperature(3, 0.8), "need 0 < lower <= tau <= upper, .*upper=0.7"),
        (lambda: IndividualTemperature(3, clip=0.0), "clip must be positive, got 0.0"),
        (lambda: Temperature()(ROWS, IDS), "Temperature does not define forward"),
    ],
)
def test_bad_settings_are_refused(build: object, message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        build()


class Network(Temperature):
    """tau between 0.1 and 0.5 of the features, by one layer."""

    def __init__(self, width: int, rho: float) -> None:
        super().__init__(rho)
        self.layer = nn.Linear(width, 1, dtype=torch.float64)

    def forward(self, features: Tensor, index: Tensor | None) -> Tensor:
        return 0.1 + 0.4 * self.layer(features).squeeze(-1).sigmoid()


def test_a_network_in_their_place_gets_the_gradient_of_the_exact_objective() -> None:
    """(6.50): with gamma = 1, by autograd of the formula; its input carries no gradient."""
    generator = torch.Generator().manual_seed(0)
    images, texts = torch.randn(2, 7, 5, generator=generator, dtype=torch.float64)
    torch.manual_seed(0)
    networks = Network(5, rho=0.7), Network(5, rho=0.4)
    objective = GlobalCLIP(7, 1.0, networks[0], text_tau=networks[1], state_dtype=torch.float64)
    images.requires_grad_()
    got = objective(images, texts, index=torch.arange(7)).loss
    leaves = [images, *objective.parameters()]
    gradients = torch.autograd.grad(got, leaves)
    h, g = (nn.functional.normalize(x, dim=-1) for x in (images, texts))
    gap, own = h @ g.T - (h * g).sum(-1)[:, None], torch.eye(7, dtype=torch.bool)
    other = g @ h.T - (h * g).sum(-1)[:, None]
    want = torch.zeros((), dtype=torch.float64)
    for network, features, gaps in zip(networks, (h, g), (gap, other), strict=True):
        tau = network(features.detach(), None)
        exponent = (gaps / tau[:, None]).masked_fill(own, -math.inf)
        log_g = exponent.logsumexp(-1) - math.log(6)
        want = want + (tau * (log_g + network.rho)).mean()
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    for mine, exact in zip(gradients, torch.autograd.grad(want, leaves), strict=True):
        torch.testing.assert_close(mine, exact, rtol=1e-10, atol=1e-12)
