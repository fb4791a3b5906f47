"""Paired digits views: CLIP-TempNet against other temperatures, DRRho-CLIP against FastCLIP.

    OMP_NUM_THREADS=1 python benchmarks/clip.py [--toy] [--folder DIR]

The upper and the lower half of each of scikit-learn's 1,797 digits of 8 x 8 pixels are its two
modalities (``pip install scikit-learn``). An encoder for each half, of 64 hidden units, learns by
GlobalCLIP in batches of 64; measured are R@1, the mean of both directions among all halves of the
500 test images, and a linear probe on both encoders' features. Two data sizes:

* 1,024 training pairs: a constant temperature (FastCLIP-v1), one that learns (v3), one for each
  sample (v2), networks (TempNet), and the constant one with a reference (DRRho-CLIP).
* 256 of these pairs: the constant temperature, and DRRho-CLIP.

The reference, one for each seed, is FastCLIP-v1 with 256 hidden units, trained three times as long
on the 1,024 pairs with tau = 0.1: for the first data size it has seen what the model sees, for the
second four times as much. Its features of the pairs without noise are computed once. Every method
has 2 learning rates x 4 values of its tau or rho (GRID) and takes the best mean R@1 on 273
validation images over 2 seeds; the choice trains once for each of 10 seeds and is tested once. The
grid, epochs and the taus' own step sizes were fixed after a look at validation R@1 of single runs
of all methods, and the second data size was added after DRRho-CLIP had trailed on the validation
images of the first; the test images were not looked at. Differences are paired by image and seed.
Finished runs are kept, so a stopped benchmark goes on: 22 minutes on a core shared with others.

What came out (benchmarks/results/clip-cpu.json): on 1,024 pairs no way to learn tau differs from
another or from a constant one; a network's taus hardly differ between samples after 640 steps.
DRRho-CLIP loses 1.8 points of R@1 (0.01 to 3.4) to FastCLIP where the reference has seen the same
pairs, of which it gets 57 % right. On 256 pairs, with a reference that has seen more, it wins 1.9
points of the probe (0.4 to 3.4) and 1.2 of R@1 (-0.3 to 2.7). Most choices lie on the edge of the
grid: the highest constant tau, the lowest rho, the higher learning rate.
"""

import argparse
import json
import platform
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.contrastive import TEST, TRAIN, VALIDATION, Split, digits  # noqa: E402
from llm_xrisk.evaluation.bootstrap import Bootstrap  # noqa: E402
from llm_xrisk.fcco import cosine  # noqa: E402
from llm_xrisk.objectives import (  # noqa: E402
    GlobalCLIP,
    GlobalTemperature,
    IndividualTemperature,
    TemperatureNetwork,
)

RESULTS = Path(__file__).parent / "results" / "clip-cpu.json"
WIDTH, BATCH, NOISE, GAMMA_MIN = 32, 64, 0.1, 0.2
TAU, LOWER, UPPER = 0.1, 0.01, 0.2  # of temperatures that learn
STEP, INDIVIDUAL_STEP, PROTOTYPES = 1e-3, 3e-3, 64
CONSTANT, DRRHO = "constant tau (FastCLIP-v1)", "constant tau, reference (DRRho-CLIP)"
GLOBAL, INDIVIDUAL = "global tau (FastCLIP-v3)", "individual taus (FastCLIP-v2)"
NETWORK = "temperature networks (TempNet)"
TAUS, RHOS = (0.05, 0.075, 0.1, 0.15), (1.0, 2.0, 2.5, 3.0)
GRID = {CONSTANT: TAUS, DRRHO: TAUS, GLOBAL: RHOS, INDIVIDUAL: RHOS, NETWORK: RHOS}
ARMS = {TRAIN: (CONSTANT, GLOBAL, INDIVIDUAL, NETWORK, DRRHO), 256: (CONSTANT, DRRHO)}
COMPARED = {
    TRAIN: [(NETWORK, CONSTANT), (NETWORK, GLOBAL), (NETWORK, INDIVIDUAL), (DRRHO, CONSTANT)],
    256: [(DRRHO, CONSTANT)],
}
METRICS = ("R@1", "linear probe")


@dataclass(frozen=True)
class Plan:
    """How much is run."""

    epochs: tuple[tuple[int, int], ...] = ((TRAIN, 40), (256, 80))
    reference_epochs: int = 120
    rates: tuple[float, ...] = (3e-3, 1e-2)
    settings: int = 4
    selection_seeds: tuple[int, ...] = (100, 101)
    seeds: int = 10


TOY = Plan(((TRAIN, 1), (256, 1)), 1, (1e-2,), 1, (100,), 2)


@dataclass(frozen=True)
class Run:
    """A training run and the images it is measured on."""

    pairs: int
    method: str
    rate: float
    setting: float
    seed: int
    part: str

    def __str__(self) -> str:
        name = "rho" if self.method in (GLOBAL, INDIVIDUAL, NETWORK) else "tau"
        return (
            f"{self.pairs} pairs; {self.method}; lr {self.rate:g}; {name} {self.setting:g}; "
            f"seed {self.seed}; {self.part}"
        )


class Halves(nn.Module):
    """An encoder for the upper and one for the lower half."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.sides = nn.ModuleList(
            nn.Sequential(nn.Linear(32, hidden), nn.ReLU(), nn.Linear(hidden, WIDTH))
            for _ in range(2)
        )

    def forward(self, images: Tensor, noise: torch.Generator | None = None) -> list[Tensor]:
        pixels = images[:, 0].flatten(1)
        if noise is not None:
            pixels = pixels + NOISE * torch.randn(pixels.shape, generator=noise)
        halves = (pixels[:, :32], pixels[:, 32:])
        return [encoder(half) for encoder, half in zip(self.sides, halves, strict=True)]


def objective_of(method: str, setting: float, pairs: int, epochs: int) -> GlobalCLIP:
    """With a gamma that falls to 0.2 within half of the epochs, the authors' schedule."""
    bounds: dict[str, float] = {"lower": LOWER, "upper": UPPER}

    def individual() -> IndividualTemperature:
        return IndividualTemperature(
            pairs, TAU, setting, lr=INDIVIDUAL_STEP, beta=0.5, clip=5.0, **bounds
        )

    def network(seed: int) -> TemperatureNetwork:
        return TemperatureNetwork(WIDTH, setting, num_prototypes=PROTOTYPES, seed=seed, **bounds)

    build: dict[str, Callable[[], dict[str, Any]]] = {
        CONSTANT: lambda: {"tau": setting},
        DRRHO: lambda: {"tau": setting, "use_reference": True},
        GLOBAL: lambda: {"tau": GlobalTemperature(TAU, setting, **bounds)},
        INDIVIDUAL: lambda: {"tau": individual(), "text_tau": individual()},
        NETWORK: lambda: {"tau": network(0), "text_tau": network(1)},
    }
    return GlobalCLIP(pairs, cosine(GAMMA_MIN, epochs / 2), **build[method]())


def train(
    model: Halves,
    objective: GlobalCLIP,
    images: Tensor,
    rate: float,
    seed: int,
    epochs: int,
    known: list[Tensor] | None = None,
) -> Halves:
    """AdamW, all steps falling to 0 along a cosine; no decay of what the objective learns."""
    generator = torch.Generator().manual_seed(seed)
    groups = [{"params": list(model.parameters()), "lr": rate, "weight_decay": 1e-2}]
    if own := list(objective.parameters()):
        groups.append({"params": own, "lr": STEP, "weight_decay": 0.0})
    optimizer = torch.optim.AdamW(groups)
    steps = epochs * (len(images) // BATCH)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for epoch in range(epochs):
        objective.set_epoch(epoch)
        for index in torch.randperm(len(images), generator=generator).split(BATCH):
            first, second = model(images[index], generator)
            rows = {} if known is None else {"ref_scores": known[0], "ref_targets": known[1]}
            rows = {name: features[index] for name, features in rows.items()}
            optimizer.zero_grad()
            objective(first, second, index=index, **rows).loss.backward()
            optimizer.step()
            schedule.step()
    return model.eval()


@torch.no_grad()
def retrieved(model: Halves, images: Tensor) -> np.ndarray:
    """(n,) share of the two directions in which an image's halves find each other first."""
    first, second = (F.normalize(side, dim=-1) for side in model(images))
    similarity, own = first @ second.T, torch.arange(len(images))
    hits = (similarity.argmax(1) == own).float() + (similarity.argmax(0) == own).float()
    return (hits / 2).numpy()


@torch.no_grad()
def probed(model: Halves, data: Split, part: str, pairs: int) -> np.ndarray:
    """(n,) which images a linear probe on both features, fitted to the pairs, gets right."""
    known = {name: torch.cat(model(data[name][0]), -1).numpy() for name in ("train", part)}
    scaler = StandardScaler().fit(known["train"][:pairs])
    probe = LogisticRegression(max_iter=2000)
    probe.fit(scaler.transform(known["train"][:pairs]), data["train"][1][:pairs])
    return (probe.predict(scaler.transform(known[part])) == data[part][1]).astype(float)


class Bench:
    """Runs what is missing, keeps what is done."""

    def __init__(self, plan: Plan, folder: Path) -> None:
        self.plan, self.data, self.epochs = plan, digits(), dict(plan.epochs)
        name = "toy" if plan == TOY else "full"
        self.folder, self.done = folder / name, dict[str, dict[str, Any]]()
        self.folder.mkdir(parents=True, exist_ok=True)
        self.path = self.folder / "runs.jsonl"
        for line in self.path.read_text().splitlines() if self.path.exists() else []:
            if line.endswith("}"):  # the last one of a process that was killed may be half written
                entry = json.loads(line)
                self.done[entry["run"]] = entry
        self.references: dict[int, Halves] = {}

    def reference(self, seed: int) -> Halves:
        """The reference of a seed, from its file if it was trained before."""
        if seed in self.references:
            return self.references[seed]
        torch.manual_seed(1000 + seed)
        model, path = Halves(256), self.folder / f"reference-{seed}.pt"
        if path.exists():
            model.load_state_dict(torch.load(path, weights_only=True))
        else:
            epochs, images = self.plan.reference_epochs, self.data["train"][0]
            objective = objective_of(CONSTANT, 0.1, TRAIN, epochs)
            train(model, objective, images, 1e-2, 1000 + seed, epochs)
            torch.save(model.state_dict(), path.with_suffix(".part"))
            path.with_suffix(".part").replace(path)
        self.references[seed] = model.eval()
        return model

    def run(self, run: Run) -> dict[str, Any]:
        """R@1 of each image and, on the test's, the probe's hits; trained where it is missing."""
        if str(run) in self.done:
            return self.done[str(run)]
        images, epochs = self.data["train"][0][: run.pairs], self.epochs[run.pairs]
        known = None
        if run.method == DRRHO:
            known = [side.detach() for side in self.reference(run.seed)(images)]
        started = time.perf_counter()
        torch.manual_seed(run.seed)
        objective = objective_of(run.method, run.setting, run.pairs, epochs)
        model = train(Halves(64), objective, images, run.rate, run.seed, epochs, known)
        seconds = time.perf_counter() - started
        found = {"R@1": retrieved(model, self.data[run.part][0]).tolist()}
        if run.part == "test":
            found["linear probe"] = probed(model, self.data, "test", run.pairs).tolist()
        entry = {
            "run": str(run),
            "seconds": round(seconds, 2),
            "tau": self.taus(objective, model, images),
            **found,
        }
        with self.path.open("a") as file:
            file.write("\n" + json.dumps(entry))
        self.done[str(run)] = entry
        print(f"{len(self.done):4d} {run}: R@1 {np.mean(found['R@1']):.3f}", flush=True)
        return entry

    @torch.no_grad()
    def taus(self, objective: GlobalCLIP, model: Halves, images: Tensor) -> dict[str, float]:
        """Mean and spread over the training images of the upper halves' tau at the end."""
        features = F.normalize(model(images)[0], dim=-1)
        module = objective.image_tau
        if isinstance(module, IndividualTemperature):
            tau = module.dual.value
        else:
            tau = module.eval()(features, torch.arange(len(images)))
        return {"mean": round(tau.mean().item(), 4), "sd": round(tau.std().item(), 4)}

    def choose(self, pairs: int, method: str) -> tuple[Run, float]:
        """The best of the grid, and its validation R@1."""
        best, value = Run(pairs, method, 0.0, 0.0, 0, "test"), -1.0
        for rate in self.plan.rates:
            for setting in GRID[method][: self.plan.settings]:
                run = Run(pairs, method, rate, setting, 0, "validation")
                runs = [self.run(replace(run, seed=s)) for s in self.plan.selection_seeds]
                mean = float(np.mean([found["R@1"] for found in runs]))
                if mean > value:
                    best, value = replace(run, part="test"), mean
        return best, value

    def arm(self, pairs: int) -> dict[str, Any]:
        """All methods of a data size, chosen, tested, compared."""
        table, values = dict[str, Any](), dict[str, dict[str, np.ndarray]]()
        for method in ARMS[pairs]:
            chosen, validation = self.choose(pairs, method)
            runs = [self.run(replace(chosen, seed=seed)) for seed in range(self.plan.seeds)]
            values[method] = {m: np.array([found[m] for found in runs]) for m in METRICS}
            table[method] = {
                "chosen": {"lr": chosen.rate, "tau or rho": chosen.setting},
                "validation R@1": round(100 * validation, 2),
                **{name: interval(v) for name, v in values[method].items()},
                "tau at the end": runs[0]["tau"],
                "seconds of a run": float(np.median([found["seconds"] for found in runs])),
            }
        gaps = {
            f"{one} - {other}": {m: interval(values[one][m] - values[other][m]) for m in METRICS}
            for one, other in COMPARED[pairs]
        }
        return {"methods": table, "paired differences": gaps}

    def reference_scores(self) -> dict[str, Any]:
        """What the references themselves come to."""
        models = [self.reference(seed) for seed in range(self.plan.seeds)]
        images = {part: self.data[part][0] for part in ("train", "test")}
        hits = {part: [retrieved(m, x).mean() for m in models] for part, x in images.items()}
        probe = [probed(m, self.data, "test", TRAIN).mean() for m in models]
        found = {f"R@1, {part}": values for part, values in hits.items()} | {"linear probe": probe}
        return {name: round(100 * float(np.mean(values)), 2) for name, values in found.items()}


def interval(values: np.ndarray) -> dict[str, float]:
    """Mean over seeds and test images in percent, with the 95 % bootstrap interval over both."""
    found = Bootstrap(TEST).interval(values)
    return {name: round(100 * getattr(found, name), 2) for name in ("estimate", "lower", "upper")}


def facts(plan: Plan, bench: Bench) -> dict[str, Any]:
    """Versions, hardware and protocol."""
    packages = ("torch", "numpy", "scikit-learn")
    return {
        "versions": {"python": platform.python_version()} | {p: version(p) for p in packages},
        "hardware": {"machine": platform.machine(), "threads": 1, "shared": True},
        "protocol": asdict(plan)
        | {
            "splits": {"train": TRAIN, "validation": VALIDATION, "test": TEST},
            "batch": BATCH,
            "noise": NOISE,
            "grid": {method: GRID[method][: plan.settings] for method in GRID},
            "reference": "256 hidden units, tau 0.1, lr 0.01, the 1,024 pairs; seed + 1000",
            "first tau, bounds": [TAU, LOWER, UPPER],
            "step sizes of taus": {"global, networks (AdamW)": STEP, "individual": INDIVIDUAL_STEP},
        },
        "intervals": Bootstrap(TEST).method.replace("prompts", "test images"),
        "seconds_of_all_runs": round(sum(entry["seconds"] for entry in bench.done.values())),
    }


def show(results: dict[str, Any]) -> None:
    for size, arm in results.items():
        print(f"\n{size}")
        for kind in arm.values():
            for name, row in kind.items():
                shown = [row[m] for m in METRICS]
                text = "   ".join(
                    f"{v['estimate']:6.2f} [{v['lower']:6.2f}, {v['upper']:6.2f}]" for v in shown
                )
                print(f"{name:72} {text}")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--toy", action="store_true", help="one epoch: tests the program alone")
    parser.add_argument("--folder", type=Path, default=ROOT / "outputs" / "clip")
    parser.add_argument("--results", type=Path, help="by default benchmarks/results/clip-cpu.json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    plan = TOY if args.toy else Plan()
    bench = Bench(plan, args.folder)
    results = {f"{pairs} pairs": bench.arm(pairs) for pairs in ARMS}
    record = {"results": results, "references": bench.reference_scores(), **facts(plan, bench)}
    show(results)
    target = args.results or (bench.folder / "results.json" if args.toy else RESULTS)
    target.write_text(json.dumps(record, indent=1) + "\n")
    print(f"\nreferences: {record['references']}; written to {target}")


if __name__ == "__main__":
    main()
