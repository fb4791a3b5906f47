"""pass@k and its kin against brute force and hand arithmetic; intervals against their promise."""

import subprocess
import sys
from fractions import Fraction
from itertools import combinations
from math import comb, nan, sqrt
from pathlib import Path
from random import Random

import numpy as np
import pytest

import reward
from llm_xrisk.evaluation.bootstrap import Bootstrap
from reward.metrics import avg_at_k, bootstrap_interval, maj_at_k, pass_at_k, pass_hat_k


def test_pass_at_k_is_the_share_of_subsets_with_a_right_sample() -> None:
    for n in range(1, 9):
        for c in range(n + 1):
            for k in range(1, n + 1):
                subsets = list(combinations([True] * c + [False] * (n - c), k))
                share = Fraction(sum(map(any, subsets)), len(subsets))
                assert pass_at_k(n, c, k) == float(share)


def test_pass_at_k_equals_exact_fractions_up_to_forty_samples() -> None:
    for n in range(1, 41):
        for c in range(n + 1):
            for k in range(1, n + 1):
                exact = 1 - Fraction(comb(n - c, k), comb(n, k))
                assert pass_at_k(n, c, k) == float(exact)


def test_known_values_of_pass_at_k() -> None:
    assert pass_at_k(200, 1, 100) == 0.5
    assert pass_at_k(4, 1, 4) == 1.0  # resampling with replacement would say 0.684
    assert pass_at_k(8, 0, 8) == 0.0
    assert pass_at_k(5000, 1, 2500) == 0.5  # binomials far beyond a float


def test_pass_hat_k_is_the_share_of_subsets_that_are_all_right() -> None:
    for n in range(1, 9):
        for c in range(n + 1):
            for k in range(1, n + 1):
                subsets = list(combinations([True] * c + [False] * (n - c), k))
                share = Fraction(sum(map(all, subsets)), len(subsets))
                assert pass_hat_k(n, c, k) == float(share)


def test_pass_hat_k_equals_exact_fractions_up_to_forty_samples() -> None:
    for n in range(1, 41):
        for c in range(n + 1):
            for k in range(1, n + 1):
                exact = Fraction(comb(c, k), comb(n, k))
                assert abs(Fraction(pass_hat_k(n, c, k)) - exact) <= Fraction(1, 10**12)


def test_all_right_and_one_right_are_each_others_mirror() -> None:
    for c in range(13):
        assert pass_hat_k(12, c, 1) == pass_at_k(12, c, 1) == pytest.approx(c / 12)
        for k in range(1, 13):
            assert pass_hat_k(12, c, k) == pytest.approx(1 - pass_at_k(12, 12 - c, k), abs=1e-12)


def test_known_values_of_pass_hat_k() -> None:
    assert pass_hat_k(4, 4, 4) == 1.0
    assert pass_hat_k(4, 3, 4) == 0.0
    assert pass_hat_k(200, 199, 100) == 0.5
    assert pass_hat_k(5000, 4999, 2500) == 0.5  # binomials far beyond a float


@pytest.mark.parametrize(("n", "chance", "k"), [(16, 0.3, 4), (10, 0.8, 5), (8, 0.5, 8)])
def test_the_estimates_are_unbiased_within_three_sigma(n: int, chance: float, k: int) -> None:
    random, runs = Random(0), 20_000
    draws = [sum(random.random() < chance for _ in range(n)) for _ in range(runs)]
    for estimate, truth in (
        (pass_at_k, 1 - (1 - chance) ** k),
        (pass_hat_k, chance**k),
    ):
        by_count = [estimate(n, c, k) for c in range(n + 1)]
        values = [by_count[c] for c in draws]
        mean = sum(values) / runs
        sigma = sqrt(sum((value - mean) ** 2 for value in values) / (runs - 1) / runs)
        assert abs(mean - truth) < 3 * sigma


@pytest.mark.parametrize("estimate", [pass_at_k, pass_hat_k])
@pytest.mark.parametrize(
    ("n", "c", "k", "message"),
    [
        (4, 1, 8, "got k=8 with n=4 samples; need 1 <= k <= n"),
        (4, 1, 0, "got k=0"),
        (4, 5, 1, "got c=5 right of n=4"),
        (4, -1, 1, "got c=-1"),
    ],
)
def test_counts_that_nothing_can_be_estimated_from_are_refused(
    estimate, n: int, c: int, k: int, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        estimate(n, c, k)


VALUES = [0.0] * 30 + [1.0] * 50 + [0.25] * 20


def test_an_interval_is_a_function_of_values_and_seed() -> None:
    first = bootstrap_interval(VALUES, seed=1)
    assert bootstrap_interval(VALUES, seed=1) == first
    assert bootstrap_interval(VALUES, seed=2) != first
    assert first.estimate == (50 + 0.25 * 20) / 100
    assert first.lower < first.estimate < first.upper


def test_the_interval_is_that_of_the_evaluation() -> None:
    ours = bootstrap_interval(VALUES, seed=0, resamples=4000)
    theirs = Bootstrap(len(VALUES), resamples=4000, seed=0).interval(np.array(VALUES))
    assert ours.estimate == pytest.approx(theirs.estimate, abs=1e-12)
    spread = np.std(VALUES) / sqrt(len(VALUES))  # 0.04; the ends are known to about 0.04 of it
    assert abs(ours.lower - theirs.lower) < 0.2 * spread
    assert abs(ours.upper - theirs.upper) < 0.2 * spread


def test_the_ends_are_quantiles_of_the_resampled_means() -> None:
    draw = Random(5).choices
    means = [sum(draw(VALUES, k=len(VALUES))) / len(VALUES) for _ in range(100)]
    interval = bootstrap_interval(VALUES, seed=5, resamples=100)
    ends = [interval.lower, interval.upper]
    assert ends == pytest.approx(np.quantile(means, [0.025, 0.975]).tolist(), abs=1e-12)


def test_the_interval_holds_the_middle_of_a_binomial() -> None:
    # 100 problems, half of them right: mean 0.5, standard deviation 0.05
    interval = bootstrap_interval([0.0, 1.0] * 50, seed=0)
    assert interval.lower == pytest.approx(0.5 - 1.96 * 0.05, abs=0.011)
    assert interval.upper == pytest.approx(0.5 + 1.96 * 0.05, abs=0.011)


def test_ninety_five_of_a_hundred_intervals_hold_the_truth() -> None:
    random, held, runs = Random(0), 0, 200
    for seed in range(runs):
        values = [float(random.random() < 0.4) for _ in range(60)]
        interval = bootstrap_interval(values, seed=seed, resamples=400)
        held += interval.lower <= 0.4 <= interval.upper
    assert 0.95 - 3 * sqrt(0.95 * 0.05 / runs) <= held / runs <= 0.95 + 3 * sqrt(0.0475 / runs)


def test_equal_values_give_an_interval_without_width() -> None:
    interval = bootstrap_interval([0.25] * 8, seed=3)
    assert (interval.lower, interval.estimate, interval.upper) == (0.25, 0.25, 0.25)


@pytest.mark.parametrize(
    ("values", "resamples", "message"),
    [
        ([1.0], 4000, "got 1 problems; an interval needs at least 2: evaluate more"),
        ([0.0, 1.0], 99, "resamples must be at least 100 for a 95 % interval, got 99"),
        ([0.0, nan], 4000, "got a value that is not finite"),
    ],
)
def test_intervals_that_would_say_nothing_are_refused(
    values: list[float], resamples: int, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        bootstrap_interval(values, seed=0, resamples=resamples)


def test_metrics_need_no_numpy() -> None:
    code = "import sys, reward.metrics as m; m.bootstrap_interval([0, 1], seed=0);" + (
        "print('numpy' in sys.modules)"
    )
    root = Path(reward.__file__).parents[1]
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_avg_at_k_counts_the_first_k() -> None:
    assert avg_at_k([True, False, False, True], 3) == 1 / 3
    with pytest.raises(ValueError, match="got k=5 with 4 samples"):
        avg_at_k([True] * 4, 5)


def test_majority_answer_decides() -> None:
    assert maj_at_k(["7", "24", "24"], [False, True, True], 3) == 1.0
    assert maj_at_k(["7", "7", "24"], [False, False, True], 3) == 0.0
    assert maj_at_k(["7", "24", "24"], [False, True, True], 1) == 0.0


def test_a_tied_vote_goes_to_the_answer_seen_first() -> None:
    assert maj_at_k(["24", "7"], [True, False], 2) == 1.0
    assert maj_at_k(["7", "24"], [False, True], 2) == 0.0


def test_samples_without_an_answer_do_not_vote() -> None:
    assert maj_at_k([None, None, "24"], [False, False, True], 3) == 1.0
    assert maj_at_k([None, None], [False, False], 2) == 0.0


def test_answers_and_verdicts_must_pair_up() -> None:
    with pytest.raises(ValueError, match="got 2 answers and 1 verdicts"):
        maj_at_k(["1", "2"], [True], 1)
