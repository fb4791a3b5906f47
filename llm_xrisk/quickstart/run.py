"""Run the main job for one or several seeds; print its table, write its report."""

import json
import os
import platform
import time
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console

from llm_xrisk.evaluation.compare import compare
from llm_xrisk.evaluation.curves import curves_from_log_history, standard_panels
from llm_xrisk.evaluation.pass_at_k import Evaluation
from llm_xrisk.evaluation.report import Report, write_report
from llm_xrisk.evaluation.results import Results, results_table, tabulate
from llm_xrisk.quickstart.config import QuickstartConfig
from llm_xrisk.quickstart.job import MainJob, SeedResult
from llm_xrisk.quickstart.stages import Stages, stage_progress

_PACKAGES = ("torch", "transformers", "llm-xrisk")
_COLUMNS = ("pass@1", "greedy", "pass@8", "mean_length")


def run(config: QuickstartConfig, console: Console | None = None) -> dict[str, Any]:
    """Do the main job and show what came out.

    Args:
        config: Settings.
        console: Where to print.

    Returns:
        The summary that is written beside the report: table, comparisons, AUCs, facts.
    """
    console = console or Console()
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # not used here; unset, it warns of no GPU
    transformers.utils.logging.set_verbosity_error()  # pyright: ignore[reportAttributeAccessIssue]
    transformers.utils.logging.disable_progress_bar()  # pyright: ignore[reportAttributeAccessIssue]
    root, start = Path(config.output_dir), time.perf_counter()
    console.print(
        f"[bold]llm-xrisk quickstart[/bold]: {config.eval_questions} held-out questions, "
        f"{config.eval_samples} sampled answers each, seeds {config.seed} to "
        f"{config.seed + config.seeds - 1}, {torch.get_num_threads()} threads"
    )
    results: list[SeedResult] = []
    reused: list[str] = []
    with stage_progress() as progress:
        for seed in range(config.seed, config.seed + config.seeds):
            label = f"seed {seed}: " if config.seeds > 1 else ""
            stages = Stages(root / f"seed-{seed}", progress, label)
            results.append(MainJob(config, seed, stages).run())
            reused += stages.reused
    if reused:
        names = ", ".join(reused) if config.seeds == 1 else f"{len(reused)} finished stages"
        console.print(f"reused from {root}: {names}; delete it to start anew", soft_wrap=True)
    arms = {row: [r.evaluations[row] for r in results] for row in results[0].evaluations}
    table = tabulate(arms, metrics=_COLUMNS)
    console.print(results_table(table))
    summary = _summary(config, arms, table, results, time.perf_counter() - start)
    _print_auc(console, summary["auc"])
    report = write_report(_report(config, arms, results, summary), root / "report.html")
    (root / "summary.json").write_text(json.dumps(summary, indent=1))
    console.print(f"report: {report}\nsummary: {root / 'summary.json'}")
    return summary


def _summary(
    config: QuickstartConfig,
    arms: Mapping[str, Sequence[Evaluation]],
    table: Results,
    results: Sequence[SeedResult],
    seconds: float,
) -> dict[str, Any]:
    base = next(iter(arms))
    differences = {
        row: {
            metric: _comparison(arms[base], arms[row], metric)
            for metric in ("pass@1", "greedy", "pass@8")
        }
        for row in arms
        if row != base
    }
    if "GRPO" in arms:
        differences["DisCO against GRPO"] = {
            metric: _comparison(arms["GRPO"], arms["DisCO"], metric)
            for metric in ("pass@1", "greedy", "pass@8")
        }
    return {
        "facts": _facts(config) | {"seconds": round(seconds, 1)},
        "settings": {k: v for k, v in vars(config).items() if k != "output_dir"},
        "table": {
            row.name: {
                m: [c.interval.estimate, c.interval.lower, c.interval.upper]
                for m, c in row.cells.items()
            }
            for row in table.rows
        },
        "intervals": table.method,
        "differences": differences,
        "auc": {row: [r.auc[row] for r in results] for row in results[0].auc},
        "stage_seconds": [r.seconds for r in results],
    }


def _comparison(
    baseline: Sequence[Evaluation], candidate: Sequence[Evaluation], metric: str
) -> dict[str, float]:
    found = compare(list(baseline), list(candidate), metric=metric)
    return {
        "difference": found.difference,
        "lower": found.lower,
        "upper": found.upper,
        "minimum_detectable": found.minimum_detectable,
    }


def _facts(config: QuickstartConfig) -> dict[str, Any]:
    return {
        "python": platform.python_version(),
        **{name: version(name) for name in _PACKAGES},
        "hardware": f"{platform.machine()}, {os.cpu_count()} cores, CPU",
        "threads": torch.get_num_threads(),
        "seeds": list(range(config.seed, config.seed + config.seeds)),
        "held-out questions": config.eval_questions,
        "answers per question": config.eval_samples,
    }


def _print_auc(console: Console, auc: Mapping[str, Sequence[float]]) -> None:
    parts = [
        f"{row} " + ", ".join(f"{value:.3f}" for value in values) for row, values in auc.items()
    ]
    console.print(
        "gold answers against the base's own samples, held out, mean AUC per prompt: "
        + "; ".join(parts),
        soft_wrap=True,
    )


def _report(
    config: QuickstartConfig,
    arms: Mapping[str, Sequence[Evaluation]],
    results: Sequence[SeedResult],
    summary: Mapping[str, Any],
) -> Report:
    histories = results[0].histories
    runs = {row: curves_from_log_history(log, row) for row, log in histories.items()}
    seconds = {name: round(value, 1) for name, value in results[0].seconds.items()}
    facts = {name: str(value) for name, value in summary["facts"].items()}
    auc = {row: ", ".join(f"{v:.3f}" for v in values) for row, values in summary["auc"].items()}
    return Report(
        title="llm-xrisk quickstart",
        summary=(
            "A tiny model does GSM8K's calculator steps. The base generalises and doubts; "
            "discriminative fine-tuning (DFT) raises gold answers above the base's own wrong "
            "ones, and discriminative constrained optimization (DisCO) reinforces answers that an "
            "exact verifier accepts. All numbers are of held-out steps."
        ),
        arms=arms,
        panels=standard_panels(runs, delta=config.delta),
        facts=facts
        | {
            "DFT": f"{config.dft_steps} steps of {config.dft_batch} prompts, "
            f"{config.num_negatives} negatives each, lr {config.dft_learning_rate:g}",
            "DisCO": f"{config.disco_steps} steps of {config.disco_questions} questions x "
            f"{config.num_generations} answers, {config.updates_per_rollout} steps a rollout, lr "
            f"{config.disco_learning_rate:g}, {config.score}, tau {config.tau:g}, delta "
            f"{config.delta:g}",
            "AUC of gold against sampled answers": "; ".join(f"{k}: {v}" for k, v in auc.items()),
            "wall time, first seed": ", ".join(f"{k} {v:g} s" for k, v in seconds.items()),
        },
        metrics=_COLUMNS,
    )
