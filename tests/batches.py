"""Batches of rows for objectives, and what an objective makes of one."""

import inspect
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from llm_xrisk.objectives import Objective, ObjectiveOutput


@dataclass(frozen=True)
class Batch:
    """Rows of a mini-batch; ``leaves`` are those with a gradient."""

    scores: Tensor
    targets: Tensor
    groups: dict[str, Tensor] = field(default_factory=dict)
    leaves: tuple[str, ...] = ("scores",)

    def tensors(self) -> dict[str, Tensor]:
        return {"scores": self.scores, "targets": self.targets, **self.groups}

    def map(self, change: Any) -> "Batch":
        """Apply ``change(name, tensor)`` to every tensor."""
        new = {name: change(name, tensor) for name, tensor in self.tensors().items()}
        return replace(self, scores=new.pop("scores"), targets=new.pop("targets"), groups=new)

    def rows(self, selection: Any) -> "Batch":
        return self.map(lambda name, tensor: tensor[selection])

    def scaled(self, factor: float) -> "Batch":
        return self.map(lambda name, t: t * factor if name in self.leaves else t)

    def copy(self) -> "Batch":
        """New leaves that ask for a gradient."""
        return self.map(lambda name, t: t.detach().clone().requires_grad_(name in self.leaves))

    def to(self, kind: Any) -> "Batch":
        """Cast the floating-point rows, or move all of them."""
        return self.map(
            lambda name, t: t.to(kind) if isinstance(kind, str) or t.is_floating_point() else t
        )


@dataclass(frozen=True)
class Result:
    loss: Tensor
    gradients: dict[str, Tensor]
    metrics: dict[str, Tensor]
    parameters: dict[str, Tensor]


def evaluate(objective: Objective, batch: Batch) -> Result:
    """Loss, gradients in the leaves and in the objective's own parameters, metrics."""
    tensors = batch.copy().tensors()
    own = dict(objective.named_parameters())
    leaves = [tensors[name] for name in batch.leaves] + list(own.values())
    output: ObjectiveOutput = objective(**tensors)
    gradients = torch.autograd.grad(output.loss, leaves, allow_unused=True, materialize_grads=True)
    rows, rest = gradients[: len(batch.leaves)], gradients[len(batch.leaves) :]
    return Result(
        output.loss.detach(),
        dict(zip(batch.leaves, rows, strict=True)),
        dict(output.metrics),
        dict(zip(own, rest, strict=True)),
    )


def state(objective: Objective) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in objective.state_dict().items()}


def assert_same(got: dict[str, Tensor], want: dict[str, Tensor], tolerance: float = 0.0) -> None:
    assert got.keys() == want.keys()
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=tolerance, atol=tolerance)


def exact_loss(objective: Objective, batch: Batch) -> Tensor:
    """The objective's ``exact`` on the tensors it takes."""
    taken = inspect.signature(objective.exact).parameters
    return objective.exact(**{name: t for name, t in batch.tensors().items() if name in taken})
