"""Matrices of pairs of rows, and their means by row.

Pairs are chosen by weights of 0 and 1 in the dtype of the scores, not by booleans: on a CPU
selecting 512 x 512 entries by a random mask takes as long as computing all the rest.
"""

from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from llm_xrisk.fcco.groups import readable


def rows_of(anchors: Tensor) -> Tensor:
    """The rows to compute pairs for: those in ``anchors``, or all where finding them would wait.

    In eager code on a CPU these are the anchors (A,); on other devices and in compiled code, whose
    shapes must not depend on values, all of them. Callers go on masking by ``anchors[rows]``.

    Example:
        >>> rows_of(torch.tensor([False, True, True]))
        tensor([1, 2])
    """
    if readable(anchors):
        return anchors.nonzero().squeeze(-1)
    return torch.arange(anchors.shape[0], device=anchors.device)


def differences(others: Tensor, anchors: Tensor) -> Tensor:
    """Entry (i, j) is others_j - anchors_i, (A, R).

    Example:
        >>> differences(torch.tensor([1.0, 3.0]), torch.tensor([1.0]))
        tensor([[0., 2.]])
    """
    return others[None, :] - anchors[:, None]


def same_group(slot: Tensor, rows: Tensor, dtype: torch.dtype) -> Tensor:
    """Weight 1 where an anchor shares its slot with another row, else 0; (A, R).

    Example:
        >>> same_group(torch.tensor([0, 1, 0]), torch.tensor([0]), torch.float32)
        tensor([[1., 0., 1.]])
    """
    number = slot.to(dtype)  # slots are small integers, exact in any floating-point type
    return differences(number, number[rows]).eq_(0.0)


def logmeanexp(values: Tensor, weight: Tensor, tau: float = 1.0) -> tuple[Tensor, Tensor]:
    r"""Log of the mean of exp(values / tau) over each row, of the entries of weight 1.

    .. math:: \\log \\frac{\\sum_j w_{ij} e^{v_{ij} / \\tau}}{\\sum_j w_{ij}}

    Finite for any finite values.

    Args:
        values: (R, m), finite, without gradient.
        weight: 0 or 1, broadcasts against ``values``.
        tau: Temperature.

    Returns:
        (R,) log-means, about the lowest finite number where the weights are empty, and (R, m) the
        share of each entry in its sum, tau times the derivative.

    Example:
        >>> logmeanexp(torch.zeros(1, 3), torch.tensor([1.0, 1.0, 0.0]))
        (tensor([0.]), tensor([[0.5000, 0.5000, 0.0000]]))
    """
    count = weight.sum(-1)
    excluded = (weight - 1).mul_(torch.finfo(values.dtype).max)
    fits = excluded.shape == values.shape  # then no further matrix is needed
    exponent = torch.add(excluded, values, alpha=1 / tau, out=excluded if fits else None)
    log_sum, share = logsumexp(exponent)
    return log_sum - count.clamp(min=1).log(), share


def logsumexp(exponent: Tensor) -> tuple[Tensor, Tensor]:
    """Log of the sum of exp of each row, and the share of each entry in it, its derivative.

    Example:
        >>> logsumexp(torch.zeros(1, 2))
        (tensor([0.6931]), tensor([[0.5000, 0.5000]]))
    """
    share = torch.softmax(exponent, -1)
    # the share of the largest entry is 1 / sum exp(v - max), never less than 1 / m
    return exponent.amax(-1) - share.amax(-1).log(), share


def effective_fraction(share: Tensor, count: Tensor) -> Tensor:
    """Effective number of entries of each row, as a fraction of their number ``count``.

    1 / (m sum_j p_j^2) for shares p of m entries: 1 is uniform, 1/m a single entry.

    Example:
        >>> effective_fraction(torch.tensor([[1.0, 0.0]]), torch.tensor([2]))
        tensor([0.5000])
    """
    norm = cast(Tensor, torch.linalg.vector_norm(share, dim=-1))  # pyright: ignore[reportUnknownMemberType]
    return 1 / (norm.square() * count).clamp(min=1e-12)


def with_pair_gradient(
    scores: Tensor, rows: Tensor, value: Tensor, slope: Tensor, column: Tensor | None = None
) -> Tensor:
    """Give ``value``, computed without graph, its gradient in the scores of all pairs.

    Entry i of ``value`` changes with s_j - s_rows[i] by slope_ij column_j. The backward pass is
    two products of that matrix with a vector; no other matrix is made or kept.

    Args:
        scores: (R,) with gradient.
        rows: (A,) the anchors' rows.
        value: (A,).
        slope: (A, R).
        column: (R,) factors of the columns, or None for 1.

    Example:
        >>> s, row = torch.tensor([1.0, 3.0], requires_grad=True), torch.tensor([0])
        >>> gap = differences(s.detach(), s.detach()[row])
        >>> value = with_pair_gradient(s, row, gap.square().sum(-1), 2 * gap)
        >>> torch.autograd.grad(value[0], s)
        (tensor([-4.,  4.]),)
    """
    return cast(Tensor, _PairGradient.apply(scores[rows], scores, value, slope, column))  # pyright: ignore[reportUnknownMemberType]


def with_similarity_gradient(views: Tensor, value: Tensor, slope: Tensor) -> Tensor:
    """Give ``value``, computed without graph, its gradient in the similarities of all views.

    Entry i of ``value`` changes with the product of views i and j by slope_ij. As above, no
    matrix of the size of ``slope`` is made or kept beside it.

    Args:
        views: (R, d) with gradient.
        value: (R,).
        slope: (R, R).

    Example:
        >>> v = torch.tensor([[1.0], [3.0]], requires_grad=True)
        >>> value = with_similarity_gradient(v, torch.zeros(2), torch.tensor([[0.0, 1.0]] * 2))
        >>> torch.autograd.grad(value[0], v)                # d(v_0 v_1)
        (tensor([[3.],
                [1.]]),)
    """
    return cast(Tensor, _SimilarityGradient.apply(views, value, slope))  # pyright: ignore[reportUnknownMemberType]


class _PairGradient(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        anchors: Tensor,
        others: Tensor,
        value: Tensor,
        slope: Tensor,
        column: Tensor | None,
    ) -> Tensor:
        ctx.save_for_backward(slope, column)
        return value.clone()

    @staticmethod
    @once_differentiable  # the shares depend on the scores, which this gradient does not know
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        slope, column = ctx.saved_tensors
        grad = grads[0]
        as_anchor = slope.sum(-1) if column is None else slope @ column
        as_other = grad @ slope if column is None else (grad @ slope) * column
        return -grad * as_anchor, as_other, None, None, None


class _SimilarityGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, views: Tensor, value: Tensor, slope: Tensor) -> Tensor:
        ctx.save_for_backward(views, slope)
        return value.clone()

    @staticmethod
    @once_differentiable  # the shares depend on the scores, which this gradient does not know
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        views, slope = ctx.saved_tensors
        weight = grads[0][:, None]
        return weight * (slope @ views) + slope.T @ (weight * views), None, None
