# SPDX-License-Identifier: Apache-2.0
"""Intervals by resampling prompts, and seeds where there are several runs."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Values = NDArray[np.float64]

LEVELS = (0.025, 0.975)


@dataclass(frozen=True)
class Interval:
    """An estimate and its 95 % interval."""

    estimate: float
    lower: float
    upper: float


class Bootstrap:
    r"""One set of resamples of prompts and seeds, shared by everything that is to be compared.

    A resample draws n prompts with replacement and, for runs with S > 1 seeds, S seeds with
    replacement; both arms of a comparison get the same draws, so what they share cancels. The mean
    of a resample is linear in the values:

    .. math:: \bar v^* = \bar m^* + \sqrt{S / \chi^2_{S-1}} \, \sum_s (w_s - 1/S) \, m_s^*

    with :math:`m_s^*` the mean of run s over the resampled prompts, :math:`\bar m^*` their mean and
    :math:`w_s` the share of run s among the resampled seeds. The factor turns the seeds' deviation
    from a bootstrap normal into a t with S - 1 degrees of freedom: a plain percentile interval from
    5 seeds covers too rarely. Without it (S = 1) this is the percentile bootstrap over prompts.

    Args:
        num_prompts: n.
        resamples: How often to resample.
        seed: Makes the result a function of the data.

    Raises:
        ValueError: If there are fewer than 2 prompts or fewer than 100 resamples.

    Example:
        >>> import numpy as np
        >>> interval = Bootstrap(4).interval(np.array([0.0, 1.0, 1.0, 1.0]))
        >>> interval.estimate, interval.lower < 0.75 < interval.upper
        (0.75, True)
    """

    def __init__(self, num_prompts: int, *, resamples: int = 4000, seed: int = 0) -> None:
        if num_prompts < 2:
            raise ValueError(
                f"got {num_prompts} prompts; an interval needs at least 2: evaluate more"
            )
        if resamples < 100:
            raise ValueError(f"resamples must be at least 100 for a 95 % interval, got {resamples}")
        self.num_prompts, self.resamples, self.seed = num_prompts, resamples, seed
        rng = np.random.default_rng(seed)
        uniform = np.full(num_prompts, 1 / num_prompts)
        counts = rng.multinomial(num_prompts, uniform, size=resamples)
        self._prompt_weights: Values = counts / num_prompts  # (R, n)

    @property
    def method(self) -> str:
        """How the intervals were made, in words for a report."""
        return (
            f"95 % percentile bootstrap over {self.num_prompts:,} prompts and, where there are "
            f"several, over seeds; {self.resamples:,} resamples, seed {self.seed}"
        )

    def means(self, values: Values) -> Values:
        """Return the mean of the values in each resample.

        Args:
            values: (n,) for one run, (S, n) for S runs on the same prompts.

        Returns:
            (R,), in the order of the resamples.
        """
        runs = self._check(values)
        per_run = self._prompt_weights @ runs.T  # (R, S)
        num_runs = len(runs)
        if num_runs == 1:
            return per_run[:, 0]
        rng = np.random.default_rng([self.seed, num_runs])
        uniform = np.full(num_runs, 1 / num_runs)
        shares = rng.multinomial(num_runs, uniform, size=self.resamples) / num_runs  # (R, S)
        widen = np.sqrt(num_runs / rng.chisquare(num_runs - 1, size=self.resamples))
        return per_run.mean(axis=1) + widen * ((shares - 1 / num_runs) * per_run).sum(axis=1)

    def interval(self, values: Values) -> Interval:
        """Return the mean of the values with its 95 % interval.

        Values that are all equal give an interval of width zero: the sample holds no sign of the
        variation there may be.

        Args:
            values: (n,) for one run, (S, n) for S runs on the same prompts.

        Returns:
            The mean over prompts and runs, and its 2.5 % and 97.5 % quantiles over resamples.
        """
        lower, upper = np.quantile(self.means(values), LEVELS)
        return Interval(float(np.mean(values)), float(lower), float(upper))

    def _check(self, values: Values) -> Values:
        runs = np.atleast_2d(np.asarray(values, dtype=np.float64))
        if runs.ndim != 2 or runs.shape[1] != self.num_prompts:
            raise ValueError(
                f"got values of shape {np.shape(values)}; need (prompts,) or (runs, prompts) with "
                f"{self.num_prompts} prompts: evaluate all runs on the same prompts"
            )
        return runs
