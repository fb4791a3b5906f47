"""One run: a small network, batches of a fixed composition, and a method that takes steps.

Shared by both sides of the comparison, so it imports nothing but torch and numpy.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

HIDDEN = 64
BATCH = 128
POSITIVES = 32
EPOCHS = 15

Step = Callable[[Tensor, Tensor, Tensor], None]  # features, targets, index


@dataclass(frozen=True)
class Run:
    """What a run is made of; everything that its result depends on besides data and versions."""

    method: str
    setting: Mapping[str, Any]
    lr: float
    seed: int
    data: str  # a name of arrays: x_train, y_train, x_eval


@dataclass(frozen=True)
class Context:
    """What a method is built from: the network and facts of the training set."""

    network: nn.Module
    run: Run
    targets: Tensor
    num_steps: int

    @property
    def lr(self) -> float:
        """The learning rate."""
        return self.run.lr

    @property
    def setting(self) -> Mapping[str, Any]:
        """The method's setting."""
        return self.run.setting

    def scores(self, features: Tensor) -> Tensor:
        """(B,) scores in the scale the setting asks for: raw or through a sigmoid."""
        raw = self.network(features).squeeze(-1)
        return raw.sigmoid() if self.setting.get("link") == "sigmoid" else raw


def network(inputs: int, outputs: int, seed: int) -> nn.Module:
    """An MLP of one hidden layer; equal seeds give equal weights on both sides."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(inputs, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, outputs))


def steps_per_epoch(targets: np.ndarray) -> int:
    """The sampler's epoch: until the larger class, at its share of a batch, is through."""
    positives = int((targets == 1).sum())
    negatives = len(targets) - positives
    return max(positives // POSITIVES, negatives // (BATCH - POSITIVES))


def shuffled(size: int, seed: int, num_steps: int, batch: int = BATCH) -> Iterator[np.ndarray]:
    """Batches of shuffled rows, over and over; a rest shorter than a batch is dropped."""
    rng = np.random.default_rng(seed)
    for step in range(num_steps):
        place = step % (size // batch)
        if place == 0:
            order = rng.permutation(size)
        yield order[place * batch : (place + 1) * batch]


def train(context: Context, step: Step, x: np.ndarray, batches: Iterator[Any]) -> None:
    """Give the method its batches."""
    features = torch.as_tensor(x)
    for rows in batches:
        index = torch.as_tensor(np.asarray(rows, dtype=np.int64))
        step(features[index], context.targets[index], index)


def predict(model: nn.Module, x: np.ndarray) -> np.ndarray:
    """Scores of rows: (n,) where the network has one output, else (n, outputs)."""
    with torch.no_grad():
        return model(torch.as_tensor(x)).squeeze(-1).numpy()


def usual_step(
    context: Context, optimizer: torch.optim.Optimizer, loss: Callable[..., Tensor]
) -> Step:
    """Scores, loss, backward pass, step: ``loss`` gets scores, targets and index."""

    def step(features: Tensor, targets: Tensor, index: Tensor) -> None:
        optimizer.zero_grad()
        loss(context.scores(features), targets, index).backward()
        optimizer.step()

    return step
