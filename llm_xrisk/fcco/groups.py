"""Sums and means over the rows of one sample or question, in static shapes, on the device."""

import math
from typing import cast

import torch
from torch import Tensor


def readable(tensor: Tensor) -> bool:
    """Whether reading a value of ``tensor`` is free: eager code on a CPU.

    Elsewhere it would wait for the device, and in compiled code shapes must not depend on values.
    """
    return tensor.is_cpu and not torch.compiler.is_compiling()


def slots(index: Tensor) -> Tensor:
    """Number equal entries of ``index`` (B,) alike, 0 <= slot < B.

    Example:
        >>> slots(torch.tensor([70, 30, 70]))
        tensor([1, 0, 1])
    """
    if readable(index):
        return cast(Tensor, torch.unique(index, return_inverse=True)[1])  # pyright: ignore
    ordered, order = torch.sort(index, stable=True)
    starts = torch.ones_like(order)
    starts[1:] = ordered[1:] != ordered[:-1]
    return torch.empty_like(order).scatter_(0, order, starts.cumsum(0) - 1)


def group_sum(values: Tensor, slot: Tensor) -> Tensor:
    """Sum of ``values`` (B, ...) over the rows of each row's slot, (B, ...)."""
    return torch.zeros_like(values).index_add(0, slot, values)[slot]


def group_mean(
    values: Tensor, slot: Tensor, where: Tensor | None, *, log: bool = False
) -> tuple[Tensor, Tensor]:
    """Mean over the rows of each row's slot that lie in ``where``, and the number of these.

    The mean is differentiable; where there is nothing to average it is 0, or the lowest finite
    number as a logarithm, with gradient 0.

    Args:
        values: (B, ...) numbers, or their logarithms.
        slot: (B,) from :func:`slots`.
        where: (B,) which rows count, None for all.
        log: Whether ``values`` are logarithms; so is the result then.

    Returns:
        (B, ...) means and (B,) counts.

    Example:
        >>> slot, where = torch.tensor([0, 0, 0, 1]), torch.tensor([True, True, False, False])
        >>> group_mean(torch.tensor([1.0, 3.0, 9.0, 9.0]), slot, where)
        (tensor([2., 2., 2., 0.]), tensor([2., 2., 2., 0.]))
    """
    if where is None:
        count = group_sum(torch.ones_like(slot, dtype=values.dtype), slot)
        size, masked = columns(count, values), values
    else:
        count = group_sum(where.to(values.dtype), slot)
        size, outside = columns(count.clamp(min=1), values), columns(~where, values)
        masked = values.masked_fill(outside, torch.finfo(values.dtype).min if log else 0.0)
    if not log:
        return group_sum(masked, slot) / size, count
    top = _group_max(masked.detach(), slot)
    share = torch.exp(masked - top)
    if where is not None:
        share = share.masked_fill(columns(~where, values), 0.0)
    # the sum is at least 1, the largest entry's share, but where there is nothing to sum
    return torch.log(group_sum(share, slot).clamp(min=0.5) / size) + top, count


def distinct(index: Tensor) -> bool:
    """Whether no two entries of ``index`` are known to be equal; False where finding out waits.

    Example:
        >>> distinct(torch.tensor([4, 2])), distinct(torch.tensor([4, 4]))
        (True, False)
    """
    if not readable(index):
        return False
    listed = cast(list[int], index.tolist())  # pyright: ignore[reportUnknownMemberType]
    return len(set(listed)) == len(listed)


def finite_rows(values: Tensor, where: Tensor | None) -> Tensor | None:
    """The rows of ``where`` whose ``values`` (B, ...) are numbers; None where that is all of them.

    One overflow must not become part of a state: no later step would take it out.

    Example:
        >>> finite_rows(torch.tensor([1.0, float("inf")]), None)
        tensor([ True, False])
    """
    if readable(values) and math.isfinite(values.sum().item()):  # cheaper than to ask of each
        return where
    finite = torch.isfinite(values)
    finite = finite if values.dim() == 1 else finite.flatten(1).all(1)
    return finite if where is None else where & finite


def columns(rows: Tensor, like: Tensor) -> Tensor:
    """Reshape (B,) so that it broadcasts against ``like`` (B, ...)."""
    return rows if like.dim() == 1 else rows.reshape(-1, *([1] * (like.dim() - 1)))


def _group_max(values: Tensor, slot: Tensor) -> Tensor:
    """Largest of each row's slot."""
    where = columns(slot, values).expand_as(values)
    return torch.zeros_like(values).scatter_reduce(0, where, values, "amax", include_self=False)[
        slot
    ]
