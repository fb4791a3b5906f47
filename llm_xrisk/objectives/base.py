"""What every objective shares: its face, its output and masked reductions."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from llm_xrisk.fcco import InnerEstimator
from llm_xrisk.fcco.keyed import KeyedState, check_index


@dataclass(frozen=True)
class ObjectiveOutput:
    """What an objective returns.

    Attributes:
        loss: () plug-in estimate of the objective; its gradient is the book's estimator.
        metrics: Detached scalars for the log, by name.
    """

    loss: Tensor
    metrics: Mapping[str, Tensor] = field(default_factory=dict[str, Tensor])


class Objective(nn.Module):
    """An objective of per-row scores: state, value, gradient.

    ``forward(scores, targets, *, index=None, **groups)`` takes the rows of this process, joins
    those of all processes with gradient (:func:`llm_xrisk.fcco.join`) and returns the loss of the
    whole mini-batch, so replicas hold equal state and data-parallel training has the gradient of
    the joined batch. It never waits for the device and never looks at values: labels, rewards and
    index are checked by :meth:`check`, which collators, samplers and trainers call on the CPU.

    Keep an objective outside DDP, FSDP and DeepSpeed modules, and switch it with ``train()`` and
    ``eval()`` as the model: in ``eval()`` no state changes.

    Attributes:
        score: For objectives of sequences, the name of the score they take
            (:mod:`llm_xrisk.objectives.scores`); None for those of plain model outputs.
    """

    score: str | None = None
    binary_targets: ClassVar[bool] = True

    @property
    def num_samples(self) -> int | None:
        """Number of samples the state is keyed by, or None where there is no state."""
        for module in self.modules():
            if isinstance(module, KeyedState):
                return module.num_samples
        return None

    def set_epoch(self, epoch: float) -> None:
        """Let every estimator's gamma follow its schedule."""
        for module in self.modules():
            if isinstance(module, InnerEstimator):
                module.set_epoch(epoch)

    def forward(self, *args: Any, **groups: Any) -> ObjectiveOutput:
        """Return loss and metrics of the joined rows; see the class of each objective."""
        raise TypeError(f"{type(self).__name__} does not define forward")

    def exact(self, *args: Any, **groups: Any) -> Tensor:
        """The objective on the full set of rows, without state: for validation and as oracle."""
        raise TypeError(f"{type(self).__name__} does not define exact")

    def check(self, *, targets: Tensor | None = None, index: Tensor | None = None) -> None:
        """Check the values of a batch on the host.

        Args:
            targets: (rows,) labels or rewards.
            index: (rows,) sample ids.

        Raises:
            ValueError: targets other than 0 and 1, or a missing index.
            IndexError: index outside [0, num_samples).
        """
        if targets is not None and self.binary_targets:
            listed = cast(list[float], targets.flatten().tolist())  # pyright: ignore[reportUnknownMemberType]
            values = sorted({float(v) for v in listed})
            if any(v not in (0.0, 1.0) for v in values):
                raise ValueError(
                    f"{type(self).__name__} needs targets 0 or 1, got {values[:8]}; threshold "
                    "them first, for example (targets >= 0.5)"
                )
        if self.num_samples is not None:
            check_index(require_index(self, index).cpu(), self.num_samples)


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean of ``values`` where ``mask``, and 0 (with gradient 0) where the mask is empty.

    Args:
        values: (R,); what stands outside the mask may be infinite or NaN.
        mask: (R,) of booleans.

    Example:
        >>> masked_mean(torch.tensor([1.0, 3.0, float("inf")]), torch.tensor([1, 1, 0]).bool())
        tensor(2.)
    """
    return values.masked_fill(~mask, 0.0).sum() / mask.sum().clamp(min=1)


def observed_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean of ``values`` where ``mask``, NaN where the mask is empty: for metrics.

    Example:
        >>> observed_mean(torch.tensor([1.0, 3.0]), torch.tensor([False, False]))
        tensor(nan)
    """
    return values.masked_fill(~mask, 0.0).sum() / mask.sum()


def observed_max(values: Tensor, mask: Tensor) -> Tensor:
    """Largest of ``values`` where ``mask``, NaN where the mask is empty: for metrics.

    Example:
        >>> observed_max(torch.tensor([-3.0, 5.0]), torch.tensor([True, False]))
        tensor(-3.)
    """
    lowest = values.new_full((1,), float("-inf"))
    largest = torch.cat([torch.where(mask, values, lowest), lowest]).amax()
    return torch.where(mask.any(), largest, float("nan"))


def widened(rows: Tensor) -> Tensor:
    """``rows`` in float32 or wider: sums over pairs of bfloat16 scores lose what they compare.

    Example:
        >>> widened(torch.tensor([1.0], dtype=torch.bfloat16)).dtype
        torch.float32
    """
    return rows.to(torch.promote_types(rows.dtype, torch.float32))


def require_index(objective: Objective, index: Tensor | None) -> Tensor:
    """Return ``index``, its range checked on a CPU, or raise the error that shows how to get one.

    Every row is checked, also those that no estimator will see.
    """
    if index is None:
        raise ValueError(
            f"{type(objective).__name__} keeps a value for each sample and got no index; number "
            "the rows with llm_xrisk.data.with_index(dataset) and pass index=batch['index']"
        )
    for module in objective.modules():
        if isinstance(module, KeyedState):
            module.check(index)
    return index
