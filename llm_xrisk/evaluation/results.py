# SPDX-License-Identifier: Apache-2.0
"""One table of results: a row per method, each metric with its interval and difference to base."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rich.table import Table

from llm_xrisk.evaluation.bootstrap import Bootstrap, Interval
from llm_xrisk.evaluation.compare import (
    Arm,
    Comparison,
    arm_values,
    as_runs,
    compare,
    format_range,
    format_value,
)

HEADINGS = {
    "pass@1": "pass@1, sampled (%)",
    "greedy": "greedy (%)",
    "mean_length": "mean length (tokens)",
    "truncation_rate": "truncated (%)",
}


@dataclass(frozen=True)
class Cell:
    """A metric of one method, and its paired difference to the first row (`None` in that row)."""

    interval: Interval
    to_base: Comparison | None


@dataclass(frozen=True)
class Result:
    """A row: a method's name, how many runs it has, and a cell per metric."""

    name: str
    num_runs: int
    cells: dict[str, Cell]


@dataclass(frozen=True)
class Results:
    """A table of results.

    Args:
        metrics: The columns.
        rows: The methods; the first is the base.
        num_prompts: Prompts evaluated.
        num_generations: Completions sampled per prompt.
        method: How the intervals were made.
    """

    metrics: list[str]
    rows: list[Result]
    num_prompts: int
    num_generations: int
    method: str


def heading(metric: str) -> str:
    """Return a metric's column heading, with its unit."""
    return HEADINGS.get(metric, f"{metric} (%)")


def tabulate(
    arms: Mapping[str, Arm],
    *,
    metrics: Sequence[str] | None = None,
    bootstrap: Bootstrap | None = None,
) -> Results:
    """Put methods side by side, each compared with the first.

    Args:
        arms: Name to run, or to runs that differ in their seed. The first is the base.
        metrics: Columns; by default those of the first run that all runs have.
        bootstrap: The resamples all cells share; by default 4,000 with seed 0.

    Returns:
        The table.

    Raises:
        ValueError: If there is no arm, or the runs were evaluated on different prompts.
    """
    if not arms:
        raise ValueError("got no runs; give at least one named Evaluation")
    base = next(iter(arms.values()))
    first = as_runs(base)[0]
    runs = [run for arm in arms.values() for run in as_runs(arm)]
    shared = [name for name in first.metrics if all(name in run.metrics for run in runs)]
    bootstrap = bootstrap or Bootstrap(len(first.sample_ids))

    def cell(arm: Arm, metric: str) -> Cell:
        interval = bootstrap.interval(arm_values(arm, metric, first.sample_ids))
        to_base = None if arm is base else compare(base, arm, metric=metric, bootstrap=bootstrap)
        return Cell(interval, to_base)

    columns = list(metrics or shared)
    rows = [
        Result(name, len(as_runs(arm)), {metric: cell(arm, metric) for metric in columns})
        for name, arm in arms.items()
    ]
    return Results(columns, rows, len(first.sample_ids), first.num_generations, bootstrap.method)


def results_table(results: Results) -> Table:
    """Return the results as a table for the terminal."""
    base = results.rows[0].name
    table = Table(
        title=f"Held-out results, {results.num_prompts:,} prompts",
        caption=f"Below: 95 % interval, paired difference to {base}. {results.method}.",
    )
    table.add_column("run")
    for metric in results.metrics:
        table.add_column(heading(metric), justify="right")
    for row in results.rows:
        name = row.name if row.num_runs == 1 else f"{row.name}\n{row.num_runs} seeds"
        table.add_row(name, *(_cell_text(metric, row.cells[metric]) for metric in results.metrics))
        table.add_section()
    return table


def difference_text(comparison: Comparison) -> str:
    """Return a difference with its interval, as in "+11.2 (+9.0 to +13.4)"."""
    ends = Interval(comparison.difference, comparison.lower, comparison.upper)
    value = format_value(comparison.metric, comparison.difference, signed=True)
    return f"{value} ({format_range(comparison.metric, ends, signed=True)})"


def _cell_text(metric: str, cell: Cell) -> str:
    lines = [
        f"[bold]{format_value(metric, cell.interval.estimate)}[/]",
        f"[dim]{format_range(metric, cell.interval)}[/]",
    ]
    if cell.to_base is not None:
        style = "bold" if cell.to_base.decided else "dim"
        lines.append(f"[{style}]{difference_text(cell.to_base)}[/]")
    return "\n".join(lines)
