"""pass@k, avg@k and maj@k against brute force and hand arithmetic."""

from fractions import Fraction
from itertools import combinations
from math import comb

import pytest

from reward.metrics import avg_at_k, maj_at_k, pass_at_k


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


@pytest.mark.parametrize(
    ("n", "c", "k", "message"),
    [
        (4, 1, 8, "got k=8 with n=4 samples; need 1 <= k <= n"),
        (4, 1, 0, "got k=0"),
        (4, 5, 1, "got c=5 right of n=4"),
        (4, -1, 1, "got c=-1"),
    ],
)
def test_pass_at_k_refuses_counts_it_cannot_estimate_from(
    n: int, c: int, k: int, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        pass_at_k(n, c, k)


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
