"""From runs to a table: the configuration chosen on validation, its test metrics, differences."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from benchmarks.tabular.metrics import weighted

LEVELS = (0.025, 0.975)


@dataclass(frozen=True)
class Difference:
    """Mean difference of paired runs and its 95 % intervals.

    Args:
        mean: Of the seeds.
        seeds: Interval over training runs, on these test rows.
        rows: Interval over training runs and test rows, None where rows were not resampled.
    """

    mean: float
    seeds: tuple[float, float]
    rows: tuple[float, float] | None = None

    def as_json(self) -> dict[str, Any]:
        """Plain numbers."""
        rows = None if self.rows is None else list(self.rows)
        return {"mean": self.mean, "interval_seeds": list(self.seeds), "interval_rows": rows}


def over_seeds(differences: Sequence[float], resamples: int = 10_000) -> Difference:
    """Bootstrap over seeds, widened to a t: a plain one from few seeds covers too rarely.

    The deviation of a resample's mean is multiplied by sqrt(S / chi^2_{S-1}), as in
    `llm_xrisk.evaluation.bootstrap`.
    """
    values = np.asarray(differences, dtype=np.float64)
    count, rng = len(values), np.random.default_rng(0)
    draws = rng.integers(count, size=(resamples, count))
    widen = np.sqrt(count / rng.chisquare(count - 1, size=resamples))
    means = values.mean() + widen * (values[draws].mean(1) - values.mean())
    low, high = np.quantile(means, LEVELS)
    return Difference(float(values.mean()), (float(low), float(high)))


class RowResamples:
    """Metrics of every run on resampled test rows, the same rows and seeds for all methods.

    Args:
        targets: (n,) labels of the test rows; each class is resampled by itself.
        seeds: Number of runs of each method.
        resamples: How often.
    """

    def __init__(self, targets: np.ndarray, seeds: int, resamples: int = 500) -> None:
        rng = np.random.default_rng(1)
        self._counts = np.zeros((resamples, len(targets)), dtype=np.int32)
        for kind in np.unique(targets):
            rows = np.flatnonzero(targets == kind)
            share = np.full(len(rows), 1 / len(rows))
            self._counts[:, rows] = rng.multinomial(len(rows), share, size=resamples)
        self._seeds = rng.integers(seeds, size=(resamples, seeds))
        self._widen = np.sqrt(seeds / rng.chisquare(seeds - 1, size=resamples))
        self._targets = targets
        self._found: dict[tuple[str, str], np.ndarray] = {}

    def of(self, method: str, name: str, runs: Sequence[np.ndarray]) -> np.ndarray:
        """(resamples, seeds) of a metric; kept, since baselines are asked for again."""
        if (method, name) not in self._found:
            columns = [weighted(name, scores, self._targets, self._counts) for scores in runs]
            self._found[method, name] = np.stack(columns, axis=1)
        return self._found[method, name]

    def interval(self, first: np.ndarray, second: np.ndarray) -> tuple[float, float]:
        """95 % interval of the mean difference of two results of `of`."""
        gaps = first - second
        center = gaps.mean(1)
        drawn = np.take_along_axis(gaps, self._seeds, axis=1).mean(1)
        low, high = np.quantile(center + self._widen * (drawn - center), LEVELS)
        return float(low), float(high)


def best(validation: Mapping[str, Sequence[float]]) -> str:
    """The configuration of the highest mean over folds; one that gave NaN in a fold never is."""
    means = {name: float(np.mean(values)) for name, values in validation.items()}
    finite = {name: value for name, value in means.items() if np.isfinite(value)}
    if not finite:
        raise ValueError(f"all {len(means)} configurations gave NaN on validation")
    return max(finite, key=lambda name: finite[name])
