"""TempNet on frozen models: against one temperature, and against one entropy, for all tokens.

    OMP_NUM_THREADS=1 XRISK_DATA=DIR python benchmarks/tempnet.py [--seeds 5]

Data. `steps`: GSM8K's calculator steps, under the embedded calculator, which has seen none of them.
`text`: GSM8K's questions and solutions in chunks of 128 characters, under a model of the same size
that has read the training split for 150 batches, another one for each seed; without $XRISK_DATA
it is left out. A TempNet sees the training split, a validation split is to choose by, and the test
split is looked at once, with what was chosen.
Methods, 8 configurations each (benchmarks/temperature/samplers.py): a temperature; an entropy h,
met token by token by bisection; a TempNet of 4 entropies h = log V - rho and 2 learning rates,
trained by TempNetTrainer for 2,000 steps. TempNet and bisection keep to the same bounds of tau.
Metrics: pass@1 and pass@8 by the unbiased estimator from 16 samples, and the negative
log-likelihood of the split's own completions under softmax(s / tau), whose exponential is the
perplexity. Each method chooses for each metric by itself, by the mean over seeds 0 and 1 on the
validation split. No method trains on labels: the loss of a frozen TempNet does not depend on them,
so whatever suits a metric enters by the choice alone.
A seed is that of a TempNet's weights and batches, of the samples, and, for text, of the model. All
samplers get the same noise. Differences are paired by row and seed, with 95 % bootstrap intervals
over both (of steps they hold for this one model). A TempNet is also compared with the temperature
of least loss at its own h, which bisection finds: `oracle` in the results. Speeds are by CPU time.
Numbers of steps and learning rates followed tries on validation rows; the grid of text, at first
that of steps, was moved up and its test chunks replaced after h had been best at the upper end.
Finished runs are kept, so a stopped benchmark goes on. About 40 minutes on one core.

What came out: one well-chosen temperature is as good or better. pass@1 is highest close to greedy
decoding, and TempNet ties there with tau = 0.01 (0.410 and 0.411); its pass@8 is 0.544, that of
tau = 0.6 is 0.578; its perplexity is 3.15 for steps, tau = 0.85 gives 2.42, and 7.55 for text,
where tau = 0.9 gives 6.71. It beats the fixed-entropy sampler by every metric, and samples faster.
A new TempNet gives all tokens one temperature for long, at h = 0.5 for its first 500 to 1,500 steps
in a try; at h = 0.05 it still did after the 2,000 here, and so did, for all seeds, what was chosen
for pass@1 and pass@8 (`constant` in the results). Those that left this place come close to their
oracle (correlation of log tau 0.84 to 0.97), but an equal entropy for every token is not what these
metrics reward. tau = 0.7, the common choice, is worse than TempNet by pass@1 and better by pass@8
and perplexity. TempNet chose the largest of its 4 entropies for text again; from 2.0 to 2.3 it
gained 0.02 nats of the 0.12 that it lacks.
"""

import argparse
import contextlib
import hashlib
import json
import os
import platform
import shutil
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.utils.logging import disable_progress_bar

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.temperature import samplers  # noqa: E402
from benchmarks.temperature.data import Sizes, frozen_model, steps, text  # noqa: E402
from benchmarks.temperature.samplers import ENTROPY, FIXED, NET, Sampler, grid  # noqa: E402
from benchmarks.temperature.training import SCHEDULE, train_tempnet  # noqa: E402
from llm_xrisk.evaluation.bootstrap import Bootstrap  # noqa: E402
from llm_xrisk.models import TempNet  # noqa: E402
from reward.metrics import pass_at_k  # noqa: E402

RESULTS = Path(__file__).parent / "results" / "tempnet-cpu.json"
PACKAGES = ("torch", "transformers", "numpy")
TOY = Sizes(
    net_steps=2,
    net_rows=4,
    net_chunks=1,
    text_steps=2,
    text_chunks=2,
    chunk=32,
    validation=6,
    test=8,
    chunks=4,
    configurations=2,
)
SELECTION = (0, 1)  # seeds to choose by
METRICS = {"steps": ("pass@1", "pass@8", "nll"), "text": ("nll",)}
REFERENCES = (Sampler(FIXED, 1.0), Sampler(FIXED, 0.7))


@dataclass(frozen=True)
class Run:
    """A sampler on a split, with the models of a seed."""

    data: str
    split: str
    seed: int
    sampler: Sampler

    @property
    def key(self) -> str:
        """A name for it, the same in every process."""
        return json.dumps(asdict(self), sort_keys=True)


class Bench:
    """Does what is missing and keeps what is done."""

    def __init__(self, folder: Path, sizes: Sizes, seeds: int) -> None:
        # what was done with other settings is of no use
        settings = [asdict(sizes), samplers.BOUNDS, samplers.GENERATIONS, SCHEDULE]
        folder /= hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:8]
        self.folder, self.sizes, self.seeds = folder, sizes, seeds
        self.parts = {"steps": steps(sizes), "text": text(sizes)}
        self.grids = {data: grid(data, sizes.configurations) for data in self.parts}
        self.path, self.done = folder / "runs.jsonl", dict[str, dict[str, Any]]()
        folder.mkdir(parents=True, exist_ok=True)
        for line in self.path.read_text().splitlines() if self.path.exists() else []:
            with contextlib.suppress(json.JSONDecodeError):  # cut off by the end of the process
                entry = json.loads(line)
                self.done[entry["key"]] = entry
        self._model: tuple[tuple[str, int], Any] = (("", -1), None)
        self._logits: tuple[tuple[str, str, int], Tensor] = (("", "", -1), torch.empty(0))
        self._started, self._finished = time.monotonic(), 0

    def of(self, run: Run) -> dict[str, Any]:
        """What is measured of a run."""
        key = run.key
        if key not in self.done:
            entry = {"key": key, **self._measure(run)}
            with self.path.open("a") as file:
                file.write("\n" + json.dumps(entry))
            self.done[key] = entry
            self._show(run, entry)
        return self.done[key]

    def _measure(self, run: Run) -> dict[str, Any]:
        part, sampler = self.parts[run.data][run.split], run.sampler
        model, net, trained = self.model(run.data, run.seed), None, {}
        if sampler.method == NET:
            net, trained = self.net(run.data, run.seed, sampler)
        divide, logits = samplers.processor(sampler, net), self.logits(run)
        found = samplers.predicted(logits, part.completions, divide) | trained
        if net is not None:
            found["oracle"] = samplers.beside_the_oracle(
                logits, net, sampler.value, samplers.TEMPERATURES[run.data]
            )
        if run.data == "steps":
            found |= samplers.sampled(model, part, divide, run.seed)
        return found

    def model(self, data: str, seed: int) -> Any:
        """The frozen model of a seed; the last one asked for is kept in memory."""
        if self._model[0] != (data, seed):
            train = self.parts[data]["train"]
            model = frozen_model(data, seed, self.folder, train, self.sizes)
            self._model = (data, seed), model
        return self._model[1]

    def logits(self, run: Run) -> Tensor:
        """Logits of a split's own completions: the same for every sampler."""
        place = (run.data, run.split, run.seed)
        if self._logits[0] != place:
            part = self.parts[run.data][run.split]
            self._logits = place, samplers.gold_logits(self.model(run.data, run.seed), part)
        return self._logits[1]

    def net(self, data: str, seed: int, sampler: Sampler) -> tuple[TempNet, dict[str, Any]]:
        """The TempNet of a seed and a configuration, and how long it trained."""
        name = sampler.setting.replace(" ", "-")
        path = self.folder / f"{data}-tempnet-{seed}" / name
        facts = path / "training.json"
        if not facts.exists():
            shutil.rmtree(path, ignore_errors=True)
            model, train = self.model(data, seed), self.parts[data]["train"]
            found = train_tempnet(model, train, sampler, seed, path, self.sizes)
            facts.write_text(json.dumps(found))
        return TempNet.from_pretrained(path), json.loads(facts.read_text())

    def runs(self, data: str, split: str, chosen: list[Sampler]) -> Iterator[Run]:
        """Every sampler with the seeds of the split, seed by seed: a model is read once."""
        for seed in SELECTION if split == "validation" else range(self.seeds):
            for sampler in chosen:
                yield Run(data, split, seed, sampler)

    def _show(self, run: Run, entry: Mapping[str, Any]) -> None:
        self._finished += 1
        minutes = (time.monotonic() - self._started) / 60
        values = "  ".join(f"{m} {np.mean(v):.3f}" for m, v in measured(entry).items())
        print(
            f"{minutes:5.1f} min, run {self._finished}: {run.data} {run.split} seed {run.seed} "
            f"{run.sampler.method} {run.sampler.setting}: {values}",
            flush=True,
        )


def measured(entry: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """(n,) pass@k of each row, and `nll`, whose mean is that of a token's -log p."""
    found = dict[str, np.ndarray]()
    if "right" in entry:
        for k in (1, 8):
            one = [pass_at_k(samplers.GENERATIONS, right, k) for right in entry["right"]]
            found[f"pass@{k}"] = np.array(one)
    found["nll"] = np.array(entry["nll"]) / np.mean(entry["lengths"])
    return found


class Report:
    """Chooses by the validation split, runs the choices on the test split, compares them."""

    def __init__(self, bench: Bench, data: str) -> None:
        self.bench, self.data, self.metrics = bench, data, METRICS[data]
        self.grid = bench.grids[data]
        everything = [sampler for found in self.grid.values() for sampler in found]
        self.validation = self._entries("validation", everything)
        self.chosen = {
            metric: {m: best(found, self.validation, metric) for m, found in self.grid.items()}
            for metric in self.metrics
        }
        wanted = [s for found in self.chosen.values() for s in found.values()]
        self.tests = self._entries("test", list(dict.fromkeys([*wanted, *REFERENCES])))
        self.boot = Bootstrap(len(bench.parts[data]["test"]))

    def _entries(self, split: str, chosen: list[Sampler]) -> dict[Sampler, list[dict[str, Any]]]:
        found: dict[Sampler, list[dict[str, Any]]] = {sampler: [] for sampler in chosen}
        for run in self.bench.runs(self.data, split, chosen):
            found[run.sampler].append(self.bench.of(run))
        return found

    def as_json(self) -> dict[str, Any]:
        """Everything for the results file."""
        return {
            "rows": {name: len(part) for name, part in self.bench.parts[self.data].items()},
            "intervals": self.boot.method.replace("prompts", "rows"),
            "grid": {method: [s.setting for s in found] for method, found in self.grid.items()},
            "chosen": {
                metric: {method: sampler.setting for method, sampler in found.items()}
                for metric, found in self.chosen.items()
            },
            "differences": {metric: self._differences(metric) for metric in self.metrics},
            "test": [self._row(s, entries, True) for s, entries in self.tests.items()],
            "validation": [self._row(s, entries, False) for s, entries in self.validation.items()],
        }

    def _differences(self, metric: str) -> dict[str, Any]:
        """TempNet minus the others, each with the choice for this metric, paired by row."""
        chosen = self.chosen[metric]
        others = {f"{m} ({chosen[m].setting})": chosen[m] for m in (FIXED, ENTROPY)}
        others |= {f"reference {s.setting}": s for s in REFERENCES}
        own = values_of(self.tests[chosen[NET]], metric)
        return {
            name: asdict(self.boot.interval(own - values_of(self.tests[other], metric)))
            for name, other in others.items()
        }

    def _row(
        self, sampler: Sampler, entries: list[dict[str, Any]], intervals: bool
    ) -> dict[str, Any]:
        row: dict[str, Any] = {"method": sampler.method, "setting": sampler.setting}
        for metric in self.metrics:
            values = values_of(entries, metric)
            row[metric] = round(float(values.mean()), 5)
            if intervals:
                row[metric] = asdict(self.boot.interval(values))
                row[f"{metric}_seeds"] = values.mean(1).round(5).tolist()
        row["perplexity"] = float(np.exp(values_of(entries, "nll").mean()))
        row["entropy"] = float(np.mean([e["entropy"] for e in entries]))
        row["entropy_sd"] = float(np.mean([e["entropy_sd"] for e in entries]))
        row["tau_quantiles"] = np.mean([e["tau_quantiles"] for e in entries], 0).round(4).tolist()
        if self.data == "steps":
            rates = [e["tokens"] / e["seconds"] for e in entries]
            row["tokens_per_cpu_second"] = round(float(np.median(rates)))
        if sampler.method == NET:
            row["training_cpu_seconds"] = float(np.median([e["training_seconds"] for e in entries]))
            ends = [(e["tau_quantiles"][0], e["tau_quantiles"][-1]) for e in entries]
            row["constant"] = float(np.mean([high - low < 0.01 for low, high in ends]))
            found = {n: [e["oracle"][n] for e in entries] for n in entries[0]["oracle"]}
            # constant temperatures correlate with nothing
            defined = {n: [v for v in values if np.isfinite(v)] for n, values in found.items()}
            row["oracle"] = {n: float(np.mean(v)) if v else None for n, v in defined.items()}
        return row

    def show(self) -> None:
        """Print the comparisons."""
        found = self.as_json()
        for metric, gaps in found["differences"].items():
            print(
                f"\n{self.data}, {metric} on the test split: TempNet {found['chosen'][metric][NET]}"
            )
            for other, gap in gaps.items():
                low, high = gap["lower"], gap["upper"]
                up = "worse" if metric == "nll" else "better"
                down = "better" if metric == "nll" else "worse"
                verdict = up if low > 0 else down if high < 0 else "no difference seen"
                print(
                    f"  minus {other}: {gap['estimate']:+.4f} [{low:+.4f}, {high:+.4f}], {verdict}"
                )


def values_of(entries: list[dict[str, Any]], metric: str) -> np.ndarray:
    """(seeds, rows) values of a metric."""
    return np.stack([measured(entry)[metric] for entry in entries])


def best(
    candidates: list[Sampler], entries: Mapping[Sampler, list[dict[str, Any]]], metric: str
) -> Sampler:
    """The candidate of the highest mean, or of the lowest negative log-likelihood."""
    sign = -1.0 if metric == "nll" else 1.0
    return max(candidates, key=lambda sampler: sign * mean_of(entries[sampler], metric))


def mean_of(entries: list[dict[str, Any]], metric: str) -> float:
    """Over seeds and rows."""
    return float(values_of(entries, metric).mean())


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=5, help="of models, TempNets and noise")
    parser.add_argument("--data", nargs="+", choices=list(METRICS), default=list(METRICS))
    parser.add_argument("--toy", action="store_true", help="seconds: to see that it runs")
    parser.add_argument("--folder", type=Path, help="of what is done; default outputs/tempnet")
    parser.add_argument("--results", type=Path, help=f"default benchmarks/results/{RESULTS.name}")
    arguments = parser.parse_args()
    if arguments.seeds < 2:
        parser.error(f"--seeds must be at least 2 for an interval, got {arguments.seeds}")
    kind = "tempnet-toy" if arguments.toy else "tempnet"
    arguments.folder = arguments.folder or ROOT / "outputs" / kind
    toy = arguments.folder / "results.json"
    arguments.results = arguments.results or (toy if arguments.toy else RESULTS)
    return arguments


def facts(sizes: Sizes, seeds: int) -> dict[str, Any]:
    """Versions, hardware, seeds and settings."""
    return {
        "python": platform.python_version(),
        **{name: version(name) for name in PACKAGES},
        "cpu": cpu_name(),
        "threads": torch.get_num_threads(),
        "seeds": list(range(seeds)),
        "sizes": asdict(sizes),
        "selection_seeds": list(SELECTION),
        "tempnet": {**samplers.BOUNDS, "schedule": SCHEDULE},
        "samples": samplers.GENERATIONS,
        "tau_quantiles": list(samplers.QUANTILES),
    }


def cpu_name() -> str:
    """The processor, as the system names it."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if os.name == "posix" else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def main() -> None:
    arguments = parse()
    torch.set_num_threads(1)
    disable_progress_bar()
    sizes = TOY if arguments.toy else Sizes()
    bench = Bench(arguments.folder, sizes, arguments.seeds)
    record = facts(sizes, arguments.seeds)
    for data in arguments.data:
        if not bench.parts[data]:
            print(f"{data} is left out: set XRISK_DATA to the directory that holds gsm8k/")
            continue
        report = Report(bench, data)
        report.show()
        record[data] = report.as_json()
        arguments.results.parent.mkdir(parents=True, exist_ok=True)
        arguments.results.write_text(json.dumps(record, indent=1) + "\n")
        print(f"\nwritten to {arguments.results}", flush=True)


if __name__ == "__main__":
    main()
