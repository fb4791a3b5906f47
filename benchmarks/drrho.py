"""DRRHO against plain fine-tuning, DRO without a reference and RHO-LOSS, at equal samples.

    OMP_NUM_THREADS=1 python benchmarks/drrho.py [--data steps sentences] [--seeds 6]

The packaged calculator (0.86 M parameters) is fine-tuned by DRRHOTrainer on calculator steps of
GSM8K: one pass over 1,536 rows in batches of 64. With 0 % or 20 % noise: a noisy row has the
answer of another noisy row. A seed draws the training rows, which of them are noise, 512 clean
holdout rows, and the order. The reference model starts where all models start and sees the holdout
rows twice, 1,024 samples; its losses of the training rows are computed once for each seed and
noise rate, and every method with a reference reads them. RHO-LOSS keeps the top k of a batch; as
for all methods, the rows that are counted are those that a forward pass has seen.

Two rows of the table say what the holdout rows are worth without DRRHO: the reference model
itself, and "ERM, train + holdout", plain fine-tuning on all rows together that also gets the
reference's samples, 2,560.

Every method has six configurations (benchmarks/robust/grid.py): six learning rates, or two with
three values of the method's own setting. For each noise rate the one with the best result on 600
clean validation rows, of a run with a seed of its own, trains once for each of six other seeds and
is measured on 1,200 locked, clean test rows. Chosen by pass@1, the probability of the exact answer,
which is what sampled answers have on average; the other metrics are of the same runs: greedy exact
answers, NLL per token, and the mean NLL of the worst 10 % of the rows. Intervals of differences are
paired, a bootstrap over test rows and seeds.

"sentences" repeats it where the calculations stand ($XRISK_DATA/gsm8k): the model, which has seen
no text, gets the last 32 characters of the line up to the annotation, `sold 48/2 = <<48/2=`. 768
training rows and twice 256 holdout rows in batches of 32, 300 validation rows, 600 test rows of the
test solutions. Chosen by NLL: few answers are exact after so few steps.

What came out (benchmarks/results/drrho-cpu.json). On steps with 20 % noise DRRHO by CVaR raises
pass@1 from ERM's 0.223 to 0.255 and DRRHO by KL to 0.240, while KL and CVaR without a reference
lower it to 0.205 and 0.215. RHO-LOSS does what DRRHO by CVaR does, 0.255; no DRRHO beats it. Both
give fewer exact greedy answers than ERM, 0.454 and 0.456 against 0.477, and none of these improves
the worst 10 %. The holdout rows do as much by themselves: the reference alone has 0.269, and ERM on
all rows 0.247 with noise, a little less than DRRHO by CVaR, but 0.320 without, where DRRHO by CVaR
has 0.296. On sentences DRRHO, RHO-LOSS and ERM are equal in NLL within the intervals; the
reference, from 256 rows, is no better there than the models it advises.

Finished runs are kept in outputs/drrho, so a stopped benchmark goes on. `--toy` runs everything in
seconds, on few rows, and says nothing about the methods.
"""

import argparse
import gc
import hashlib
import importlib.metadata
import json
import os
import platform
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

os.environ.setdefault("DS_ACCELERATOR", "cpu")  # not used here; unset, it warns of no GPU
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402

from benchmarks.robust import sets  # noqa: E402
from benchmarks.robust.grid import CONTROL, ERM, METHODS, REFERENCE, TOP_K, Rates  # noqa: E402
from benchmarks.robust.sets import NOISE, Sizes  # noqa: E402
from benchmarks.robust.training import FIXED, measure, metrics, quiet, train  # noqa: E402
from benchmarks.tabular.store import Store, encode, key_of  # noqa: E402
from benchmarks.tabular.training import Run  # noqa: E402
from llm_xrisk.data.gsm8k_steps import tiny_model_path  # noqa: E402
from llm_xrisk.evaluation.bootstrap import Bootstrap  # noqa: E402

RESULTS = Path(__file__).parent / "results" / "drrho-cpu.json"
PACKAGES = ("torch", "transformers", "numpy")
METRICS = {
    "pass@1": "pass@1, probability of the exact answer; higher is better",
    "greedy": "greedy decoding gives the exact answer; higher is better",
    "nll": "NLL per token, mean over rows; lower is better",
    "cvar": "NLL per token, mean of the worst 10 % of the rows; lower is better",
}


@dataclass(frozen=True)
class Protocol:
    """What a data set is run with.

    Args:
        sizes: Numbers of rows.
        rates: Learning rates.
        choose_by: The metric to choose configurations by.
        selection_seeds: Seeds of the runs that this is done with.
        noise: Shares of noise among the training rows.
        values: Use the first so many values of a method's own setting; None is all.
    """

    sizes: Sizes
    rates: Rates
    choose_by: str
    selection_seeds: tuple[int, ...] = (100,)
    noise: tuple[float, ...] = NOISE
    values: int | None = None


PROTOCOLS: dict[str, Protocol] = {
    "steps": Protocol(
        Sizes(train=1536, holdout=512, validation=600, test=1200, batch=64),
        Rates((2e-4, 5e-4), (1e-4, 2e-4, 3.5e-4, 5e-4, 1e-3, 2e-3)),
        "pass@1",
    ),
    "sentences": Protocol(
        Sizes(train=768, holdout=256, validation=300, test=600, batch=32),
        Rates((5e-4, 2e-3), (2e-4, 5e-4, 1e-3, 2e-3, 3e-3, 5e-3)),
        "nll",
    ),
}
TOY = {
    "steps": Protocol(
        Sizes(train=32, holdout=16, validation=12, test=12, batch=16),
        Rates((1e-3,), (1e-3, 1e-2)),
        "pass@1",
        noise=(0.2,),
        values=1,
    ),
    "sentences": Protocol(
        Sizes(train=16, holdout=8, validation=8, test=8, batch=8),
        Rates((1e-3,), (1e-3, 1e-2)),
        "nll",
        noise=(0.2,),
        values=1,
    ),
}


class Benchmark:
    """The runs of one data set: those that are not finished, and what came out.

    Args:
        name: Of the data set.
        protocol: What it is run with.
        seeds: Number of test runs of each method.
        folder: Where runs, references and their losses are kept.
    """

    def __init__(self, name: str, protocol: Protocol, seeds: int, folder: Path) -> None:
        self.name, self.protocol, self.seeds = name, protocol, seeds
        self.data = sets.SETS[name](protocol.sizes)
        grid = {method: asdict(entry) for method, entry in METHODS.items()}
        made_of = [asdict(protocol.sizes), asdict(protocol.rates), FIXED, grid]
        digest = hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()[:8]
        self.folder = folder / f"{name}-{digest}"
        self.store = Store(self.folder)
        self.rows = {
            "validation": sets.encode(self.data.validation),
            "test": sets.encode(self.data.test),
        }
        self.reference_rate = 0.0
        self._done, self._total = 0, self._count()

    # -- runs ------------------------------------------------------------------------------------

    def report(self) -> dict[str, Any]:
        """Do all runs; the table of each noise rate."""
        reference = self._choose(REFERENCE, self.protocol.noise[0])
        self.reference_rate = reference["lr"]
        found: dict[str, Any] = {}
        for noise in self.protocol.noise:
            chosen = {
                method: reference if method == REFERENCE else self._choose(method, noise)
                for method in METHODS
            }
            values: dict[str, dict[str, np.ndarray]] = {}
            for method, choice in chosen.items():
                # the reference never sees the training rows: its runs serve all noise rates
                rate = self.protocol.noise[0] if method == REFERENCE else noise
                runs = [
                    Run(method, choice["setting"], choice["lr"], seed, f"{rate:g}-test")
                    for seed in range(self.seeds)
                ]
                of_seeds = [self._metrics(run) for run in runs]
                values[method] = {m: np.stack([v[m] for v in of_seeds]) for m in METRICS}
            found[f"{100 * noise:g} % noise"] = table(chosen, values)
        return {
            "protocol": self._facts(),
            "seconds": round(sum(self.store.seconds(run) for run in self._finished), 1),
            "tables": found,
        }

    def _choose(self, method: str, noise: float) -> dict[str, Any]:
        """The best configuration on validation, and the means of all."""
        by, sign = self.protocol.choose_by, -1 if self.protocol.choose_by == "nll" else 1
        means: dict[str, float] = {}
        for lr, setting in self._configurations(method):
            runs = [
                Run(method, setting, lr, seed, f"{noise:g}-validation")
                for seed in self.protocol.selection_seeds
            ]
            values = [float(self._metrics(run)[by].mean()) for run in runs]
            means[json.dumps({**setting, "lr": lr})] = float(np.mean(values))
        finite = {label: mean for label, mean in means.items() if np.isfinite(mean)}
        if not finite:
            raise ValueError(f"all configurations of {method} gave NaN on validation")
        label = max(finite, key=lambda known: sign * finite[known])
        setting = json.loads(label)
        return {
            "lr": setting.pop("lr"),
            "setting": setting,
            "validation": {known: round(mean, 5) for known, mean in means.items()},
        }

    def _configurations(self, method: str) -> Iterator[tuple[float, dict[str, float]]]:
        for setting in METHODS[method].settings[: self.protocol.values]:
            for lr in self.protocol.rates.of(METHODS[method]):
                yield lr, setting

    def _metrics(self, run: Run) -> dict[str, np.ndarray]:
        part = run.data.rpartition("-")[2]
        if run not in self.store:
            start = time.perf_counter()
            found = measure(self._trained(run), self.rows[part])
            seconds = time.perf_counter() - start
            self.store.add(run, encode(found.ravel()), seconds)
        self._finished.append(run)
        found = metrics(self.store.scores(run), self.rows[part])
        self._progress(run, found)
        return found

    def _trained(self, run: Run) -> Any:
        """The model of a run; that of a reference is kept on disk, where the others find it."""
        method, sizes = METHODS[run.method], self.protocol.sizes
        path = self.folder / "references" / key_of(run)
        if path.exists():
            return AutoModelForCausalLM.from_pretrained(path)
        noise = float(run.data.partition("-")[0])
        samples = {
            "train": sizes.train,
            "holdout": sizes.reference_rows,
            "both": sizes.train + sizes.reference_rows,
        }
        pairs, holdout = self.data.draw(sizes, noise, run.seed)
        drawn = {"train": pairs, "holdout": holdout, "both": pairs + holdout}[method.rows]
        arguments = dict(method.arguments) | dict(run.setting)
        if method.uses_reference:
            losses = self.folder / "losses" / f"{noise:g}-{run.seed}.safetensors"
            name = str(self._reference(run))
            arguments |= {"reference_model": name, "reference_cache": str(losses)}
        model = train(
            tiny_model_path(),
            sets.encode(drawn),
            arguments | {"learning_rate": run.lr, "seed": run.seed},
            samples=samples[method.rows],
            batch=sizes.batch,
        )
        if run.method == REFERENCE:
            save(model, path)
        return model

    def _reference(self, run: Run) -> Path:
        """The reference model of a run's seed; trained where it is missing."""
        part = run.data.rpartition("-")[2]
        rate = f"{self.protocol.noise[0]:g}-{part}"
        wanted = Run(REFERENCE, {}, self.reference_rate, run.seed, rate)
        self._trained(wanted)
        return self.folder / "references" / key_of(wanted)

    # -- progress --------------------------------------------------------------------------------

    @cached_property
    def _finished(self) -> list[Run]:
        return []

    def _count(self) -> int:
        """Runs there are, the reference's once."""
        each = {
            method: len(list(self._configurations(method))) * len(self.protocol.selection_seeds)
            for method in METHODS
        }
        others = sum(count + self.seeds for m, count in each.items() if m != REFERENCE)
        tests = self.seeds * len(self.protocol.noise)
        return each[REFERENCE] + tests + len(self.protocol.noise) * others

    def _progress(self, run: Run, found: Mapping[str, np.ndarray]) -> None:
        self._done += 1
        setting = ", ".join(f"{k} {v:g}" for k, v in {**run.setting, "lr": run.lr}.items())
        by = self.protocol.choose_by
        print(
            f"{self.name} {self._done}/{self._total} {run.data} {run.method} ({setting}) seed "
            f"{run.seed}: {by} {found[by].mean():.4f}, {self.store.seconds(run):.1f} s",
            flush=True,
        )

    def _facts(self) -> dict[str, Any]:
        protocol = self.protocol
        return {
            **asdict(protocol.sizes),
            "noise": list(protocol.noise),
            "learning_rates": asdict(protocol.rates),
            "chosen_by": protocol.choose_by,
            "selection_seeds": list(protocol.selection_seeds),
            "test_seeds": list(range(self.seeds)),
            "reference_samples": protocol.sizes.reference_rows,
            "split_seed": sets.SPLIT_SEED,
            "optimizer": {k: FIXED[k] for k in ("lr_scheduler_type", "warmup_steps")}
            | {"name": "AdamW", "weight_decay": FIXED["weight_decay"], "max_grad_norm": 1.0},
            "intervals": Bootstrap(len(self.rows["test"])).method.replace("prompts", "test rows"),
        }


def save(model: Any, path: Path) -> None:
    """Save a model, whole or not at all."""
    partial = path.with_name(path.name + ".partial")
    model.save_pretrained(partial)
    partial.rename(path)


def table(
    chosen: Mapping[str, Mapping[str, Any]], values: Mapping[str, Mapping[str, np.ndarray]]
) -> list[dict[str, Any]]:
    """A row for each method: metrics with intervals, and paired differences to others."""
    num_rows = values[ERM]["nll"].shape[1]
    bootstrap = Bootstrap(num_rows)

    def interval(of: np.ndarray) -> list[float]:
        found = bootstrap.interval(of)
        return [round(v, 5) for v in (found.estimate, found.lower, found.upper)]

    rows = []
    for method, choice in chosen.items():
        others = dict.fromkeys(o for o in (ERM, CONTROL, TOP_K, METHODS[method].peer) if o)
        mine = values[method]
        rows.append(
            {
                "method": method,
                **choice,
                "metrics": {m: interval(mine[m]) for m in METRICS},
                "seeds": {m: [round(float(v), 5) for v in mine[m].mean(1)] for m in METRICS},
                "minus": {
                    other: {m: interval(mine[m] - values[other][m]) for m in METRICS}
                    for other in others
                    if other != method
                },
            }
        )
    return rows


def facts() -> dict[str, Any]:
    """Versions, hardware, metrics and grid."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if os.name == "posix" else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return {
        "versions": {
            "python": platform.python_version(),
            **{p: importlib.metadata.version(p) for p in PACKAGES},
        },
        "hardware": {
            "machine": platform.machine(),
            "cpu": names[0] if names else platform.processor(),
            "threads": 1,
        },
        "metrics": METRICS,
        "grid": {
            name: {"varied": method.name, "values": list(method.values), **method.arguments}
            for name, method in METHODS.items()
        },
    }


def show(report: Mapping[str, Any]) -> None:
    """Print the tables."""
    from rich.console import Console
    from rich.table import Table

    console = Console(width=170)
    for name, part in report.items():
        by = part["protocol"]["chosen_by"]
        for noise, rows in part["tables"].items():
            shown = Table(title=f"{name}, {noise}: means of the test runs; chosen by {by}")
            for head in ("method", *METRICS, f"{by} - {ERM}", f"cvar - {ERM}", "chosen"):
                shown.add_column(head)
            for row in rows:
                chosen = ", ".join(f"{k} {v:g}" for k, v in row["setting"].items())
                shown.add_row(
                    row["method"],
                    *(f"{row['metrics'][m][0]:.4f}" for m in METRICS),
                    *(gap(row["minus"].get(ERM), m) for m in (by, "cvar")),
                    f"{chosen} lr {row['lr']:g}".strip(),
                )
            console.print(shown)


def gap(difference: Mapping[str, Sequence[float]] | None, name: str) -> str:
    """A difference with its interval."""
    if difference is None:
        return ""
    estimate, low, high = difference[name]
    return f"{estimate:+.4f} [{low:+.4f}, {high:+.4f}]"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", nargs="+", choices=list(PROTOCOLS), default=list(PROTOCOLS))
    parser.add_argument("--seeds", type=int, default=6, help="test runs of a method (default 6)")
    parser.add_argument("--toy", action="store_true", help="few rows: a trial of the code")
    parser.add_argument("--folder", type=Path, default=ROOT / "outputs" / "drrho")
    parser.add_argument(
        "--results", type=Path, help="where the JSON goes (default: with the others)"
    )
    arguments = parser.parse_args()
    if arguments.seeds < 5 and not arguments.toy:
        parser.error(f"--seeds must be at least 5, got {arguments.seeds}")
    if arguments.toy and arguments.results is None:
        parser.error("--toy needs --results: its numbers do not belong among the others")
    return arguments


def main() -> None:
    arguments = parse()
    quiet()
    # trainers collect garbage several times a run; over all that is imported, that took seconds
    gc.freeze()
    protocols = TOY if arguments.toy else PROTOCOLS
    results = arguments.results or RESULTS
    results.parent.mkdir(parents=True, exist_ok=True)
    report: dict[str, Any] = {}
    for name in arguments.data:
        bench = Benchmark(name, protocols[name], arguments.seeds, arguments.folder)
        report[name] = bench.report()
        results.write_text(json.dumps(facts() | report, indent=1) + "\n")
    gc.unfreeze()
    show(report)
    print(f"\nwritten to {results}")


if __name__ == "__main__":
    main()
