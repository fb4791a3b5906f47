"""Imbalanced classification: our objectives, BCE and focal loss, and LibAUC 2.0.1, equal budgets.

    OMP_NUM_THREADS=1 python benchmarks/imbalanced.py [--libauc-python PATH]

Mammography (11,183 rows, 2.3 % positive; read from $XRISK_DATA): half of each class is a locked
test set. An MLP with 64 hidden units trains for 15 epochs of batches of 32 positives and 96
negatives. Every method has the same 20 configurations (benchmarks/tabular/grid.py) and the one with
the best mean over 5 validation folds, by the metric the method is for, trains on the whole first
half, once for each seed. Digits, with 60 training rows of the first down to 3 of the last: KLDRO
against cross-entropy and focal loss in the same way. Finished runs are kept, so a stopped benchmark
goes on. benchmarks/libauc_peer.py says how to make the environment of PATH. About 30 minutes on
one core, half of them LibAUC's.
"""

import argparse
import importlib.metadata
import json
import os
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402

from benchmarks.tabular import data, grid, training  # noqa: E402
from benchmarks.tabular.metrics import DIGITS_METRICS, all_metrics, mcclish, metric  # noqa: E402
from benchmarks.tabular.store import Store  # noqa: E402
from benchmarks.tabular.summary import RowResamples, best, over_seeds  # noqa: E402
from benchmarks.tabular.training import Run  # noqa: E402

RESULTS = Path(__file__).parent / "results" / "imbalanced-cpu.json"
PACKAGES = ("torch", "numpy", "scikit-learn")
PEER_PACKAGES = ("libauc", "torch", "torchvision", "numpy")
SETS: dict[str, tuple[Mapping[str, grid.Method], str, Mapping[str, str]]] = {
    "mammography": (grid.METHODS, grid.BASELINE, grid.METRICS),
    "digits": (grid.DIGITS, "CE", DIGITS_METRICS),
}


def main() -> None:
    arguments = parse()
    bench = Benchmark(arguments)
    for method in arguments.again:
        bench.store.forget(method)
    report: dict[str, Any] = {}
    for name in arguments.data:
        chosen = bench.run(name)
        report[name] = bench.report(name, chosen)
    if arguments.oracle:
        from benchmarks.tabular.ap_oracle import oracle_report

        report["average_precision_oracle"] = oracle_report(arguments.libauc_python)
    bench.close()
    record = facts(arguments) | report
    arguments.results.parent.mkdir(parents=True, exist_ok=True)
    arguments.results.write_text(json.dumps(record, indent=1) + "\n")
    show(report)
    print(f"\nwritten to {arguments.results}")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--libauc-python", metavar="PATH", help="interpreter that has libauc")
    parser.add_argument(
        "--methods",
        nargs="+",
        metavar="TEXT",
        default=[],
        help="only methods whose name contains one of these, and BCE with the sampler",
    )
    parser.add_argument("--data", nargs="+", choices=list(SETS), default=list(SETS))
    parser.add_argument("--seeds", type=int, default=10, help="test runs of a method (default 10)")
    parser.add_argument(
        "--again",
        nargs="+",
        metavar="METHOD",
        default=[],
        help="forget the finished runs of these methods first: their code has changed",
    )
    parser.add_argument(
        "--finished",
        action="store_true",
        help="run nothing: report on methods whose runs are all there",
    )
    parser.add_argument("--no-oracle", dest="oracle", action="store_false", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, default=ROOT / "outputs" / "imbalanced")
    parser.add_argument("--results", type=Path, default=RESULTS, help="where the JSON goes")
    arguments = parser.parse_args()
    if arguments.seeds < 3:
        parser.error(f"--seeds must be at least 3 for an interval, got {arguments.seeds}")
    return arguments


class Peer:
    """LibAUC in a process of another interpreter: a run as a line in, its scores as a line out."""

    def __init__(self, python: str, folder: Path) -> None:
        script = Path(__file__).with_name("libauc_peer.py")
        self.folder = folder
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
        self._process = subprocess.Popen(
            [*shlex.split(python), str(script)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )

    def __call__(self, run: Run) -> dict[str, Any]:
        """Scores as text and seconds."""
        stdin, stdout = self._process.stdin, self._process.stdout
        if stdin is None or stdout is None:
            raise RuntimeError("the LibAUC process has no pipes")
        stdin.write(json.dumps(vars(run) | {"folder": str(self.folder)}) + "\n")
        stdin.flush()
        line = stdout.readline()
        if not line:
            raise RuntimeError(f"the LibAUC process ended during {run}; its error stands above")
        return json.loads(line)

    def close(self) -> None:
        """End the process."""
        if self._process.stdin is not None:
            self._process.stdin.close()
        self._process.wait(timeout=30)


class Benchmark:
    """Runs what is not finished, chooses configurations, compares."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        self.store = Store(arguments.folder)
        self.parts = self._parts()
        self._peer: Peer | None = None

    def _parts(self) -> dict[str, data.Part]:
        parts: dict[str, data.Part] = {}
        for name in self.arguments.data:
            digits = name == "digits"
            made = data.digits_parts(self.arguments.seeds) if digits else data.mammography_parts()
            parts |= {f"{name}-{part}": value for part, value in made.items()}
        for name, part in parts.items():
            part.save(self.arguments.folder / "data" / f"{name}.npz")
        return parts

    def methods(self, name: str) -> dict[str, grid.Method]:
        """The methods asked for; LibAUC's only where its interpreter is known."""
        methods, baseline, _ = SETS[name]
        wanted, found = self.arguments.methods, {}
        for method, entry in methods.items():
            asked = not wanted or method == baseline or any(text in method for text in wanted)
            if not asked:
                continue
            if entry.side == "libauc" and not (
                self.arguments.libauc_python or self.arguments.finished
            ):
                continue
            found[method] = entry
        return found

    def run(self, name: str) -> dict[str, dict[str, Any]]:
        """Choose on the folds and train for the test: method to its choice."""
        from rich.progress import Progress

        chosen: dict[str, dict[str, Any]] = {}
        with Progress(disable=self.arguments.finished) as progress:
            for method, entry in self.methods(name).items():
                folds = list(self.folds(name, method, entry))
                task = progress.add_task(method, total=len(folds) + self.arguments.seeds)
                runs = [r for _, r in folds]
                if self.arguments.finished and not all(r in self.store for r in runs):
                    continue
                for run in runs:
                    self.finish(run)
                    progress.advance(task)
                choice = self.choose(entry, folds)
                tests = self.tests(name, method, choice["setting"], choice["lr"])
                if self.arguments.finished and not all(r in self.store for r in tests):
                    continue
                for run in tests:
                    self.finish(run)
                    progress.advance(task)
                chosen[method] = choice | {"tests": tests}
        return chosen

    def folds(self, name: str, method: str, entry: grid.Method) -> Iterator[tuple[str, Run]]:
        """Every configuration on every fold, by the configuration's name."""
        for setting in entry.settings:
            for lr in grid.LEARNING_RATES:
                for k in range(data.FOLDS):
                    label = json.dumps({**setting, "lr": lr})
                    yield label, Run(method, setting, lr, 100 + k, f"{name}-fold-{k}")

    def tests(self, name: str, method: str, setting: Mapping[str, Any], lr: float) -> list[Run]:
        """The runs whose scores of the test rows are reported."""
        places = [f"test-{s}" if name == "digits" else "test" for s in range(self.arguments.seeds)]
        return [Run(method, setting, lr, s, f"{name}-{p}") for s, p in enumerate(places)]

    def finish(self, run: Run) -> None:
        """Run it, unless that has been done."""
        if run in self.store:
            return
        if run.method.startswith("LibAUC"):
            if self._peer is None:
                folder = self.arguments.folder / "data"
                self._peer = Peer(self.arguments.libauc_python, folder)
            answer = self._peer(run)
            self.store.add(run, answer["scores"], answer["seconds"])
            return
        from benchmarks.tabular import ours
        from benchmarks.tabular.store import encode

        start, part = time.perf_counter(), self.parts[run.data]
        scores = ours.run(run, {k: getattr(part, k) for k in ("x_train", "y_train", "x_eval")})
        self.store.add(run, encode(scores), time.perf_counter() - start)

    def choose(self, entry: grid.Method, folds: list[tuple[str, Run]]) -> dict[str, Any]:
        """The best configuration, and the validation means of all."""
        validation: dict[str, list[float]] = {}
        for label, run in folds:
            value = metric(entry.metric, self.store.scores(run), self.parts[run.data].y_eval)
            validation.setdefault(label, []).append(value)
        label = best(validation)
        setting = json.loads(label)
        means = {k: float(np.mean(v)) for k, v in validation.items()}
        diverged = sum(not np.isfinite(v) for v in means.values())
        return {
            "lr": setting.pop("lr"),
            "setting": setting,
            "validation": means[label],
            "diverged": diverged,
            "all": {k: round(v, 5) if np.isfinite(v) else None for k, v in means.items()},
        }

    def report(self, name: str, chosen: Mapping[str, Any]) -> dict[str, Any]:
        """Rows of the table, with differences to the baseline and to LibAUC's versions."""
        methods, baseline, names = SETS[name]
        scores = {m: [self.store.scores(r) for r in c["tests"]] for m, c in chosen.items()}
        found = {
            m: [
                all_metrics(s, self.parts[r.data].y_eval)
                for s, r in zip(v, chosen[m]["tests"], strict=True)
            ]
            for m, v in scores.items()
        }
        binary = name == "mammography"
        targets = next(iter(self.parts.values())) if not binary else self.parts[f"{name}-test"]
        rows = RowResamples(targets.y_eval, self.arguments.seeds) if binary else None
        table = []
        for method, choice in chosen.items():
            values = {k: np.array([run[k] for run in found[method]]) for k in names}
            compared = {}
            for other in (baseline, *methods[method].peers):
                if other == method or other not in chosen:
                    continue
                gaps = {
                    k: over_seeds(values[k] - np.array([run[k] for run in found[other]])).as_json()
                    for k in names
                }
                if rows is not None:
                    own = methods[method].metric
                    pair = (rows.of(m, own, scores[m]) for m in (method, other))
                    gaps[own]["interval_rows"] = list(rows.interval(*pair))
                compared[other] = gaps
            row = {k: v for k, v in choice.items() if k != "tests"}
            seconds = float(np.median([self.store.seconds(r) for r in choice["tests"]]))
            table.append(
                {
                    "method": method,
                    "side": methods[method].side,
                    "for": methods[method].metric,
                    **row,
                    "mean": {k: float(v.mean()) for k, v in values.items()},
                    "sd": {k: float(v.std(ddof=1)) for k, v in values.items()},
                    "seeds": {k: v.tolist() for k, v in values.items()},
                    "seconds_per_run": round(seconds, 3),
                    "minus": compared,
                }
            )
            if binary:
                table[-1]["mean"]["opauc_mcclish"] = mcclish(table[-1]["mean"]["opauc"])
        return {"metrics": dict(names), "baseline": baseline, "rows": table}

    def close(self) -> None:
        """End the LibAUC process."""
        if self._peer is not None:
            self._peer.close()


def facts(arguments: argparse.Namespace) -> dict[str, Any]:
    """Versions, hardware, seeds and the grid."""
    libauc = None
    if arguments.libauc_python:
        code = (
            "import importlib.metadata as m, json, sys; "
            "print(json.dumps({name: m.version(name) for name in sys.argv[1:]}))"
        )
        command = [*shlex.split(arguments.libauc_python), "-c", code, *PEER_PACKAGES]
        libauc = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
    return {
        "versions": {
            "python": platform.python_version(),
            **{p: importlib.metadata.version(p) for p in PACKAGES},
        },
        "libauc_environment": libauc,
        "hardware": {"machine": platform.machine(), "cpu": cpu_name(), "threads": 1},
        "protocol": {
            "split_seed": data.SPLIT_SEED,
            "test_share": 0.5,
            "folds": data.FOLDS,
            "fold_seeds": [100 + k for k in range(data.FOLDS)],
            "test_seeds": list(range(arguments.seeds)),
            "hidden": training.HIDDEN,
            "epochs": training.EPOCHS,
            "batch": training.BATCH,
            "positives_per_batch": training.POSITIVES,
            "learning_rates": list(grid.LEARNING_RATES),
            "settings": {
                m: [dict(s) for s in e.settings] for m, e in {**grid.METHODS, **grid.DIGITS}.items()
            },
            "intervals": "95 %, bootstrap over seeds widened to a t; interval_rows also resamples "
            "the test rows of each class",
        },
    }


def cpu_name() -> str:
    """The processor, as the system names it."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if os.name == "posix" else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def show(report: Mapping[str, Any]) -> None:
    """Print the tables."""
    from rich.console import Console
    from rich.table import Table

    console = Console(width=190)
    for name in [n for n in report if n in SETS]:
        part = report[name]
        table = Table(title=f"{name}: test, mean (sd) of seeds; * is what the method is for")
        heads = list(part["metrics"].values())
        for head in (
            "method",
            *heads,
            "minus " + part["baseline"],
            "minus peers",
            "chosen",
        ):
            table.add_column(head)
        for row in part["rows"]:
            cells = [
                f"{row['mean'][k]:.3f} ({row['sd'][k]:.3f}){'*' if k == row['for'] else ''}"
                for k in part["metrics"]
            ]
            base = row["minus"].get(part["baseline"])
            others = [g for m, g in row["minus"].items() if m != part["baseline"]]
            gaps = [gap(base, row["for"]), "\n".join(gap(g, row["for"]) for g in others)]
            chosen = " ".join(f"{k}={v}" for k, v in row["setting"].items())
            table.add_row(row["method"], *cells, *gaps, f"{chosen} lr={row['lr']:g}")
        console.print(table)
    if "average_precision_oracle" in report:
        console.print(report["average_precision_oracle"])


def gap(compared: Mapping[str, Any] | None, name: str) -> str:
    """A difference with its interval over seeds, and over test rows where there is one."""
    if compared is None:
        return ""
    entry = compared[name]
    low, high = entry["interval_seeds"]
    text = f"{entry['mean']:+.3f} [{low:+.3f}, {high:+.3f}]"
    if entry["interval_rows"]:
        low, high = entry["interval_rows"]
        text += f" rows [{low:+.3f}, {high:+.3f}]"
    return text


if __name__ == "__main__":
    main()
