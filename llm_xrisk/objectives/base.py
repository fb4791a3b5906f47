"""What every objective shares: its face, its output, its checks."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from llm_xrisk.fcco import InnerEstimator, PerSampleDual, join
from llm_xrisk.fcco.groups import readable
from llm_xrisk.fcco.keyed import KeepsDtype, check_index
from llm_xrisk.objectives.precision import unified, without_autocast


@dataclass(frozen=True)
class ObjectiveOutput:
    """What an objective returns.

    Attributes:
        loss: () plug-in estimate of the objective; its gradient is the book's estimator.
        metrics: Detached scalars for the log, by name.
    """

    loss: Tensor
    metrics: Mapping[str, Tensor] = field(default_factory=dict[str, Tensor])


class Objective(KeepsDtype):
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
        num_samples: Number of samples the state is keyed by; None where no index is needed.
        num_labels: Number of labels L where rows are (B, L), None where they are (B,).
    """

    score: str | None = None
    binary_targets: ClassVar[bool] = True
    num_samples: int | None = None
    num_labels: int | None = None
    _wide: torch.dtype | None = None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Keep autocast out of ``forward`` and ``exact``: pairs of scores need their precision."""
        super().__init_subclass__(**kwargs)
        for name in ("forward", "exact"):
            if name in vars(cls):
                setattr(cls, name, without_autocast(vars(cls)[name]))

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

    def joined(
        self, scores: Tensor, targets: Tensor | None, index: Tensor | None = None, **rows: Any
    ) -> tuple[Any, ...]:
        """Check the rows of this process, and join those of all: scores, targets, ids, the rest.

        What has a floating-point type comes back in float32 or wider.

        Raises:
            ValueError: shapes that do not fit, a missing index, or on a CPU labels that are none.
            IndexError: on a CPU, an index outside [0, num_samples).
        """
        self.check_shapes(scores=scores, targets=targets, index=index, **rows)
        if self.num_samples is not None:
            index = require_index(self, index) if self.training or index is not None else None
            if index is None:  # nothing is read or written for a sample in eval()
                index = torch.arange(len(scores), device=scores.device) % self.num_samples
        wide = self._widest()
        given = (scores, targets, index, *rows.values())
        return join(*(t if t is None else unified(t, wide) for t in given))

    def _widest(self) -> torch.dtype:
        """float32, or float64 where the state has it: rows are computed with in that at least."""
        if self._wide is None:
            kinds = [b.dtype for b in self.buffers() if b.is_floating_point()]
            self._wide = torch.float64 if torch.float64 in kinds else torch.float32
        return self._wide

    def check_shapes(self, **rows: Tensor | None) -> None:
        """Refuse rows that do not belong together, and on a CPU labels that are none.

        Raises:
            ValueError: with what came and what is needed.
        """
        given = {name: t for name, t in rows.items() if t is not None}
        if given["scores"].dim() == 0:
            raise ValueError(
                f"{type(self).__name__} got scores () and needs (rows,); pass one number for each "
                'row, for example F.cross_entropy(logits, labels, reduction="none")'
            )
        one = given["scores"].shape[:1]
        each = one if self.num_labels is None else (*one, self.num_labels)
        need = {name: each if name in ("scores", "targets") else one for name in given}
        if any(t.shape != need[name] for name, t in given.items()):
            raise wrong_shapes(self, given, {n: ("rows", *s[1:]) for n, s in need.items()})
        if self.binary_targets and "targets" in given and readable(given["targets"]):
            self.check_labels(given["targets"])

    def check_labels(self, targets: Tensor) -> None:
        """Refuse targets other than 0 and 1, -1 and 1, or booleans; reads them on the host.

        Raises:
            ValueError: with the values that came.
        """
        if targets.dtype == torch.bool or targets.numel() == 0:
            return
        if not targets.is_floating_point():
            low, high = torch.aminmax(targets)
            if low.item() >= 0 and high.item() <= 1:
                return
        zero, signed = targets == 0, targets == -1
        known = zero | signed | (targets == 1)
        if not bool(known.all()) or (bool(zero.any()) and bool(signed.any())):
            listed = cast(list[float], targets.flatten().tolist())  # pyright: ignore[reportUnknownMemberType]
            raise ValueError(
                f"{type(self).__name__} needs targets 0 or 1 (or -1 and 1, or booleans), got "
                f"{sorted({float(v) for v in listed})[:8]}; threshold them first, for example "
                "(targets >= 0.5)"
            )

    def stats(self, metrics: Mapping[str, Tensor] | None = None) -> dict[str, float]:
        """How the objective is doing, read on the host: for logs now and then, not every step.

        Args:
            metrics: Those of the last output, to be told with the rest: the running objective and
                the effective fraction of what is weighed.

        Returns:
            For each estimator the share of its samples visited so far and, over these, the mean
            of the tracked values (logarithms where it keeps them); for duals the mean of all.
        """
        found = {name: float(value) for name, value in (metrics or {}).items()}
        named = cast(Iterable[tuple[str, nn.Module]], self.named_modules())  # pyright: ignore[reportUnknownMemberType]
        for name, module in named:
            if isinstance(module, PerSampleDual):
                found[f"{name}/mean"] = float(module.value.float().mean())
            if isinstance(module, InnerEstimator):
                visited = module.visited
                found[f"{name}/visited"] = float(visited.float().mean())
                found[f"{name}/mean"] = float(module.u[visited].float().mean())
        return found

    def check(self, *, targets: Tensor | None = None, index: Tensor | None = None) -> None:
        """Check the values of a batch on the host.

        Args:
            targets: (rows,) labels or rewards.
            index: (rows,) sample ids.

        Raises:
            ValueError: targets other than 0 and 1 (or -1 and 1, or booleans), or a missing index.
            IndexError: index outside [0, num_samples).
        """
        if targets is not None and self.binary_targets:
            self.check_labels(targets)
        if self.num_samples is not None:
            check_index(require_index(self, index).cpu(), self.num_samples)


def require_index(objective: Objective, index: Tensor | None) -> Tensor:
    """Return ``index``, its range checked on a CPU, or raise the error that shows how to get one.

    Every row is checked, also those that no estimator will see.
    """
    if index is None:
        raise ValueError(
            f"{type(objective).__name__} keeps a value for each sample and got no index; number "
            "the rows with llm_xrisk.data.with_index(dataset) and pass index=batch['index']"
        )
    if index.is_floating_point() or index.dtype == torch.bool:
        raise ValueError(f"index must be integers, sample ids from 0 up; got {index.dtype}")
    # in eval() rows are those of another data set, and nothing is read or written for them
    if objective.num_samples is not None and objective.training and readable(index):
        check_index(index, objective.num_samples)
    return index.long()


def wrong_shapes(
    objective: Objective, given: Mapping[str, Tensor], need: Mapping[str, tuple[Any, ...]]
) -> ValueError:
    """The error for rows that do not fit: what came, what is needed, what to do."""
    got = ", ".join(f"{name} {tuple(t.shape)}" for name, t in given.items())
    wanted = ", ".join(f"{name} ({', '.join(map(str, s))})" for name, s in need.items())
    return ValueError(
        f"{type(objective).__name__} got {got} and needs {wanted}; give each row one entry: "
        "logits[:, 1] - logits[:, 0] or logits.squeeze(-1) are scores of one label"
    )
