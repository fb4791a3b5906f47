# SPDX-License-Identifier: Apache-2.0
"""One HTML file that shows what was run, what came out, and what the model wrote."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from html import escape
from importlib.resources import files
from itertools import groupby
from pathlib import Path

from llm_xrisk.data.pool_writer import replace_file
from llm_xrisk.evaluation.bootstrap import Bootstrap
from llm_xrisk.evaluation.charts import STYLES, interval_mark, last_values, line_chart, swatch
from llm_xrisk.evaluation.compare import Arm, as_runs, format_range, format_value
from llm_xrisk.evaluation.curves import Panel
from llm_xrisk.evaluation.pass_at_k import CompletionSample, Evaluation
from llm_xrisk.evaluation.results import Cell, Result, Results, difference_text, heading, tabulate

MAX_TEXT = 4000
"""Characters of a completion that are shown; what is left out is counted."""


@dataclass(frozen=True)
class Report:
    """What a report shows.

    Args:
        title: Heading of the page.
        summary: One paragraph under it.
        arms: Name of each method to its run, or to its runs over seeds; the first is the base all
            others are compared with. Completions are those of an arm's first run.
        panels: Training curves, as `standard_panels` makes them.
        facts: Name to value: versions, seeds, hardware, wall times, size of the evaluation set.
        metrics: Columns of the table; by default all that every run has.
    """

    title: str
    summary: str
    arms: Mapping[str, Arm]
    panels: Sequence[Panel] = ()
    facts: Mapping[str, object] = field(default_factory=dict)
    metrics: Sequence[str] | None = None


def write_report(report: Report, path: str | Path) -> Path:
    """Render a report and write it, whole or not at all.

    Args:
        report: What to show.
        path: Where the HTML file goes.

    Returns:
        The path.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, render_report(report).encode(errors="replace"))
    return path


def render_report(report: Report, *, bootstrap: Bootstrap | None = None) -> str:
    """Render a report as a self-contained page.

    The page loads nothing: style, script and pictures are inside, and a content security policy
    forbids the rest. It follows the reader's light or dark setting, tells runs apart by dash and
    marker as well as by colour, and shows tables and curves without its script too.

    Args:
        report: What to show.
        bootstrap: The resamples behind the intervals; by default 4,000 with seed 0.

    Returns:
        The HTML text.
    """
    results = tabulate(report.arms, metrics=report.metrics, bootstrap=bootstrap)
    sections = [
        _header(report),
        _results_section(results, report.arms),
        _curves_section(report),
        _completions_section(report.arms),
    ]
    return "\n".join(
        [
            '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
            '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; '
            "style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:\">",
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            '<meta name="color-scheme" content="light dark"><link rel="icon" href="data:,">',
            f"<title>{escape(report.title)}</title>",
            f"<style>\n{_asset('report.css')}</style>\n</head>\n<body>",
            *filter(None, sections),
            f"<script>\n{_asset('report.js')}</script>\n</body>\n</html>\n",
        ]
    )


def _asset(name: str) -> str:
    return (files("llm_xrisk.evaluation") / name).read_text(encoding="utf-8")


def _header(report: Report) -> str:
    facts = "".join(
        f"<div><dt>{escape(name)}</dt><dd>{escape(str(value))}</dd></div>"
        for name, value in report.facts.items()
    )
    return (
        '<header><button id="theme" type="button" hidden>Dark</button>'
        f'<h1>{escape(report.title)}</h1><p class="lead">{escape(report.summary)}</p>'
        + (f'<dl class="facts">{facts}</dl>' if facts else "")
        + "</header>\n<main>"
    )


def _results_section(results: Results, arms: Mapping[str, Arm]) -> str:
    settings = {name: sampling_text(as_runs(arm)[0]) for name, arm in arms.items()}
    common = len(set(settings.values())) == 1
    columns = "".join(
        f'<th scope="col" role="columnheader">{escape(heading(metric))}</th>'
        for metric in results.metrics
    )
    scales = {metric: _scale(results.rows, metric) for metric in results.metrics}
    rows = "".join(
        _result_row(row, results, scales, "" if common else settings[row.name])
        for row in results.rows
    )
    base = escape(results.rows[0].name)
    shared = f" Sampled with {escape(next(iter(settings.values())))}." if common else ""
    return (
        '<section aria-labelledby="results"><h2 id="results">Results</h2>'
        f'<p class="note">{results.num_prompts:,} held-out prompts, {results.num_generations} '
        f"completions sampled of each.{shared} Under each value its 95&nbsp;% interval, and its "
        f"paired difference to {base}; a difference in bold has an interval without 0. The "
        f"vertical tick marks {base}.</p>"
        '<table class="results" role="table"><thead role="rowgroup"><tr role="row">'
        f'<th scope="col" role="columnheader">Run</th>{columns}</tr></thead>'
        f'<tbody role="rowgroup">{rows}</tbody></table>'
        f'<p class="note">Intervals: {escape(results.method)}.</p></section>'
    )


def sampling_text(run: Evaluation) -> str:
    """Return a run's sampling settings in words."""
    used, parts = run.sampling, []
    if "temperature" in used:
        parts.append(f"temperature {used['temperature']:g}")
    if used.get("top_p", 1) < 1:
        parts.append(f"top-p {used['top_p']:g}")
    if used.get("top_k", 0) > 0:
        parts.append(f"top-k {used['top_k']}")
    if "max_new_tokens" in used:
        parts.append(f"at most {used['max_new_tokens']} tokens")
    return ", ".join(parts) or "settings not recorded"


def _scale(rows: Sequence[Result], metric: str) -> tuple[float, float]:
    intervals = [row.cells[metric].interval for row in rows]
    low, high = min(i.lower for i in intervals), max(i.upper for i in intervals)
    return (low, high) if high > low else (low - 0.5, high + 0.5)


def _result_row(
    row: Result, results: Results, scales: Mapping[str, tuple[float, float]], settings: str
) -> str:
    seeds = f"<small>{row.num_runs} seeds</small>" if row.num_runs > 1 else ""
    seeds += f"<small>{escape(settings)}</small>" if settings else ""
    cells = "".join(
        _result_cell(
            metric,
            row.cells[metric],
            scales[metric],
            results.rows[0].cells[metric].interval.estimate,
        )
        for metric in results.metrics
    )
    return (
        f'<tr role="row"><th scope="row" role="rowheader">{escape(row.name)}{seeds}</th>'
        f"{cells}</tr>"
    )


def _result_cell(metric: str, cell: Cell, scale: tuple[float, float], base: float) -> str:
    mark = interval_mark(cell.interval, low=scale[0], high=scale[1], base=base)
    difference = '<span class="difference base">base</span>'
    if cell.to_base is not None:
        kind = "decided" if cell.to_base.decided else "open"
        text = _minus(difference_text(cell.to_base))
        difference = f'<span class="difference {kind}">{text}</span>'
    return (
        f'<td role="cell" data-label="{escape(heading(metric))}"><div>'
        f'<span class="value">{_minus(format_value(metric, cell.interval.estimate))}</span> '
        f'<span class="range">{_minus(format_range(metric, cell.interval))}</span>'
        f"{mark}{difference}</div></td>"
    )


def _minus(text: str) -> str:
    return text.replace("-", "&minus;")


def _curves_section(report: Report) -> str:
    if not report.panels:
        return ""
    names = list(dict.fromkeys(curve.name for panel in report.panels for curve in panel.curves))
    order = [*report.arms, *(name for name in names if name not in report.arms)]
    names.sort(key=order.index)
    styles = {name: order.index(name) % STYLES for name in names}
    legend = "".join(
        f'<button type="button" aria-pressed="true" data-run="{escape(name)}">'
        f"{swatch(styles[name])}{escape(name)}</button>"
        for name in names
    )
    panels = [
        replace(panel, curves=sorted(panel.curves, key=lambda curve: order.index(curve.name)))
        for panel in report.panels
    ]
    figures = "".join(
        f"<figure><figcaption><b>{escape(panel.title)}</b> {escape(panel.note)}</figcaption>"
        f'{line_chart(panel, styles)}<p class="readout" aria-live="polite">'
        f"{last_values(panel, styles)}</p></figure>"
        for panel in panels
    )
    return (
        '<section aria-labelledby="curves"><h2 id="curves">Training curves</h2>'
        '<p class="note">Point at a chart, or focus it and press the arrow keys, to read all '
        "charts at one step. Thick lines are running means, thin ones the values that are read "
        "out. A name hides or shows its run.</p>"
        f'<div class="legend" role="group" aria-label="Runs shown">{legend}</div>'
        f'<div class="charts">{figures}</div></section>'
    )


def _completions_section(arms: Mapping[str, Arm]) -> str:
    grouped = {name: _by_prompt(as_runs(arm)[0]) for name, arm in arms.items()}
    prompts = list(dict.fromkeys(key for found in grouped.values() for key in found))
    if not prompts:
        return "</main>"
    columns = "".join(f'<th scope="col" role="columnheader">{escape(name)}</th>' for name in arms)
    rows = "".join(_prompt_row(key, grouped) for key in prompts)
    choices = "".join(
        f'<option value="{place}">{escape(name)}</option>' for place, name in enumerate(arms)
    )
    base = escape(next(iter(arms)))
    return (
        '<section aria-labelledby="completions"><h2 id="completions">Completions</h2>'
        f'<p class="note">{len(prompts)} prompts, evenly spread over the evaluation set. The first '
        "line of a cell is the greedy answer, where there is one, and decides its verdict; the "
        f"others are sampled. Changed, marked by a bar: the verdict is not that of {base}.</p>"
        '<form id="filters" hidden><label>Run <select id="run"><option value="">any</option>'
        f'{choices}</select></label><label>Verdict <select id="verdict"><option value="">all'
        '</option><option value="right">right</option><option value="wrong">wrong</option><option '
        'value="changed">changed</option></select></label><label>Search <input id="search" '
        'type="search" autocomplete="off"></label></form>'
        '<table class="completions" role="table"><thead role="rowgroup"><tr role="row"><th '
        'scope="col" role="columnheader">Prompt</th><th scope="col" role="columnheader">Gold</th>'
        f'{columns}</tr></thead><tbody id="rows" role="rowgroup">{rows}</tbody></table>'
        '<nav id="pages" aria-label="Pages of completions" hidden><button type="button" '
        'id="previous">Previous</button><span id="place" aria-live="polite"></span><button '
        'type="button" id="next">Next</button></nav></section></main>'
    )


def _by_prompt(run: Evaluation) -> dict[int, list[CompletionSample]]:
    ordered = sorted(run.samples, key=lambda sample: (sample.sample_id, not sample.greedy))
    return {key: list(group) for key, group in groupby(ordered, lambda sample: sample.sample_id)}


def _prompt_row(key: int, grouped: Mapping[str, Mapping[int, list[CompletionSample]]]) -> str:
    first = next(found[key][0] for found in grouped.values() if key in found)
    base = next(iter(grouped.values())).get(key)
    cells: list[str] = []
    for name, found in grouped.items():
        samples = found.get(key)
        if samples is None:
            cells.append(f'<td role="cell" data-label="{escape(name)}"><div>not kept</div></td>')
            continue
        changed = base is not None and samples[0].correct != base[0].correct
        state = f"{'right' if samples[0].correct else 'wrong'}{' changed' if changed else ''}"
        answers = "".join(map(_answer, samples))
        cells.append(
            f'<td role="cell" data-label="{escape(name)}" data-state="{state}" title="{state}">'
            f"<div>{answers}</div></td>"
        )
    return (
        f'<tr role="row"><th scope="row" role="rowheader"><pre>{_clipped(first.prompt)}</pre>'
        f'<small>id {key}</small></th><td role="cell" data-label="Gold" class="gold"><pre>'
        f"{_clipped(first.gold)}</pre></td>{''.join(cells)}</tr>"
    )


def _answer(sample: CompletionSample) -> str:
    verdict, glyph = ("right", "\N{CHECK MARK}") if sample.correct else ("wrong", "\N{BALLOT X}")
    how = "greedy" if sample.greedy else "sampled"
    cut = " <small>cut at the limit</small>" if sample.truncated else ""
    text = _clipped(sample.text) or '<span class="empty">(empty)</span>'
    return (
        f'<div class="answer {how} {verdict}"><span class="glyph" role="img" '
        f'aria-label="{how}, {verdict}">{glyph}</span><pre>{text}</pre>{cut}</div>'
    )


def _clipped(text: str) -> str:
    if len(text) <= MAX_TEXT:
        return escape(text)
    return f"{escape(text[:MAX_TEXT])} ({len(text) - MAX_TEXT:,} more characters)"
