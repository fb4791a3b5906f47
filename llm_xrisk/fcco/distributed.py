"""Joining the rows of all ranks, so that an objective only ever sees the whole mini-batch."""

import time
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor


def world_size() -> int:
    """Number of processes, 1 when none are joined."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def join(*tensors: Tensor | None) -> tuple[Any, ...]:
    r"""Concatenate each tensor over all ranks along its first dimension, with gradient.

    All tensors of one call have the same number of rows; ranks may have different numbers, none
    included. On one process the tensors come back as they are.

    The backward pass sums the gradients of all ranks. Every rank computes the same loss F of the
    joined rows, so the gradient of a local row s is W dF/ds: data-parallel training averages
    parameter gradients over the W ranks, which leaves exactly the gradient of F.

    Args:
        *tensors: Local rows, each (rows, ...); ``None`` is passed through.

    Returns:
        A tuple with one joined tensor per argument, (sum of rows over ranks, ...).

    Example:
        >>> scores, nothing = join(torch.tensor([1.0, 2.0]), None)
        >>> scores
        tensor([1., 2.])
    """
    world = world_size()
    if world == 1:
        return tensors
    first = next(t for t in tensors if t is not None)
    differs = [int(t is not None and t.requires_grad) for t in tensors]
    about = torch.tensor([first.shape[0], *differs], device=first.device)
    told = cast(list[list[int]], torch.stack(_gather(about, world)).tolist())  # pyright: ignore[reportUnknownMemberType]
    sizes = [own[0] for own in told]
    apply, joined = cast(Any, _Join).apply, list[Any]()
    for place, tensor in enumerate(tensors, start=1):
        if tensor is not None and any(own[place] for own in told) and not tensor.requires_grad:
            # every rank takes part in the backward pass, also one whose rows have no graph
            tensor = tensor.detach().requires_grad_(torch.is_grad_enabled())
        joined.append(None if tensor is None else apply(tensor, sizes))
    return tuple(joined)


def leave(patience: float = 0.2) -> None:
    """Leave the process group; the last thing a script does before its process ends.

    gloo's threads drop the tensors of a collective a moment after it is done, and need Python's
    lock for it. A thread that still waits for the lock when the interpreter goes down aborts the
    process (https://github.com/pytorch/pytorch/issues/190489), and destroying the group does not
    wait for its threads while anything else refers to it. So the lock is given up for a while.
    A no-op on one process.

    Args:
        patience: Seconds during which the lock is free; one thread needs microseconds.

    Example:
        >>> leave()
    """
    if not (dist.is_available() and dist.is_initialized()):
        return
    dist.destroy_process_group()
    time.sleep(patience)


def _gather(local: Tensor, world: int) -> list[Tensor]:
    """The same-shaped tensors of all ranks."""
    parts = [torch.empty_like(local) for _ in range(world)]
    dist.all_gather(parts, local)  # pyright: ignore[reportUnknownMemberType]
    return parts


class _Join(torch.autograd.Function):
    """All-gather of uneven rows; its adjoint is the sum over ranks, cut to the local rows."""

    @staticmethod
    def forward(ctx: Any, local: Tensor, sizes: list[int]) -> Tensor:
        ctx.sizes = sizes
        wire = local.to(torch.uint8) if local.dtype == torch.bool else local  # gloo has no bool
        padded = wire.new_zeros((max(sizes), *wire.shape[1:]))
        padded[: wire.shape[0]] = wire
        parts = _gather(padded, len(sizes))
        whole = torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])
        return whole.to(local.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        total = grads[0].contiguous().clone()
        dist.all_reduce(total)  # pyright: ignore[reportUnknownMemberType]
        rank = dist.get_rank()
        start = sum(ctx.sizes[:rank])
        return total[start : start + ctx.sizes[rank]], None
