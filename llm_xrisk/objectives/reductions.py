"""Means and maxima over the rows that count, in float32 or wider."""

import torch
from torch import Tensor


def masked_mean(values: Tensor, mask: Tensor | None) -> Tensor:
    """Mean of ``values`` where ``mask``, and 0 (with gradient 0) where the mask is empty.

    Args:
        values: (R,); what stands outside the mask may be infinite or NaN.
        mask: (R,) of booleans; None for all rows.

    Example:
        >>> masked_mean(torch.tensor([1.0, 3.0, float("inf")]), torch.tensor([1, 1, 0]).bool())
        tensor(2.)
    """
    if mask is None:
        return values.mean() if values.numel() else values.sum()
    return values.masked_fill(~mask, 0.0).sum() / mask.sum().clamp(min=1)


def observed_mean(values: Tensor, mask: Tensor | None) -> Tensor:
    """Mean of ``values`` where ``mask``, NaN where the mask is empty: for metrics.

    Example:
        >>> observed_mean(torch.tensor([1.0, 3.0]), torch.tensor([False, False]))
        tensor(nan)
    """
    if mask is None:
        return values.mean()
    return values.masked_fill(~mask, 0.0).sum() / mask.sum()


def observed_max(values: Tensor, mask: Tensor | None) -> Tensor:
    """Largest of ``values`` where ``mask``, NaN where the mask is empty: for metrics.

    Example:
        >>> observed_max(torch.tensor([-3.0, 5.0]), torch.tensor([True, False]))
        tensor(-3.)
    """
    if mask is None:
        return values.amax() if values.numel() else values.mean()
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
