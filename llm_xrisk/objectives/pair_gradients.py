"""Values computed without graph, given their gradient in all pairs: one matrix, used twice."""

from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def with_pair_gradient(
    scores: Tensor,
    rows: Tensor,
    value: Tensor,
    slope: Tensor,
    columns: Tensor | None = None,
    label: Tensor | None = None,
    others: Tensor | None = None,
    scale: Tensor | float = 1.0,
) -> Tensor:
    """Give ``value``, computed without graph, its gradient in the scores of all pairs.

    Entry i of ``value`` changes with s_j - s_rows[i] by scale_i slope_ij; with ``columns``, entry
    (i, k) by slope_ij columns_kj. The backward pass is two products of ``slope`` with a vector
    (for each k); no other matrix is made or kept. With ``label`` (A,) the scores are (R, L) and
    the pairs of anchor i are those in its column. With ``others`` (N,) the entries j are these
    rows, not all.

    Args:
        scores: (R,) or (R, L) with gradient.
        rows: (A,) the anchors' rows.
        value: (A,), or (A, K) with columns.
        slope: (A, R), or (A, N) with others.
        columns: (K, R), with labels (K, A, R); None for one column of ones.
        label: (A,) the anchors' labels, None where there is one.
        others: (N,) different rows, none of them an anchor's; not with labels.
        scale: One number, or (A,); not with columns.

    Example:
        >>> s, row = torch.tensor([1.0, 3.0], requires_grad=True), torch.tensor([0])
        >>> gap = s.detach()[None] - s.detach()[row][:, None]
        >>> value = with_pair_gradient(s, row, gap.square().sum(-1), 2 * gap)
        >>> torch.autograd.grad(value[0], s)
        (tensor([-4.,  4.]),)
    """
    given = (scores, rows, label, value, slope, columns, others, scale)
    return cast(Tensor, _PairGradient.apply(*given))  # pyright: ignore[reportUnknownMemberType]


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


def with_cross_gradient(
    first: Tensor, second: Tensor, value: Tensor, rows: Tensor, columns: Tensor
) -> Tensor:
    """Give ``value``, computed without graph, its gradient in the similarities of two sides.

    Args:
        first: (R, d) with gradient.
        second: (R, d) with gradient.
        value: (R, 2); entry (i, 0) changes with first_i . second_j by rows_ij, entry (j, 1) with
            first_i . second_j by columns_ji.
        rows: (R, R).
        columns: (R, R).

    Example:
        >>> a, b = torch.tensor([[2.0]], requires_grad=True), torch.tensor([[3.0]])
        >>> one, none = torch.ones(1, 1), torch.zeros(1, 1)
        >>> value = with_cross_gradient(a, b, torch.zeros(1, 2), one, none)
        >>> torch.autograd.grad(value.sum(), a)
        (tensor([[3.]]),)
    """
    return cast(Tensor, _CrossGradient.apply(first, second, value, rows, columns))  # pyright: ignore[reportUnknownMemberType]


class _PairGradient(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        scores: Tensor,
        rows: Tensor,
        label: Tensor | None,
        value: Tensor,
        slope: Tensor,
        columns: Tensor | None,
        others: Tensor | None,
        scale: Tensor | float,
    ) -> Tensor:
        by_row = isinstance(scale, Tensor)
        ctx.save_for_backward(rows, label, slope, columns, others, scale if by_row else None)
        ctx.shape, ctx.scale = scores.shape, None if by_row else scale
        return value.clone()

    @staticmethod
    @once_differentiable  # the shares depend on the scores, which this gradient does not know
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        rows, label, slope, columns, others, scale = ctx.saved_tensors
        grad, scale = grads[0], scale if ctx.scale is None else ctx.scale
        if isinstance(scale, Tensor) or scale != 1:
            grad = grad * scale
        if label is not None:
            scores = _of_labels(ctx.shape, rows, label, slope, columns, grad)
        else:
            if columns is None:
                as_anchor, as_other = grad * slope.sum(-1), grad @ slope
            else:
                as_anchor = (grad * (slope @ columns.T)).sum(-1)
                as_other = ((grad.T @ slope) * columns).sum(0)
            if others is None:
                scores = as_other.index_add_(0, rows, as_anchor, alpha=-1)
            else:
                scores = grad.new_zeros(ctx.shape).index_copy_(0, others, as_other)
                scores.index_copy_(0, rows, as_anchor.neg_())
        return scores, None, None, None, None, None, None, None


def _of_labels(
    shape: torch.Size,
    rows: Tensor,
    label: Tensor,
    slope: Tensor,
    columns: Tensor | None,
    grad: Tensor,
) -> Tensor:
    """The gradient in scores (R, L) of pairs within labels."""
    weight = grad[:, None] if columns is None else torch.einsum("ak,kaj->aj", grad, columns)
    pull = slope * weight
    scores = pull.new_zeros(shape[1], shape[0]).index_add_(0, label, pull).T.contiguous()
    scores.view(-1).index_add_(0, rows * shape[1] + label, pull.sum(-1), alpha=-1)
    return scores


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


class _CrossGradient(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, first: Tensor, second: Tensor, value: Tensor, rows: Tensor, columns: Tensor
    ) -> Tensor:
        ctx.save_for_backward(first, second, rows, columns)
        return value.clone()

    @staticmethod
    @once_differentiable  # the shares depend on the features, which this gradient does not know
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        first, second, rows, columns = ctx.saved_tensors
        as_row, as_column = grads[0].unbind(-1)
        weight = rows * as_row[:, None]
        weight.addcmul_(columns.T.contiguous(), as_column)  # without the copy four times slower
        return weight @ second, weight.T @ first, None, None, None
