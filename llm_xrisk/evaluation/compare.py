# SPDX-License-Identifier: Apache-2.0
"""Is one policy better than another? Paired differences over prompts and seeds, with intervals."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist

import numpy as np
from rich.table import Table

from llm_xrisk.evaluation.bootstrap import Bootstrap, Interval, Values
from llm_xrisk.evaluation.pass_at_k import Evaluation

Arm = Evaluation | Sequence[Evaluation]
"""One run, or runs of one method that differ in their seed."""

_POWER = 0.8
_SHARES = ("pass@", "greedy", "truncation_rate")


@dataclass(frozen=True)
class Comparison:
    """The difference candidate minus baseline in one metric.

    Args:
        metric: What is compared.
        baseline: Name of the first arm.
        candidate: Name of the second.
        baseline_mean: The metric of the first.
        candidate_mean: The metric of the second.
        difference: Second minus first.
        lower: Lower end of the paired 95 % interval.
        upper: Upper end.
        minimum_detectable: The true difference that a comparison of this size would tell from zero
            in 80 % of repetitions (two-sided, 5 %): 1.43 times half the interval.
        num_prompts: Prompts paired.
        num_seeds: Runs paired.
        method: How the interval was made.
    """

    metric: str
    baseline: str
    candidate: str
    baseline_mean: float
    candidate_mean: float
    difference: float
    lower: float
    upper: float
    minimum_detectable: float
    num_prompts: int
    num_seeds: int
    method: str

    @property
    def decided(self) -> bool:
        """Whether the interval excludes zero."""
        return self.lower > 0 or self.upper < 0


def as_runs(arm: Arm) -> list[Evaluation]:
    """Return an arm as the list of its runs.

    Raises:
        ValueError: If the arm has no run.
    """
    runs = [arm] if isinstance(arm, Evaluation) else list(arm)
    if not runs:
        raise ValueError("got an arm without runs; give at least one Evaluation")
    return runs


def arm_values(arm: Arm, metric: str, sample_ids: Sequence[int]) -> Values:
    """Return the metric of every run on the same prompts in the same order.

    Args:
        arm: One run or several.
        metric: One of `Evaluation.metrics`.
        sample_ids: The prompts, in the order wanted.

    Returns:
        (runs, prompts).

    Raises:
        ValueError: If a run was evaluated on other prompts.
    """
    rows: list[Values] = []
    for run in as_runs(arm):
        if set(run.sample_ids) != set(sample_ids):
            shared = len(set(run.sample_ids) & set(sample_ids))
            raise ValueError(
                f"run {run.name!r} has {len(run.sample_ids)} prompts, of which {shared} are among "
                f"the {len(sample_ids)} of the first run; a paired comparison needs the same "
                "prompts: evaluate both on the same rows"
            )
        place = {sample_id: position for position, sample_id in enumerate(run.sample_ids)}
        rows.append(run.values(metric)[[place[sample_id] for sample_id in sample_ids]])
    return np.stack(rows)


def paired_differences(baseline: Arm, candidate: Arm, metric: str) -> Values:
    """Return candidate minus baseline for every pair of runs and every prompt.

    Runs are paired in the order given; a single baseline, such as a base model, is paired with
    every run of the candidate, and the other way round.

    Returns:
        (pairs, prompts).

    Raises:
        ValueError: If the arms have different numbers of runs, neither being one, or other prompts.
    """
    sizes = len(as_runs(baseline)), len(as_runs(candidate))
    if sizes[0] != sizes[1] and 1 not in sizes:
        raise ValueError(
            f"got {sizes[0]} and {sizes[1]} runs; need the same number in both arms, paired by "
            "seed, or one run in one of them: leave out the runs without a partner"
        )
    sample_ids = as_runs(baseline)[0].sample_ids
    return arm_values(candidate, metric, sample_ids) - arm_values(baseline, metric, sample_ids)


def compare(
    baseline: Arm,
    candidate: Arm,
    *,
    metric: str = "pass@1",
    bootstrap: Bootstrap | None = None,
) -> Comparison:
    """Compare two policies on the same prompts.

    Args:
        baseline: One run, or several that differ in their seed.
        candidate: Likewise; runs are paired in order.
        metric: One of `Evaluation.metrics`.
        bootstrap: The resamples to use; by default 4,000 with seed 0.

    Returns:
        The difference with its paired 95 % interval.

    Raises:
        ValueError: If the arms cannot be paired; the message says why.

    Example:
        >>> base = Evaluation("base", [0, 1, 2], 1, [0, 0, 1], [1.0] * 3, [0] * 3)
        >>> better = Evaluation("better", [0, 1, 2], 1, [1, 0, 1], [1.0] * 3, [0] * 3)
        >>> round(compare(base, better).difference, 3)
        0.333
    """
    differences = paired_differences(baseline, candidate, metric)
    bootstrap = bootstrap or Bootstrap(differences.shape[1])
    found = bootstrap.interval(differences)
    z = NormalDist().inv_cdf
    detectable = (z(0.975) + z(_POWER)) / z(0.975) * (found.upper - found.lower) / 2
    return Comparison(
        metric=metric,
        baseline=as_runs(baseline)[0].name,
        candidate=as_runs(candidate)[0].name,
        baseline_mean=_arm_mean(baseline, metric),
        candidate_mean=_arm_mean(candidate, metric),
        difference=found.estimate,
        lower=found.lower,
        upper=found.upper,
        minimum_detectable=detectable,
        num_prompts=differences.shape[1],
        num_seeds=differences.shape[0],
        method=bootstrap.method,
    )


def compare_files(
    baseline: Sequence[str | Path],
    candidate: Sequence[str | Path],
    *,
    metrics: Sequence[str] | None = None,
    resamples: int = 4000,
    seed: int = 0,
) -> list[Comparison]:
    """Compare evaluations that `Evaluation.save` wrote, in every metric that all of them have.

    Args:
        baseline: Files of the first arm, one per seed.
        candidate: Files of the second, in the same order of seeds.
        metrics: Which metrics; by default those that all runs have.
        resamples: Resamples of the bootstrap.
        seed: Its seed.

    Returns:
        One comparison per metric.
    """
    arms = [[Evaluation.load(path) for path in paths] for paths in (baseline, candidate)]
    first = as_runs(arms[0])[0]
    runs = [run for arm in arms for run in arm]
    names = metrics or [name for name in first.metrics if all(name in r.metrics for r in runs)]
    bootstrap = Bootstrap(len(first.sample_ids), resamples=resamples, seed=seed)
    return [compare(arms[0], arms[1], metric=name, bootstrap=bootstrap) for name in names]


def comparison_table(comparisons: Sequence[Comparison]) -> Table:
    """Return comparisons as a table for the terminal."""
    table = Table(title="Paired comparison", caption=comparisons[0].method if comparisons else None)
    for heading in ("metric", "baseline", "candidate", "difference", "95 % interval", "detectable"):
        table.add_column(heading, justify="left" if heading == "metric" else "right")
    for row in comparisons:
        table.add_row(
            row.metric,
            f"{row.baseline} {format_value(row.metric, row.baseline_mean)}",
            f"{row.candidate} {format_value(row.metric, row.candidate_mean)}",
            format_value(row.metric, row.difference, signed=True),
            format_range(row.metric, Interval(row.difference, row.lower, row.upper), signed=True),
            format_value(row.metric, row.minimum_detectable),
            style="bold" if row.decided else None,
        )
    return table


def format_value(metric: str, value: float, *, signed: bool = False) -> str:
    """Return a value as tables show it: shares in per cent with one decimal, others with two.

    Example:
        >>> format_value("pass@1", 0.1234), format_value("mean_length", -1.5, signed=True)
        ('12.3', '-1.50')
    """
    share = metric.startswith(_SHARES)
    text = f"{100 * value if share else value:{'+' if signed else ''}.{1 if share else 2}f}"
    return text if text.strip("+-0.") else text.lstrip("+-")


def format_range(metric: str, interval: Interval, *, signed: bool = False) -> str:
    """Return the two ends of an interval as tables show them.

    Example:
        >>> format_range("greedy", Interval(0.3, 0.25, 0.35))
        '25.0 to 35.0'
    """
    lower, upper = (
        format_value(metric, end, signed=signed) for end in (interval.lower, interval.upper)
    )
    return f"{lower} to {upper}"


def _arm_mean(arm: Arm, metric: str) -> float:
    return float(np.mean([run.mean(metric) for run in as_runs(arm)]))
