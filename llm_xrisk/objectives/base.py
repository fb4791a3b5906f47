"""What every objective shares: its face, its output, its checks."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
from torch import Tensor, nn

from llm_xrisk.fcco import InnerEstimator, PerSampleDual, join
from llm_xrisk.fcco.groups import readable
from llm_xrisk.fcco.keyed import KeepsDtype, Keys, check_index
from llm_xrisk.objectives.calls import built, check_kind, guarded, require_index
from llm_xrisk.objectives.precision import unified, without_autocast
from llm_xrisk.objectives.refusals import check_binary, wrong_shapes


@dataclass(frozen=True)
class ObjectiveOutput:
    """What an objective returns.

    Attributes:
        loss: () plug-in estimate of the objective; its gradient is the book's estimator.
        metrics: Detached scalars for the log, by name; worked out when first looked at.
    """

    loss: Tensor
    metrics: Mapping[str, Tensor] = field(default_factory=dict[str, Tensor])

    if not TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any:
            """Say where the loss is, to who takes the output for it."""
            raise AttributeError(f"an ObjectiveOutput has no {name!r}; its loss is output.loss")


class _Later(Mapping[str, Tensor]):
    def __init__(self, compute: Callable[[], Mapping[str, Tensor]]) -> None:
        self._compute = compute

    @cached_property
    def _found(self) -> Mapping[str, Tensor]:
        with torch.no_grad():
            return self._compute()

    def __getitem__(self, name: str) -> Tensor:
        return self._found[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._found)

    def __len__(self) -> int:
        return len(self._found)


def later(compute: Callable[[], Mapping[str, Tensor]]) -> Mapping[str, Tensor]:
    """What ``compute`` returns, worked out when first looked at; in compiled code at once.

    A step whose metrics nobody logs does not pay for them. ``compute`` must not read state, which
    the next step changes.

    Example:
        >>> metrics = later(lambda: {"objective": torch.tensor(1.0)})
        >>> metrics["objective"]
        tensor(1.)
    """
    if torch.compiler.is_compiling():
        with torch.no_grad():
            return compute()
    return _Later(compute)


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
    row_advice: ClassVar[str] = "give each row one entry in each of them"
    num_samples: int | None = None
    num_labels: int | None = None
    _wide: torch.dtype | None = None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Let the class say by name what it cannot be built or called with.

        And keep autocast out of ``forward`` and ``exact``: pairs of scores need their precision.
        """
        super().__init_subclass__(**kwargs)
        if "__init__" in vars(cls):
            cls.__init__ = built(vars(cls)["__init__"])
        for name in ("forward", "exact"):
            if name in vars(cls):
                setattr(cls, name, guarded(without_autocast(vars(cls)[name])))

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

    def keys(self, ids: Tensor) -> Keys:
        """Keys of the ids that :meth:`joined` returned, which it has checked in training."""
        return Keys(ids, self.num_samples if self.training else None)

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
        check_binary(type(self).__name__, targets)

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
        for name, rows in (("targets", targets), ("index", index)):
            check_kind(self, name, rows, set())
        if targets is not None and self.binary_targets:
            self.check_labels(targets)
        if self.num_samples is not None:
            check_index(require_index(self, index).cpu(), self.num_samples)
