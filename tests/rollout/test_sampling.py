import math

import pytest
import torch

import llm_xrisk.rollout.sampling as sampling_module
from llm_xrisk.rollout import SamplingConfig
from llm_xrisk.rollout.engine import mix64
from llm_xrisk.rollout.sampling import GumbelSampler, counter_gumbel, truncate_logits

GOLDEN, MASK = 0x9E3779B97F4A7C15, (1 << 64) - 1


def gumbel_of(seed: int, step: int, token: int) -> float:
    """The noise of one token in Python integers, which do not wrap by themselves."""
    row_key = mix64((seed + (step + 1) * GOLDEN) & MASK)
    hashed = mix64((row_key + (token + 1) * GOLDEN) & MASK)
    return -math.log(-math.log(((hashed >> 12) + 0.5) / 2**52))


def test_noise_is_the_hash_of_seed_step_and_token():
    seeds = [0, 1, 2**63 - 1]
    for step in (0, 1, 1000):
        noise = counter_gumbel(torch.tensor(seeds), step, 5)
        expected = [[gumbel_of(seed, step, token) for token in range(5)] for seed in seeds]
        torch.testing.assert_close(noise, torch.tensor(expected), rtol=1e-6, atol=1e-6)


def test_noise_has_the_gumbel_distribution_over_tokens_rows_and_steps():
    by_token = counter_gumbel(torch.tensor([3]), 0, 100_000).flatten()
    by_row = counter_gumbel(torch.arange(100_000), 0, 1).flatten()
    by_step = torch.cat([counter_gumbel(torch.tensor([3]), t, 1) for t in range(2000)]).flatten()
    for noise in (by_token, by_row, by_step):
        uniform = torch.exp(-torch.exp(-noise.double())).sort().values
        ranks = torch.arange(1, len(uniform) + 1, dtype=torch.float64) / len(uniform)
        kolmogorov_smirnov = (uniform - ranks).abs().max().item() * len(uniform) ** 0.5
        assert kolmogorov_smirnov < 1.95  # the 0.1 % point


def test_noise_of_neighbouring_rows_and_steps_is_uncorrelated():
    grid = torch.stack([counter_gumbel(torch.arange(200), step, 200) for step in range(2)])
    draws = torch.stack([grid[0, :-1], grid[0, 1:], grid[1, :-1]]).flatten(1)
    correlation = torch.corrcoef(draws.double()) - torch.eye(3)
    assert correlation.abs().max().item() < 4 / draws.shape[1] ** 0.5


@pytest.mark.parametrize(("hashed", "largest"), [(0, -3.60), (-1, 36.74)])
def test_noise_is_finite_at_the_ends_of_the_hash(monkeypatch, hashed, largest):
    monkeypatch.setattr(sampling_module, "_mix64_", lambda x: torch.full_like(x, hashed))
    assert counter_gumbel(torch.tensor([0]), 0, 1).item() == pytest.approx(largest, abs=0.01)


def draw(logits: torch.Tensor, rows: int, sampling: SamplingConfig) -> tuple[torch.Tensor, ...]:
    sampler = GumbelSampler(torch.arange(rows) * 7919, prompt_length=2, sampling=sampling)
    scores = sampler(torch.zeros(rows, 2, dtype=torch.long), logits.expand(rows, -1))
    return scores.argmax(-1), sampler.log_probs()[:, 0]


@pytest.mark.parametrize("temperature", [1.0, 0.5, 2.0])
def test_samples_follow_the_softmax(chi_square, temperature):
    logits = torch.randn(50) * 2
    tokens, _ = draw(logits, 20_000, SamplingConfig(temperature=temperature))
    counts = torch.bincount(tokens, minlength=50)
    assert abs(chi_square(counts, (logits / temperature).softmax(-1))) < 4
    assert chi_square(counts, (logits / temperature * 1.1).softmax(-1)) > 10  # the test has power


def test_samples_follow_the_truncated_softmax_and_log_probs_do_not(chi_square):
    logits = torch.randn(50) * 2
    tokens, log_probs = draw(logits, 20_000, SamplingConfig(temperature=1.5, top_k=12, top_p=0.9))
    kept = truncate_logits(logits[None] / 1.5, top_k=12, top_p=0.9)[0]
    assert 3 < kept.isfinite().sum() < 12
    assert abs(chi_square(torch.bincount(tokens, minlength=50), kept.softmax(-1))) < 4
    torch.testing.assert_close(log_probs, (logits / 1.5).log_softmax(-1)[tokens])


def test_zero_temperature_is_greedy_with_the_policy_at_temperature_one():
    logits = torch.randn(50)
    tokens, log_probs = draw(logits, 3, SamplingConfig(temperature=0.0))
    assert tokens.tolist() == [logits.argmax().item()] * 3
    torch.testing.assert_close(log_probs, logits.log_softmax(-1).max().expand(3))


def test_truncation_keeps_the_smallest_set_that_reaches_the_mass():
    logits = torch.tensor([[0.15, 0.5, 0.05, 0.3]]).log()

    def kept(**limits):
        return truncate_logits(logits, **limits).isfinite()[0].nonzero().flatten().tolist()

    assert kept() == [0, 1, 2, 3]
    assert kept(top_k=2) == [1, 3]
    assert kept(top_k=9) == [0, 1, 2, 3]
    assert kept(top_p=0.79) == [1, 3]
    assert kept(top_p=0.81) == [0, 1, 3]
    assert kept(top_p=1e-6) == [1]
    assert kept(top_k=3, top_p=0.6) == [1, 3]  # 0.5 of 0.95 is short of 0.6


def test_a_half_precision_row_is_sampled_in_float32():
    logits = torch.randn(50).bfloat16()
    _, log_probs = draw(logits, 4, SamplingConfig())
    assert log_probs.dtype == torch.float32
