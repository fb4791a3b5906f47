"""Tensors kept beside the parameters of an optimizer, saved in the order of its groups."""

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer

from llm_xrisk.fcco import world_size
from llm_xrisk.fcco.arguments import shown


def groups_of(optimizer: Optimizer) -> list[tuple[dict[str, Any], list[Tensor]]]:
    """Each group of the optimizer with those of its parameters that are trained.

    Example:
        >>> frozen = torch.zeros(1)
        >>> trained = torch.nn.Parameter(torch.ones(1))
        >>> [(group["lr"], ps) for group, ps in groups_of(torch.optim.SGD([frozen, trained], 0.1))]
        [(0.1, [Parameter containing:
        tensor([1.], requires_grad=True)])]
    """
    return [(g, [p for p in g["params"] if p.requires_grad]) for g in optimizer.param_groups]


class BesideParameters:
    """At most one tensor for each parameter of an optimizer, in float32 or wider.

    Parameters are known by their place in the optimizer's groups, as they are in the optimizer's
    own checkpoint: build model and optimizer as the run that was saved had them.

    Args:
        optimizer: Any optimizer of torch; groups may be added later.
        name: What the tensors are, for errors.

    Example:
        >>> w = torch.nn.Parameter(torch.ones(2, dtype=torch.bfloat16))
        >>> kept = BesideParameters(torch.optim.SGD([w], lr=0.1), "averages")
        >>> kept.of(w), kept.saved()
        (tensor([1., 1.]), [tensor([1., 1.])])
    """

    def __init__(self, optimizer: Optimizer, name: str) -> None:
        self.optimizer, self.name = optimizer, name
        self.values: dict[Tensor, Tensor] = {}

    def of(self, parameter: Tensor) -> Tensor:
        """The tensor of ``parameter``, at first a copy of its value."""
        if parameter not in self.values:
            self.values[parameter] = widened(parameter)
        return self.values[parameter]

    def saved(self) -> list[Tensor | None]:
        """The tensors in the order of the optimizer's parameters, None where there is none."""
        return [self.values.get(p) for p in self._all()]

    def load(self, saved: Sequence[Tensor | None]) -> None:
        """Take copies of what :meth:`saved` returned.

        Raises:
            ValueError: tensors of other parameters.
        """
        parameters = self._all()
        if isinstance(saved, str) or not all(t is None or isinstance(t, Tensor) for t in saved):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise ValueError(
                f"the checkpoint holds no tensors as {self.name}; it must come from state_dict() "
                "of a run that was saved"
            )
        got = [None if t is None else tuple(t.shape) for t in saved]
        need = [tuple(p.shape) for p in parameters]
        fits = [g is None or g == n for g, n in zip(got, need, strict=False)]
        if len(got) != len(need) or not all(fits):
            wrong = fits.index(False) if False in fits else min(len(got), len(need))
            raise ValueError(
                f"the checkpoint holds {self.name} of {len(got)} parameters and the optimizer has "
                f"{len(need)}, and they differ from parameter {wrong} on; give the optimizer the "
                "parameters that it had, in the same order, before loading"
            )
        self.values = {
            p: t.to(p.device, wide(p), copy=True)
            for p, t in zip(parameters, saved, strict=True)
            if t is not None
        }

    def _all(self) -> list[Tensor]:
        return [p for group in self.optimizer.param_groups for p in group["params"]]


def entries(state: Any, names: Sequence[str], owner: object) -> list[Any]:
    """The entries of a checkpoint.

    Raises:
        ValueError: what is no checkpoint of ``owner``.

    Example:
        >>> entries({"u": 1, "v": 2}, ["v"], owner=None)
        [2]
    """
    if not isinstance(state, Mapping) or not set(names) <= set(cast(Mapping[str, Any], state)):
        held = sorted(cast(Mapping[str, Any], state)) if isinstance(state, Mapping) else None
        raise ValueError(
            f"got {shown(state) if held is None else f'a state with {held}'}; a checkpoint of "
            f"{type(owner).__name__} has {list(names)}: load what its state_dict() returned"
        )
    return [state[name] for name in names]


def wide(parameter: Tensor) -> torch.dtype:
    """The parameter's dtype, but float32 for shorter ones."""
    return torch.promote_types(parameter.dtype, torch.float32)


def widened(parameter: Tensor) -> Tensor:
    """A copy of the parameter's value in float32 or wider."""
    return parameter.detach().to(wide(parameter), copy=True)


def mean_over_ranks(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The mean of each tensor over all processes; on one process they come back as they are.

    Example:
        >>> mean_over_ranks([torch.tensor([1.0, 2.0])])
        [tensor([1., 2.])]
    """
    world = world_size()
    if world == 1 or not tensors:
        return list(tensors)
    # one message for all, in the widest type among them
    whole = torch.cat([t.reshape(-1).to(wide(t)) for t in tensors])
    dist.all_reduce(whole)  # pyright: ignore[reportUnknownMemberType]
    parts = cast(Sequence[Tensor], torch.split(whole / world, [t.numel() for t in tensors]))  # pyright: ignore[reportUnknownMemberType]
    return [part.to(t.dtype).reshape(t.shape) for part, t in zip(parts, tensors, strict=True)]
