# SPDX-License-Identifier: Apache-2.0
"""Accuracy over several samples of one problem: pass@k, avg@k, maj@k."""

from collections import Counter
from collections.abc import Hashable, Sequence
from math import comb


def pass_at_k(n: int, c: int, k: int) -> float:
    r"""Estimate the chance that at least one of k samples is right, from n samples with c right.

    .. math:: \mathrm{pass@}k = 1 - \binom{n-c}{k} \Big/ \binom{n}{k}

    This is the mean over all subsets of k of the n samples, so it is unbiased; resampling with
    replacement is not (1 right of 4 at k=4 is 1, not 0.68). Computed in integers and rounded once.

    Args:
        n: Samples drawn.
        c: Samples that are right, 0 <= c <= n.
        k: Samples allowed, 1 <= k <= n.

    Returns:
        The estimate, in [0, 1].

    Raises:
        ValueError: If k or c is out of range; with n < k there is no unbiased estimate.

    Example:
        >>> pass_at_k(4, 1, 2)
        0.5
    """
    if not 0 <= c <= n:
        raise ValueError(f"got c={c} right of n={n} samples; need 0 <= c <= n: check the counts")
    if not 1 <= k <= n:
        raise ValueError(
            f"got k={k} with n={n} samples; need 1 <= k <= n: draw at least k samples per problem "
            "or ask for a smaller k"
        )
    subsets = comb(n, k)
    return (subsets - comb(n - c, k)) / subsets


def avg_at_k(correct: Sequence[bool], k: int) -> float:
    """Return the share of right answers among the first k samples of a problem.

    Args:
        correct: Whether each sample is right, in the order drawn.
        k: Samples that count, 1 <= k <= len(correct).

    Returns:
        The share, in [0, 1].

    Raises:
        ValueError: If there are fewer than k samples.

    Example:
        >>> avg_at_k([True, False, True, True], 2)
        0.5
    """
    _check_enough(len(correct), k)
    return sum(map(bool, correct[:k])) / k


def maj_at_k(answers: Sequence[Hashable | None], correct: Sequence[bool], k: int) -> float:
    """Return whether the most frequent answer among the first k samples is right.

    Samples without an answer (`None`) don't vote. A tie goes to the answer seen first, so that the
    result is a function of the samples alone. Answers are compared as given: pass normalised ones.

    Args:
        answers: The answer extracted from each sample, in the order drawn.
        correct: Whether each sample is right.
        k: Samples that vote, 1 <= k <= len(answers).

    Returns:
        1.0 or 0.0; 0.0 if nobody votes.

    Raises:
        ValueError: If there are fewer than k samples, or the two lists differ in length.

    Example:
        >>> maj_at_k(["7", "24", "24"], [False, True, True], 3)
        1.0
    """
    if len(answers) != len(correct):
        raise ValueError(
            f"got {len(answers)} answers and {len(correct)} verdicts; need one verdict per answer"
        )
    _check_enough(len(answers), k)
    votes = Counter(answer for answer in answers[:k] if answer is not None)
    if not votes:
        return 0.0
    winner = max(votes, key=lambda answer: votes[answer])
    return float(bool(correct[list(answers).index(winner)]))


def _check_enough(n: int, k: int) -> None:
    if not 1 <= k <= n:
        raise ValueError(f"got k={k} with {n} samples; need 1 <= k <= {n}: draw more or lower k")
