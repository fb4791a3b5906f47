# SPDX-License-Identifier: Apache-2.0
"""Accuracy over several samples of one problem, pass@k and its kin, and intervals over problems."""

from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from math import comb, fsum, isfinite
from random import Random


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
    _check_counts(n, c, k)
    subsets = comb(n, k)
    return (subsets - comb(n - c, k)) / subsets


def pass_hat_k(n: int, c: int, k: int) -> float:
    r"""Estimate the chance that all of k samples are right, from n samples with c right.

    .. math:: \mathrm{pass}^k = \binom{c}{k} \Big/ \binom{n}{k}

    What counts where every answer is used, as pass@k does where one can be picked. The mean over
    all subsets of k of the n samples, so unbiased; :math:`(c/n)^k` is not. Equal to pass@k at k=1.

    Args:
        n: Samples drawn.
        c: Samples that are right, 0 <= c <= n.
        k: Samples that must all be right, 1 <= k <= n.

    Returns:
        The estimate, in [0, 1].

    Raises:
        ValueError: If k or c is out of range; with n < k there is no unbiased estimate.

    Example:
        >>> pass_hat_k(4, 3, 2)
        0.5
    """
    _check_counts(n, c, k)
    return comb(c, k) / comb(n, k)


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


@dataclass(frozen=True)
class Interval:
    """An estimate and its 95 % interval."""

    estimate: float
    lower: float
    upper: float


def bootstrap_interval(values: Sequence[float], *, seed: int, resamples: int = 4000) -> Interval:
    """Return the mean over problems with its 95 % interval.

    The percentile bootstrap: problems are drawn with replacement, and the interval runs from the
    2.5 % to the 97.5 % quantile of the resampled means. That is the convention of
    `llm_xrisk.evaluation.bootstrap` for one run, with other random numbers. Samples of a problem
    are not resampled: each problem gives one value, such as its pass@k, and problems may have
    different numbers of samples. Values that are all equal give an interval of width zero.

    Args:
        values: One value per problem.
        seed: Makes the result a function of the values.
        resamples: How often to resample, at least 100.

    Returns:
        The mean and its interval.

    Raises:
        ValueError: If there are fewer than 2 problems or 100 resamples, or a value is not finite.

    Example:
        >>> interval = bootstrap_interval([0.0, 1.0, 1.0, 1.0], seed=0)
        >>> interval.estimate, interval.lower < 0.75 < interval.upper
        (0.75, True)
    """
    if len(values) < 2:
        raise ValueError(f"got {len(values)} problems; an interval needs at least 2: evaluate more")
    if resamples < 100:
        raise ValueError(f"resamples must be at least 100 for a 95 % interval, got {resamples}")
    if not all(map(isfinite, values)):
        raise ValueError("got a value that is not finite; leave out problems that have none")
    n, draw = len(values), Random(seed).choices
    means = sorted(fsum(draw(values, k=n)) / n for _ in range(resamples))
    lower, upper = (_quantile(means, level) for level in (0.025, 0.975))
    return Interval(fsum(values) / n, lower, upper)


def _quantile(ordered: Sequence[float], level: float) -> float:
    """Interpolate between the two nearest values, as numpy does by default."""
    place = level * (len(ordered) - 1)
    below = int(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (place - below) * (ordered[above] - ordered[below])


def _check_counts(n: int, c: int, k: int) -> None:
    if not 0 <= c <= n:
        raise ValueError(f"got c={c} right of n={n} samples; need 0 <= c <= n: check the counts")
    if not 1 <= k <= n:
        raise ValueError(
            f"got k={k} with n={n} samples; need 1 <= k <= n: draw at least k samples per problem "
            "or ask for a smaller k"
        )


def _check_enough(n: int, k: int) -> None:
    if not 1 <= k <= n:
        raise ValueError(f"got k={k} with {n} samples; need 1 <= k <= {n}: draw more or lower k")
