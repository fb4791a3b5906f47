# SPDX-License-Identifier: Apache-2.0
"""Training curves: read from a trainer's log history, grouped into panels."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple


@dataclass(frozen=True)
class RunCurve:
    """One metric of one run over its optimizer steps.

    Args:
        name: Name of the run.
        steps: Optimizer steps, rising.
        values: The metric at each step.

    Raises:
        ValueError: If the two lists differ in length, or are empty.
    """

    name: str
    steps: list[int]
    values: list[float]

    def __post_init__(self) -> None:
        """Refuse a curve without points or with unpaired ones."""
        if len(self.steps) != len(self.values) or not self.steps:
            raise ValueError(
                f"curve {self.name!r} has {len(self.steps)} steps and {len(self.values)} values; "
                "need one value for each step, and at least one: leave out a metric never logged"
            )


@dataclass(frozen=True)
class Panel:
    """One chart: the same metric of several runs.

    Args:
        title: What is shown.
        note: What it means, or its unit, in a few words.
        curves: The runs.
        reference: A horizontal line, such as the trust region's delta.
        reference_label: Its name.
    """

    title: str
    note: str
    curves: list[RunCurve]
    reference: float | None = None
    reference_label: str = ""


class _Kind(NamedTuple):
    title: str
    note: str
    keys: tuple[str, ...]


_KINDS = (
    _Kind("Reward", "mean over the rollouts of a step", ("reward", "rewards/mean")),
    _Kind("Entropy", "nats per token, mean", ("entropy",)),
    _Kind("KL divergence, k3", "to the policy that drew the rollouts", ("kl/k3", "kl")),
    _Kind("KL multiplier", "slope of the hinge; 0 inside the region", ("kl/multiplier",)),
    _Kind("log u, mean", "tracked normaliser, over the batch", ("log_u/mean", "inner/log_u", "u")),
    _Kind("log u, largest", "over the batch", ("log_u/max",)),
    _Kind("Valid groups", "share with a right and a wrong answer", ("groups/valid_fraction",)),
    _Kind("Effective negatives", "share of them that count", ("negatives/effective_fraction",)),
    _Kind("Objective", "its own estimate", ("objective", "loss")),
)


def curves_from_log_history(
    log_history: Sequence[Mapping[str, Any]] | str | Path, name: str
) -> dict[str, RunCurve]:
    """Read every numeric metric that a transformers `Trainer` logged.

    Args:
        log_history: `trainer.state.log_history`, or the path of a `trainer_state.json` or of the
            checkpoint directory that holds one.
        name: Name of the run.

    Returns:
        Metric name to curve. Values that are not finite are left out.

    Raises:
        ValueError: If an entry has no step.

    Example:
        >>> curves_from_log_history([{"step": 1, "reward": 0.5}], "DisCO")["reward"].values
        [0.5]
    """
    points: dict[str, dict[int, float]] = {}
    for entry in _entries(log_history):
        if "step" not in entry:
            raise ValueError(
                f"log entry with the keys {sorted(entry)} has no 'step'; pass the log_history of "
                "a transformers Trainer"
            )
        for key, value in entry.items():
            numeric = isinstance(value, int | float) and math.isfinite(value)
            if key not in ("step", "epoch") and numeric:
                points.setdefault(key, {})[int(entry["step"])] = float(value)
    return {
        key: RunCurve(name, sorted(values), [values[step] for step in sorted(values)])
        for key, values in points.items()
    }


def _entries(log_history: Sequence[Mapping[str, Any]] | str | Path) -> Sequence[Mapping[str, Any]]:
    if not isinstance(log_history, str | Path):
        return log_history
    path = Path(log_history)
    path = path / "trainer_state.json" if path.is_dir() else path
    return json.loads(path.read_text(encoding="utf-8"))["log_history"]


def standard_panels(
    runs: Mapping[str, Mapping[str, RunCurve]], *, delta: float | None = None
) -> list[Panel]:
    """Group the curves of several runs into the panels of the report.

    Args:
        runs: Name of the run to its curves, as `curves_from_log_history` returns them.
        delta: Radius of the KL trust region, drawn into the KL panel.

    Returns:
        The panels of which at least one run has the metric: reward, entropy, KL, multiplier, u,
        valid groups, effective negatives, objective.
    """
    panels: list[Panel] = []
    for kind in _KINDS:
        found = [
            next((curves[key] for key in kind.keys if key in curves), None)
            for curves in runs.values()
        ]
        curves = [curve for curve in found if curve is not None]
        if curves:
            line = (delta, "delta") if kind.title.startswith("KL div") else (None, "")
            panels.append(Panel(kind.title, kind.note, curves, *line))
    return panels
