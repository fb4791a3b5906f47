"""Self-supervised digits: SogCLR and iSogCLR in batches of 32 against SimCLR in 32 and in 512.

    OMP_NUM_THREADS=1 python benchmarks/contrastive.py [--epochs 20] [--seeds 6]

The data are the 1,797 digits of 8 x 8 pixels that scikit-learn brings (``pip install
scikit-learn``). A small network learns from 1,024 of them without labels; a linear probe, fitted
to its frozen features, is what is measured. Every method gets the same epochs, the same learning
rates to choose from and the same runs to choose by, on 273 validation images; the 500 test images
are looked at once, with the chosen rate. The settings were fixed beforehand, but for the epochs (40
at first) and the lowest rate, which followed a look at validation accuracies of a first try: four
epochs of each method, 40 of SogCLR and of one run of iSogCLR.
Runs are kept in the results file and not repeated, so an interrupted call goes on where it stopped.

What came out: a tie. Every paired interval of benchmarks/results/contrastive-cpu.json holds 0, and
SimCLR in 32 is no worse than in 512, so there is no harm of small batches here to be undone; the
probe does better still on the bare pixels. Digits this small cannot tell these methods apart.
"""

import argparse
import json
import platform
import sys
import time
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import train_test_split
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from llm_xrisk.evaluation.bootstrap import Bootstrap
from llm_xrisk.fcco import cosine
from llm_xrisk.objectives import Objective
from llm_xrisk.objectives.contrastive import GlobalContrastive
from llm_xrisk.objectives.contrastive_baselines import InfoNCE
from llm_xrisk.objectives.contrastive_robust import RobustGlobalContrastive

RESULTS = Path(__file__).parent / "results"
TRAIN, VALIDATION, TEST, WIDTH, FEW = 1024, 273, 500, 64, 10
TAU, GAMMA_MIN = 0.1, 0.2
RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2)
SELECTION_SEEDS = (100, 101)
METHODS: dict[str, tuple[str, int]] = {
    "SogCLR, 32": ("sogclr", 32),
    "iSogCLR, 32": ("isogclr", 32),
    "SimCLR, 32": ("simclr", 32),
    "SimCLR, 512": ("simclr", 512),
}
PAIRS = (
    ("SogCLR, 32", "SimCLR, 32"),
    ("iSogCLR, 32", "SimCLR, 32"),
    ("SogCLR, 32", "SimCLR, 512"),
    ("iSogCLR, 32", "SimCLR, 512"),
    ("iSogCLR, 32", "SogCLR, 32"),
)

Split = dict[str, tuple[Tensor, np.ndarray]]


def digits() -> Split:
    """Images in [0, 1] and labels of the three splits, the same for every run."""
    images, labels = load_digits(return_X_y=True)
    pixels = torch.tensor(images, dtype=torch.float32).reshape(-1, 1, 8, 8) / 16
    rest, test = train_test_split(
        np.arange(len(labels)), test_size=TEST, stratify=labels, random_state=0
    )
    train, validation = train_test_split(
        rest, train_size=TRAIN, test_size=VALIDATION, stratify=labels[rest], random_state=0
    )
    parts = {"train": train, "validation": validation, "test": test}
    return {name: (pixels[rows], labels[rows]) for name, rows in parts.items()}


def augmented(images: Tensor, generator: torch.Generator) -> Tensor:
    """A view of each image: shifted by a pixel, brighter or darker, noisy, with a hole of 3 x 3."""
    rows = torch.arange(len(images))
    draw = partial(torch.randint, size=(len(images),), generator=generator)
    padded = nn.functional.pad(images, (1, 1, 1, 1))
    patches = padded.unfold(2, 8, 1).unfold(3, 8, 1)  # (B, 1, 3, 3, 8, 8)
    views = patches[rows, :, draw(0, 3), draw(0, 3)]
    views = views * (0.6 + 0.8 * torch.rand(len(images), 1, 1, 1, generator=generator))
    views = views + 0.1 * torch.randn(views.shape, generator=generator)
    grid, top, left = torch.arange(8), draw(0, 6), draw(0, 6)
    down = (grid >= top[:, None]) & (grid < top[:, None] + 3)
    right = (grid >= left[:, None]) & (grid < left[:, None] + 3)
    return views.masked_fill((down[:, :, None] & right[:, None, :])[:, None], 0.0)


class Network(nn.Module):
    """An encoder of two convolutions, and the projector that is thrown away."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(16, 32, 3, padding=1, stride=2),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(32 * 16, WIDTH),
            nn.ReLU(),
        )
        self.projector = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, 32))

    def forward(self, images: Tensor) -> Tensor:
        return self.projector(self.encoder(images))


def objective_of(name: str, epochs: int) -> Objective:
    """With the authors' tau = 0.1; gamma falls to 0.2 within half of the epochs, as in FastCLIP."""
    gamma = cosine(GAMMA_MIN, epochs / 2)
    build: dict[str, Callable[[], Objective]] = {
        "sogclr": lambda: GlobalContrastive(TRAIN, gamma, TAU),
        "isogclr": lambda: RobustGlobalContrastive(TRAIN, gamma, TAU),
        "simclr": lambda: InfoNCE(TAU),
    }
    return build[name]()


def pretrained(
    images: Tensor, name: str, batch: int, rate: float, seed: int, epochs: int
) -> nn.Module:
    """The encoder after its epochs: AdamW, the rate falling to 0 along a cosine."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    network, objective = Network(), objective_of(name, epochs)
    optimizer = torch.optim.AdamW(network.parameters(), lr=rate, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * (TRAIN // batch))
    for epoch in range(epochs):
        objective.set_epoch(epoch)
        for index in torch.randperm(TRAIN, generator=generator).split(batch):
            views = augmented(images[index].repeat(2, 1, 1, 1), generator)
            first, second = network(views).chunk(2)
            optimizer.zero_grad()
            objective(first, second, index=index).loss.backward()
            optimizer.step()
            schedule.step()
    return network.encoder.eval()


def probe(encoder: nn.Module, data: Split, part: str, labelled: np.ndarray) -> np.ndarray:
    """Which images of ``part`` a linear probe fitted to the ``labelled`` ones gets right."""
    with torch.no_grad():
        features = {name: encoder(data[name][0]).flatten(1).numpy() for name in ("train", part)}
    scaler = StandardScaler().fit(features["train"])
    model = LogisticRegression(max_iter=2000)
    model.fit(scaler.transform(features["train"][labelled]), data["train"][1][labelled])
    return model.predict(scaler.transform(features[part])) == data[part][1]


def few(labels: np.ndarray) -> np.ndarray:
    """The first ten training images of each digit."""
    return np.concatenate([np.flatnonzero(labels == digit)[:FEW] for digit in range(10)])


def packed(right: np.ndarray) -> str:
    return np.packbits(right).tobytes().hex()


def unpacked(text: str) -> np.ndarray:
    bits = np.unpackbits(np.frombuffer(bytes.fromhex(text), dtype=np.uint8))
    return bits[:TEST].astype(np.float64)


class Runs:
    """Runs that were done, in the results file, by what they were."""

    def __init__(self, path: Path, data: Split, epochs: int) -> None:
        self.path, self.data, self.epochs = path, data, epochs
        record = json.loads(path.read_text()) if path.exists() else {}
        same = record.get("settings") == self.settings
        self.done: dict[str, dict[str, Any]] = record.get("runs", {}) if same else {}

    @property
    def settings(self) -> dict[str, Any]:
        return {
            "epochs": self.epochs,
            "rates": list(RATES),
            "selection_seeds": list(SELECTION_SEEDS),
            "tau": TAU,
            "gamma": f"cosine to {GAMMA_MIN} within half of the epochs",
            "splits": {"train": TRAIN, "validation": VALIDATION, "test": TEST},
        }

    def run(self, method: str, rate: float, seed: int, part: str) -> dict[str, Any]:
        key = f"{method}; lr {rate:g}; seed {seed}; {part}"
        if key not in self.done:
            start = time.perf_counter()
            images, labels = self.data["train"]
            encoder = pretrained(images, *METHODS[method], rate, seed, self.epochs)
            seconds = time.perf_counter() - start
            everything = probe(encoder, self.data, part, np.arange(TRAIN))
            result = {"accuracy": float(everything.mean()), "seconds": round(seconds, 1)}
            if part == "test":
                ten = probe(encoder, self.data, part, few(labels))
                result |= {"right": packed(everything), "right_few": packed(ten)}
            self.done[key] = result
            self.save({})
            print(f"{key}: {result['accuracy']:.4f} in {seconds:.0f} s", flush=True)
        return self.done[key]

    def save(self, report: dict[str, Any]) -> None:
        record = {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "scikit-learn": version("scikit-learn"),
            "threads": torch.get_num_threads(),
            "settings": self.settings,
            **report,
            "runs": self.done,
        }
        self.path.parent.mkdir(exist_ok=True)
        self.path.write_text(json.dumps(record, indent=1) + "\n")


def interval(values: np.ndarray) -> dict[str, float]:
    """Mean over seeds and test images in percent, with the 95 % bootstrap interval over both."""
    found = Bootstrap(TEST).interval(values)
    return {name: round(100 * getattr(found, name), 2) for name in ("estimate", "lower", "upper")}


def untrained(data: Split, seeds: int) -> dict[str, float]:
    """What the probe makes of pixels and of networks that learned nothing."""
    pixels = probe(nn.Identity(), data, "test", np.arange(TRAIN)).mean()
    random = []
    for seed in range(seeds):
        torch.manual_seed(seed)
        random.append(probe(Network().encoder.eval(), data, "test", np.arange(TRAIN)).mean())
    return {"pixels": round(100 * pixels, 2), "random network": round(100 * np.mean(random), 2)}


def report(runs: Runs, seeds: int) -> dict[str, Any]:
    chosen: dict[str, float] = {}
    for method in METHODS:
        scores = {
            rate: np.mean(
                [runs.run(method, rate, s, "validation")["accuracy"] for s in SELECTION_SEEDS]
            )
            for rate in RATES
        }
        chosen[method] = max(scores, key=lambda rate: scores[rate])
    found: dict[str, Any] = {"chosen_rates": chosen, "untrained": untrained(runs.data, seeds)}
    for labels, field in (("all labels", "right"), ("ten labels a digit", "right_few")):
        right = {
            method: np.stack(
                [unpacked(runs.run(method, chosen[method], s, "test")[field]) for s in range(seeds)]
            )
            for method in METHODS
        }
        found[labels] = {
            "accuracy": {method: interval(values) for method, values in right.items()},
            "paired differences": {
                f"{one} - {other}": interval(right[one] - right[other]) for one, other in PAIRS
            },
        }
    found["intervals"] = Bootstrap(TEST).method.replace("prompts", "test images")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--seeds", type=int, default=6)
    parser.add_argument("--results", type=Path, default=RESULTS / "contrastive-cpu.json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    runs = Runs(args.results, digits(), args.epochs)
    found = report(runs, args.seeds)
    runs.save({"seeds": args.seeds, **found})
    print(json.dumps(found, indent=1))
    print(f"\nwritten to {args.results}")


if __name__ == "__main__":
    main()
