"""Logarithms of means of exponentials over each row, and the shares that are their gradient."""

import math
from typing import cast

import torch
from torch import Tensor


def logmeanexp(
    values: Tensor, weight: Tensor | None, tau: float = 1.0, count: Tensor | int | None = None
) -> tuple[Tensor, Tensor]:
    r"""Log of the mean of exp(values / tau) over each row, of the entries of weight 1.

    .. math:: \\log \\frac{\\sum_j w_{ij} e^{v_{ij} / \\tau}}{\\sum_j w_{ij}}

    Finite for any finite values.

    Args:
        values: (R, m), finite, without gradient.
        weight: 0 or 1, broadcasts against ``values``; None for 1.
        tau: Temperature.
        count: Sum of the weights of each row, where it is known.

    Returns:
        (R,) log-means, about the lowest finite number where the weights are empty, and (R, m) the
        share of each entry in its sum, tau times the derivative.

    Example:
        >>> logmeanexp(torch.zeros(1, 3), torch.tensor([1.0, 1.0, 0.0]))
        (tensor([0.]), tensor([[0.5000, 0.5000, 0.0000]]))
    """
    if weight is None:
        log_sum, share = logsumexp(values if tau == 1 else values / tau)
        return log_sum - math.log(max(values.shape[-1], 1)), share
    count = weight.sum(-1) if count is None else count
    excluded = (weight - 1).mul_(torch.finfo(values.dtype).max)
    fits = excluded.shape == values.shape  # then no further matrix is needed
    exponent = torch.add(excluded, values, alpha=1 / tau, out=excluded if fits else None)
    log_sum, share = logsumexp(exponent)
    if isinstance(count, int):
        return log_sum - math.log(max(count, 1)), share
    return log_sum - count.clamp(min=1).log(), share


def logsumexp(exponent: Tensor) -> tuple[Tensor, Tensor]:
    """Log of the sum of exp of each row, and the share of each entry in it, its derivative.

    Example:
        >>> logsumexp(torch.zeros(1, 2))
        (tensor([0.6931]), tensor([[0.5000, 0.5000]]))
    """
    if exponent.shape[-1] == 0:  # no rank has a row
        return exponent.new_zeros(exponent.shape[:-1]), exponent
    share = torch.softmax(exponent, -1)
    # the share of the largest entry is 1 / sum exp(v - max), never less than 1 / m
    return exponent.amax(-1) - share.amax(-1).log(), share


def effective_fraction(share: Tensor, count: Tensor | int) -> Tensor:
    """Effective number of entries of each row, as a fraction of their number ``count``.

    1 / (m sum_j p_j^2) for shares p of m entries: 1 is uniform, 1/m a single entry.

    Example:
        >>> effective_fraction(torch.tensor([[1.0, 0.0]]), torch.tensor([2]))
        tensor([0.5000])
    """
    norm = cast(Tensor, torch.linalg.vector_norm(share, dim=-1))  # pyright: ignore[reportUnknownMemberType]
    return (norm.square() * count).clamp_(min=1e-12).reciprocal_()
