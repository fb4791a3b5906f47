"""How low training brings the true average-precision surrogate: ours, with prior, and LibAUC.

Digits, 8 against the rest, 80 positives, batches of 16 positives and 48 negatives, gamma 0.1, plain
SGD with learning rate 0.05. Scores are linear in the pixels, to which noise is added, so that no
weights separate the classes. What is reported is (6.22) on all training rows, by its definition.
"""

import json
import shlex
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor

POSITIVES, BATCH_POSITIVES, BATCH_NEGATIVES = 80, 16, 48
GAMMA, LR, STEPS, NOISE = 0.1, 0.05, 1500, 0.3
SEEDS = (0, 1, 2, 3, 4)

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]  # scores, targets, index


def rows() -> tuple[Tensor, Tensor]:
    """Pixels in [0, 1] with noise, and labels, the 80 positives first."""
    images, digit = load_digits(return_X_y=True)
    rng = np.random.default_rng(0)
    positives = rng.permutation(np.flatnonzero(digit == 8))[:POSITIVES]
    order = np.concatenate([positives, np.flatnonzero(digit != 8)])
    noisy = images[order] / 16 + NOISE * rng.standard_normal(images[order].shape)
    targets = (np.arange(len(order)) < POSITIVES).astype(np.int64)
    return torch.tensor(noisy, dtype=torch.float32), torch.tensor(targets)


def surrogate(scores: np.ndarray, targets: np.ndarray) -> float:
    """(6.22) with the squared hinge of margin 1, in [-1, 0]."""
    loss = np.maximum(1 + scores[None, :] - scores[targets == 1][:, None], 0) ** 2
    return float(-(loss[:, targets == 1].sum(1) / loss.sum(1)).mean())


def train(loss: Loss, seed: int, lr: float = LR, steps: int = STEPS) -> float:
    """The surrogate on all rows after training with a loss."""
    x, targets = rows()
    torch.manual_seed(seed)
    model = torch.nn.Linear(x.shape[1], 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    rng = np.random.default_rng(seed)
    for _ in range(steps):
        positives = rng.choice(POSITIVES, BATCH_POSITIVES, replace=False)
        negatives = rng.choice(np.arange(POSITIVES, len(x)), BATCH_NEGATIVES, replace=False)
        index = torch.as_tensor(np.concatenate([positives, negatives]))
        optimizer.zero_grad()
        loss(model(x[index]).squeeze(-1), targets[index], index).backward()
        optimizer.step()
    with torch.no_grad():
        return surrogate(model(x).squeeze(-1).double().numpy(), targets.numpy())


def ours(prior: bool) -> Loss:
    """AveragePrecision of this package, at the sampler's or at the data's share of positives."""
    from llm_xrisk.objectives import AveragePrecision

    size = len(rows()[0])
    objective = AveragePrecision(size, gamma=GAMMA, prior=POSITIVES / size if prior else None)
    return lambda scores, targets, index: objective(scores, targets, index=index).loss


def libauc() -> Loss:
    """LibAUC's APLoss; needs its environment."""
    from libauc.losses import APLoss  # pyright: ignore

    return APLoss(len(rows()[0]), gamma=GAMMA, device="cpu")


def oracle_report(libauc_python: str | None) -> dict[str, Any]:
    """The surrogate for each seed, by method."""
    found: dict[str, Any] = {
        "protocol": {
            "positives": POSITIVES,
            "batch": [BATCH_POSITIVES, BATCH_NEGATIVES],
            "gamma": GAMMA,
            "lr": LR,
            "steps": STEPS,
            "noise": NOISE,
            "seeds": list(SEEDS),
        },
        "AveragePrecision, prior": [train(ours(prior=True), s) for s in SEEDS],
        "AveragePrecision": [train(ours(prior=False), s) for s in SEEDS],
    }
    if libauc_python:
        root = Path(__file__).resolve().parents[2]
        code = (
            "import json; from benchmarks.tabular.ap_oracle import SEEDS, libauc, train; "
            "print(json.dumps([train(libauc(), s) for s in SEEDS]))"
        )
        command = [*shlex.split(libauc_python), "-W", "ignore", "-c", code]
        done = subprocess.run(command, cwd=root, check=True, capture_output=True, text=True)
        found["LibAUC APLoss"] = json.loads(done.stdout.splitlines()[-1])
    return found
