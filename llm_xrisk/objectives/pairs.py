"""Matrices of all pairs of rows, and their means by row.

Pairs are chosen by weights of 0 and 1 in the dtype of the scores, not by booleans: on a CPU
selecting 512 x 512 entries by a random mask takes as long as computing all the rest.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def differences(scores: Tensor) -> Tensor:
    """Entry (i, j) is s_j - s_i, (R, R): row i is the anchor.

    Example:
        >>> differences(torch.tensor([1.0, 3.0]))
        tensor([[ 0.,  2.],
                [-2.,  0.]])
    """
    return scores[None, :] - scores[:, None]


def same_group(slot: Tensor, like: Tensor) -> Tensor:
    """Weight 1 where two rows share a slot (B,), else 0; (B, B) in the dtype of ``like``.

    Example:
        >>> same_group(torch.tensor([0, 1, 0]), torch.zeros(3))[0]
        tensor([1., 0., 1.])
    """
    number = slot.to(like.dtype)  # slots are small integers, exact in any floating-point type
    return (number[None, :] - number[:, None]).eq_(0.0)


def weighted_mean(values: Tensor, weight: Tensor) -> Tensor:
    """Mean of each row of ``values`` under ``weight``, which broadcasts; 0 where that is empty.

    Example:
        >>> weighted_mean(torch.tensor([[1.0, 3.0, 9.0]]), torch.tensor([1.0, 1.0, 0.0]))
        tensor([2.])
    """
    return (values * weight).sum(-1) / weight.sum(-1).clamp(min=1)


def logmeanexp(values: Tensor, weight: Tensor, tau: float = 1.0) -> tuple[Tensor, Tensor]:
    r"""Log of the mean of exp(values / tau) over each row, of the entries of weight 1.

    .. math:: \log \frac{\sum_j w_{ij} e^{v_{ij} / \tau}}{\sum_j w_{ij}}

    Finite for any finite values, with a gradient of 0 where the weights are empty.

    Args:
        values: (R, m), finite.
        weight: 0 or 1, broadcasts against ``values``.
        tau: Temperature.

    Returns:
        (R,) log-means, -inf where the weights are empty, and (R, m) the share of each entry in
        its sum, without gradient.

    Example:
        >>> logmeanexp(torch.zeros(1, 3), torch.tensor([1.0, 1.0, 0.0]))
        (tensor([0.]), tensor([[0.5000, 0.5000, 0.0000]]))
    """
    count = weight.sum(-1)
    excluded = (weight - 1) * torch.finfo(values.dtype).max
    log_sum, share = _LogSumExp.apply(torch.add(excluded, values, alpha=1 / tau))
    return torch.where(count > 0, log_sum - count.log(), float("-inf")), share


def effective_fraction(share: Tensor, weight: Tensor) -> Tensor:
    """Effective number of entries of each row, as a fraction of their number.

    1 / (m sum_j p_j^2) for shares p of m entries: 1 is uniform, 1/m a single entry.

    Example:
        >>> effective_fraction(torch.tensor([[1.0, 0.0]]), torch.ones(2))
        tensor([0.5000])
    """
    return 1 / (share.square().sum(-1) * weight.sum(-1)).clamp(min=1e-12)


class _LogSumExp(torch.autograd.Function):
    """Log-sum-exp by row, which keeps the softmax of its forward pass for the backward one.

    torch.logsumexp computes the exponentials of all pairs a second time; this halves the cost.
    """

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> tuple[Tensor, Tensor]:
        share = torch.softmax(values, -1)
        # the share of the largest entry is 1 / sum exp(v - max), never less than 1 / m
        log_sum = values.amax(-1) - share.amax(-1).log()
        ctx.save_for_backward(share)
        ctx.mark_non_differentiable(share)
        return log_sum, share

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> Tensor:
        (share,) = ctx.saved_tensors
        return share * grad[:, None]
