"""Temperatures of fixed entropy against arithmetic, a minimiser and their bounds."""

import math

import pytest
import torch
from torch import Tensor

from llm_xrisk.models import logprobs
from llm_xrisk.models.fixed_entropy import fixed_entropy_temperature

WIDE = {"tau_min": 1e-3, "tau_max": 1e3}


def entropies(logits: Tensor, tau: Tensor) -> Tensor:
    return torch.distributions.Categorical(logits=logits.double() / tau.unsqueeze(-1)).entropy()


@pytest.mark.parametrize(
    ("dtype", "error"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 1e-5)]
)
def test_every_token_gets_the_entropy_asked_for(dtype, error):
    logits = (torch.randn(3, 5, 40, dtype=torch.float64) * torch.logspace(-1, 2, 5)[:, None]).to(
        dtype
    )
    tau = fixed_entropy_temperature(logits, 1.5, **WIDE)
    assert tau.dtype == torch.promote_types(dtype, torch.float32)
    assert (entropies(logits, tau) - 1.5).abs().max() < error
    assert tau.max() / tau.min() > 50  # the tokens differ in scale, so do their temperatures


def test_two_tokens_by_hand():
    """p = 3/4 and 1/4 are logits log 3 apart once tau has divided them."""
    half = 0.25 * math.log(4) + 0.75 * math.log(4 / 3)
    for tau in (0.5, 1.0, 1.7):
        logits = torch.tensor([tau * math.log(3), 0.0], dtype=torch.float64)
        assert fixed_entropy_temperature(logits, half).item() == pytest.approx(tau, rel=1e-12)


def test_shifted_logits_have_the_same_temperature_and_scaled_ones_the_scaled():
    logits = 3 * torch.randn(4, 20, dtype=torch.float64)
    tau = fixed_entropy_temperature(logits, 1.0, **WIDE)
    shifted = fixed_entropy_temperature(logits + 100, 1.0, **WIDE)
    scaled = fixed_entropy_temperature(3 * logits, 1.0, **WIDE)
    torch.testing.assert_close(shifted, tau, rtol=1e-10, atol=0)
    torch.testing.assert_close(scaled, 3 * tau, rtol=1e-10, atol=0)


def test_tokens_out_of_reach_get_exactly_a_bound():
    flat, peaked = torch.zeros(10), torch.tensor([1000.0] + [0.0] * 9)
    tied = torch.tensor([5.0] * 4 + [0.0] * 6)  # never below log 4
    tau = fixed_entropy_temperature(
        torch.stack([flat, peaked, tied]), 1.0, tau_min=0.3, tau_max=1.7
    )
    assert tau.tolist() == torch.tensor([0.3, 1.7, 0.3]).tolist()


def test_chunks_change_nothing(monkeypatch):
    logits = torch.randn(3, 4, 30)
    whole = fixed_entropy_temperature(logits, 1.0)
    monkeypatch.setattr(logprobs, "_CHUNK_NUMBERS", 60)
    assert torch.equal(fixed_entropy_temperature(logits, 1.0), whole)
    assert torch.equal(fixed_entropy_temperature(logits[1, 2], 1.0), whole[1, 2])


def test_tokens_that_are_masked_out_do_not_count():
    logits = torch.randn(2, 30)
    padded = torch.cat([logits, torch.full((2, 8), -math.inf)], -1)
    torch.testing.assert_close(
        fixed_entropy_temperature(padded, 1.0), fixed_entropy_temperature(logits, 1.0)
    )


@pytest.mark.parametrize("entropy", [0.0, -1.0, 3.0, math.nan])
def test_an_entropy_that_cannot_be_is_refused(entropy):
    with pytest.raises(ValueError, match=r"log V = 2\.303"):
        fixed_entropy_temperature(torch.zeros(10), entropy)


def test_bounds_without_a_temperature_between_them_are_refused():
    with pytest.raises(ValueError, match=r"tau_min=2\.0, tau_max=1\.0"):
        fixed_entropy_temperature(torch.zeros(10), 1.0, tau_min=2.0, tau_max=1.0)
