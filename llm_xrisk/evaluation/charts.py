# SPDX-License-Identifier: Apache-2.0
"""Line charts and interval marks as inline SVG, coloured by the page's style sheet."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise

from llm_xrisk.evaluation.bootstrap import Interval
from llm_xrisk.evaluation.curves import Panel, RunCurve

STYLES = 6
"""Distinct combinations of colour, dash and marker; a seventh run starts again at the first."""

_DASHES = ("", "7 4", "2 3", "10 3 2 3", "4 2", "1 4")
_WIDTH, _HEIGHT = 420, 230
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 14, 12, 34


@dataclass(frozen=True)
class _Axis:
    """A linear map from data to pixels, with round ticks."""

    low: float
    high: float
    start: float
    end: float

    def place(self, value: float) -> float:
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)

    def ticks(self, wanted: int) -> list[float]:
        step = _nice_step((self.high - self.low) / wanted)
        first = math.ceil(self.low / step - 1e-9)
        last = math.floor(self.high / step + 1e-9)
        return [count * step for count in range(first, last + 1)]


def line_chart(panel: Panel, styles: dict[str, int]) -> str:
    """Draw a panel.

    Every curve has a colour, a dash pattern and a marker at its end, so that runs can be told apart
    without colour. A long curve is drawn twice: thin as it is, and thick as its running mean, which
    ends in the marker. The page's script reads `data-curves` for the values under the pointer.

    Args:
        panel: What to draw.
        styles: Name of each run to the number of its style.

    Returns:
        An `svg` element.
    """
    steps = [step for curve in panel.curves for step in curve.steps]
    values = [value for curve in panel.curves for value in curve.values]
    if panel.reference is not None:
        values.append(panel.reference)
    x = _axis(min(steps), max(steps), _LEFT, _WIDTH - _RIGHT, pad=0.0)
    y = _axis(min(values), max(values), _HEIGHT - _BOTTOM, _TOP, pad=0.06)
    parts = [_grid(x, y)]
    parts += [_curve(curve, styles[curve.name], x, y) for curve in panel.curves]
    if panel.reference is not None:
        parts.append(_reference(panel, y))
    parts.append(
        f'<line class="cross" x1="0" x2="0" y1="{_TOP}" y2="{_HEIGHT - _BOTTOM}" '
        'visibility="hidden"></line>'
    )
    data = {
        "x": [x.low, x.high, x.start, x.end],
        "curves": [
            {"name": curve.name, "style": styles[curve.name], "steps": curve.steps,
             "values": [float(f"{value:.5g}") for value in curve.values]}
            for curve in panel.curves
        ],
    }  # fmt: skip
    return (
        f'<svg class="chart" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" tabindex="0" '
        f'aria-label="{escape(describe(panel))}" data-curves="{escape(json.dumps(data))}">'
        + "".join(parts)
        + "</svg>"
    )


def describe(panel: Panel) -> str:
    """Return a panel in words, for readers who don't see it."""
    runs = "; ".join(
        f"{curve.name} from {curve.values[0]:.3g} at step {curve.steps[0]} to "
        f"{curve.values[-1]:.3g} at step {curve.steps[-1]}"
        for curve in panel.curves
    )
    line = "" if panel.reference is None else f" {panel.reference_label} is {panel.reference:.3g}."
    return f"{panel.title}, {panel.note}: {runs}.{line}"


def last_values(panel: Panel, styles: dict[str, int]) -> str:
    """Return the last value of every curve, as the line under the chart shows it at first."""
    parts = [
        f"<span>{escape(curve.name)} "
        f'<b class="s{styles[curve.name] % STYLES}">{curve.values[-1]:.4g}</b></span>'
        for curve in panel.curves
    ]
    return f"<span>last</span>{''.join(parts)}"


def running_mean(values: Sequence[float]) -> list[float]:
    """Return centred means over about a twelfth of the curve; of short curves, the values.

    Near the ends the window narrows symmetrically, so that a trend is not flattened there.

    Example:
        >>> running_mean([1.0, 2.0, 4.0])
        [1.0, 2.0, 4.0]
    """
    half = len(values) // 24
    means: list[float] = []
    for place in range(len(values)):
        reach = min(half, max(place, 1), max(len(values) - 1 - place, 1))
        window = values[max(0, place - reach) : place + reach + 1] if half else [values[place]]
        means.append(sum(window) / len(window))
    return means


def swatch(style: int) -> str:
    """Draw the line and marker of a style, for a legend."""
    style %= STYLES
    dash = f' stroke-dasharray="{_DASHES[style]}"' if _DASHES[style] else ""
    return (
        f'<svg class="swatch s{style}" viewBox="0 0 34 12" aria-hidden="true">'
        f'<line x1="0" x2="28" y1="6" y2="6"{dash}></line>{_marker(style, 28, 6)}</svg>'
    )


def interval_mark(interval: Interval, *, low: float, high: float, base: float) -> str:
    """Draw an interval as a whisker with a dot, and the base's estimate as a tick.

    Args:
        interval: What to draw.
        low: Left end of the scale, shared by the column.
        high: Right end.
        base: Where the tick goes.

    Returns:
        An `svg` element; it repeats the numbers beside it and is hidden from screen readers.
    """
    axis = _axis(low, high, 5, 115, pad=0.0)
    left, dot, right, tick = (
        f"{axis.place(value):.1f}"
        for value in (interval.lower, interval.estimate, interval.upper, base)
    )
    return (
        '<svg class="mark" viewBox="0 0 120 14" aria-hidden="true">'
        f'<line class="tick" x1="{tick}" x2="{tick}" y1="1" y2="13"></line>'
        f'<line class="whisker" x1="{left}" x2="{right}" y1="7" y2="7"></line>'
        f'<circle cx="{dot}" cy="7" r="3.5"></circle></svg>'
    )


def _axis(low: float, high: float, start: float, end: float, *, pad: float) -> _Axis:
    span = high - low
    if span <= 0:
        span = abs(low) or 1.0
        low, high = low - span / 2, high + span / 2
    return _Axis(low - pad * span, high + pad * span, start, end)


def _nice_step(raw: float) -> float:
    power = 10.0 ** math.floor(math.log10(raw))
    return next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= raw * 0.999)


def _tick_labels(ticks: Sequence[float]) -> list[str]:
    """Return labels of equal precision: enough to tell neighbours apart, short for large ones."""
    step = min((after - before for before, after in pairwise(ticks)), default=1.0)
    largest = max(map(abs, ticks), default=0.0)
    if largest >= 1e5 or largest < 1e-3:
        return [f"{tick:.3g}" if abs(tick) > step / 2 else "0" for tick in ticks]
    decimals = max(0, -math.floor(math.log10(step) + 1e-9))
    if round(step * 10**decimals, 6) % 1:
        decimals += 1
    return [f"{tick:.{decimals}f}" if abs(tick) > step / 2 else "0" for tick in ticks]


def _grid(x: _Axis, y: _Axis) -> str:
    left, right, bottom = _LEFT, _WIDTH - _RIGHT, _HEIGHT - _BOTTOM
    parts = [f'<line class="axis" x1="{left}" x2="{right}" y1="{bottom}" y2="{bottom}"></line>']
    y_ticks, x_ticks = y.ticks(4), [tick for tick in x.ticks(5) if tick == round(tick)]
    for tick, label in zip(y_ticks, _tick_labels(y_ticks), strict=True):
        place = f"{y.place(tick):.1f}"
        parts.append(
            f'<line class="grid" x1="{left}" x2="{right}" y1="{place}" y2="{place}"></line>'
            f'<text x="{left - 6}" y="{place}" dy="0.32em" text-anchor="end">{label}</text>'
        )
    for tick in x_ticks:
        place = f"{x.place(tick):.1f}"
        parts.append(f'<text x="{place}" y="{bottom + 16}" text-anchor="middle">{tick:g}</text>')
    middle = (left + right) / 2
    parts.append(f'<text x="{middle}" y="{_HEIGHT - 3}" text-anchor="middle">step</text>')
    return "".join(parts)


def _reference(panel: Panel, y: _Axis) -> str:
    place = y.place(panel.reference or 0.0)
    label = escape(f"{panel.reference_label} = {panel.reference:g}")
    return (
        f'<line class="reference" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{place:.1f}" '
        f'y2="{place:.1f}"></line>'
        f'<text class="reference-label" x="{_WIDTH - _RIGHT}" y="{place - 5:.1f}" '
        f'text-anchor="end">{label}</text>'
    )


def _curve(curve: RunCurve, style: int, x: _Axis, y: _Axis) -> str:
    style %= STYLES
    mean = running_mean(curve.values)
    dash = f' stroke-dasharray="{_DASHES[style]}"' if _DASHES[style] else ""
    thin = ""
    if mean != curve.values:
        thin = (
            f'<polyline class="raw" points="{_points(curve.steps, curve.values, x, y)}"></polyline>'
        )
    marker = _marker(style, x.place(curve.steps[-1]), y.place(mean[-1]))
    return (
        f'<g class="curve s{style}" data-run="{escape(curve.name)}">{thin}'
        f'<polyline points="{_points(curve.steps, mean, x, y)}"{dash}></polyline>{marker}</g>'
    )


def _points(steps: Sequence[int], values: Sequence[float], x: _Axis, y: _Axis) -> str:
    return " ".join(
        f"{x.place(step):.1f},{y.place(value):.1f}"
        for step, value in zip(steps, values, strict=True)
    )


def _marker(style: int, x: float, y: float) -> str:
    if style == 0:
        return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.6"></circle>'
    corners = (
        ((-3.4, -3.4), (3.4, -3.4), (3.4, 3.4), (-3.4, 3.4)),
        ((0, -4.4), (4.2, 3.4), (-4.2, 3.4)),
        ((0, -4.8), (4.8, 0), (0, 4.8), (-4.8, 0)),
        ((-4.2, -3.4), (4.2, -3.4), (0, 4.4)),
        ((-4.4, -1.3), (4.4, -1.3), (4.4, 1.3), (-4.4, 1.3)),
    )[style - 1]
    points = " ".join(f"{x + dx:.1f},{y + dy:.1f}" for dx, dy in corners)
    return f'<polygon points="{points}"></polygon>'
