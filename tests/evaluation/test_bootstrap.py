"""Intervals cover what they should, and resamples are shared by what is compared."""

import numpy as np
import pytest

from llm_xrisk.evaluation.bootstrap import Bootstrap


def coverage(num_runs: int, num_prompts: int, *, run_spread: float, trials: int = 200) -> float:
    """Share of repetitions in which the interval holds the true mean, 0.3."""
    hits = 0
    for trial in range(trials):
        rng = np.random.default_rng(trial)
        runs = run_spread * rng.normal(size=(num_runs, 1))
        prompts = 0.3 * rng.normal(size=(1, num_prompts))
        values = 0.3 + runs + prompts + 0.3 * rng.normal(size=(num_runs, num_prompts))
        found = Bootstrap(num_prompts, resamples=600, seed=trial).interval(values)
        hits += found.lower <= 0.3 <= found.upper
    return hits / trials


def test_an_interval_over_prompts_covers_the_truth_in_95_of_100() -> None:
    assert 0.91 <= coverage(1, 100, run_spread=0.0) <= 0.985


def test_an_interval_over_five_seeds_covers_the_truth_at_least_as_often() -> None:
    assert coverage(5, 100, run_spread=0.1) >= 0.93


def test_the_estimate_is_the_plain_mean() -> None:
    values = np.array([[0.0, 1.0, 1.0], [1.0, 1.0, 0.5]])
    assert Bootstrap(3).interval(values).estimate == pytest.approx(4.5 / 6)


def test_the_width_is_that_of_the_normal_approximation() -> None:
    values = (np.arange(400) < 100).astype(
        float
    )  # 100 of 400: standard error sqrt(.25 * .75 / 400)
    found = Bootstrap(400).interval(values)
    assert found.upper - found.lower == pytest.approx(
        2 * 1.96 * (0.25 * 0.75 / 400) ** 0.5, rel=0.05
    )


def test_the_same_data_give_the_same_interval() -> None:
    values = np.random.default_rng(1).random(50)
    assert Bootstrap(50).interval(values) == Bootstrap(50).interval(values)
    assert Bootstrap(50).interval(values) != Bootstrap(50, seed=1).interval(values)


def test_what_two_arms_share_cancels_from_their_difference() -> None:
    base = np.random.default_rng(0).random((3, 80))
    bootstrap = Bootstrap(80)
    difference = bootstrap.means(base + 0.125) - bootstrap.means(base)
    np.testing.assert_allclose(difference, 0.125, atol=1e-12)


def test_seeds_that_disagree_widen_the_interval() -> None:
    prompts = np.random.default_rng(0).random(100)
    same = Bootstrap(100).interval(np.stack([prompts] * 5))
    apart = Bootstrap(100).interval(np.stack([prompts + shift for shift in (-2, -1, 0, 1, 2)]))
    assert apart.upper - apart.lower > 5 * (same.upper - same.lower)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [((1,), "got 1 prompts; an interval needs at least 2"), ((5, 10), "at least 100 .* got 10")],
)
def test_too_little_to_resample_is_refused(arguments: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Bootstrap(arguments[0], resamples=arguments[1] if len(arguments) > 1 else 4000)


def test_values_of_other_prompts_are_refused() -> None:
    with pytest.raises(ValueError, match=r"got values of shape \(4,\); need .* with 5 prompts"):
        Bootstrap(5).interval(np.zeros(4))
