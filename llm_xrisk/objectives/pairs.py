"""Matrices of pairs of rows, and their means by row.

Pairs are chosen by weights of 0 and 1 in the dtype of the scores, not by booleans: on a CPU
selecting 512 x 512 entries by a random mask takes as long as computing all the rest.
"""

import torch
from torch import Tensor

from llm_xrisk.fcco.groups import readable
from llm_xrisk.fcco.keyed import Keys
from llm_xrisk.objectives.pair_gradients import with_pair_gradient
from llm_xrisk.objectives.reductions import masked_mean


def rows_of(anchors: Tensor) -> Tensor:
    """The rows to compute pairs for: those in ``anchors``, or all where finding them would wait.

    In eager code on a CPU these are the anchors (A,); on other devices and in compiled code, whose
    shapes must not depend on values, all of them. Callers go on masking by ``anchors[rows]``.

    Example:
        >>> rows_of(torch.tensor([False, True, True]))
        tensor([1, 2])
    """
    if readable(anchors):
        return anchors.nonzero().view(-1)
    return torch.arange(anchors.shape[0], device=anchors.device)


def differences(others: Tensor, anchors: Tensor) -> Tensor:
    """Entry (i, j) is others_j - anchors_i, (A, R).

    Example:
        >>> differences(torch.tensor([1.0, 3.0]), torch.tensor([1.0]))
        tensor([[0., 2.]])
    """
    return others - anchors.unsqueeze(-1)


def same_group(slot: Tensor, rows: Tensor, dtype: torch.dtype) -> Tensor:
    """Weight 1 where an anchor shares its slot with another row, else 0; (A, R).

    Example:
        >>> same_group(torch.tensor([0, 1, 0]), torch.tensor([0]), torch.float32)
        tensor([[1., 0., 1.]])
    """
    number = slot.to(dtype)  # slots are small integers, exact in any floating-point type
    return differences(number, number[rows]).eq_(0.0)


class Pairs:
    """The pairs of each positive, its anchor, with the negatives; of one label, or of several.

    With scores (R, L) a pair is one of the same label, and an anchor is a positive of a label.
    Nothing here loops over labels, and one label costs no more than it would by itself. Where the
    negatives are known they alone are paired; elsewhere all rows are, and weighed.

    Args:
        scores: (R,) or (R, L) with gradient.
        positive: Booleans of the same shape.
        whole: Whether to pair each anchor with all rows, whatever their class.

    Attributes:
        rows: (A,) the anchors' rows; all rows where finding the positives would wait.
        others: (N,) rows that anchors are paired with, None for all.
        label: (A,) the anchors' labels, None where there is one.
        anchors: (A,) which of them are positives; None where all are.
        contrasted: (A,) which are positives of a label that has negatives too; None where all are.
        gap: (A, N) s_j - s_i, without gradient.
        weight: Weight 1 for the entries that count, else 0, (N,) or (A, N); None where all do.

    Example:
        >>> pairs = Pairs(torch.tensor([2.0, 1.0, 0.5]), torch.tensor([True, False, True]))
        >>> pairs.gap
        tensor([[-1.0000],
                [ 0.5000]])
    """

    def __init__(self, scores: Tensor, positive: Tensor, *, whole: bool = False) -> None:
        self.scores, self.positive, self.whole = scores, positive, whole
        self.label: Tensor | None = None
        self.others: Tensor | None = None
        self.weight: Tensor | None = None
        known, fixed = readable(positive), scores.detach()  # then the rows are the anchors
        if scores.dim() == 1:
            self.num_labels = 1
            self.rows = rows_of(positive)
            self.anchors = None if known else positive
            beside = fixed
            if known and not whole:
                self.others = rows_of(~positive)
                beside = fixed.index_select(0, self.others)
            self.gap = differences(beside, fixed.index_select(0, self.rows))
        else:
            self.num_labels = scores.shape[1]
            place = rows_of(positive.flatten())
            self.rows, self.label = place // self.num_labels, place % self.num_labels
            self.anchors = None if known else positive.flatten()
            self.gap = fixed.T[self.label].sub_(fixed[self.rows, self.label][:, None])
        if not whole and self.others is None:
            self.weight = self.columns_of((~positive).to(scores.dtype))
        self.contrasted = self._contrasted()

    def counts(self) -> Tensor | int:
        """How many entries of each anchor's row count: (A,) or (), or a number."""
        if self.weight is None:
            return self.gap.shape[-1]
        return self.weight.sum(-1)

    def _contrasted(self) -> Tensor | None:
        if self.label is None and self.anchors is None:  # then sizes tell
            only = len(self.rows) == len(self.positive)
            return torch.zeros_like(self.rows, dtype=torch.bool) if only else None
        negative = ~self.positive
        found = negative.any() if self.label is None else negative.any(0)[self.label]
        if self.anchors is not None:
            return self.anchors & found
        return None if bool(found.all()) else found

    def keys(self, ids: Keys) -> Keys:
        """(A,) the state's key of each anchor: its sample, or its sample and label."""
        own, below = ids.index.index_select(0, self.rows), ids.below
        if self.label is None:
            return Keys(own, below)
        count = self.num_labels
        return Keys(own * count + self.label, None if below is None else below * count)

    def columns_of(self, rows: Tensor) -> Tensor:
        """What ``rows`` (R,) or (R, L) hold of the others, (N,) or (A, N) of the anchor's label."""
        if self.label is not None:
            return rows.T[self.label]
        return rows if self.others is None else rows.index_select(0, self.others)

    def anchors_of(self, rows: Tensor) -> Tensor:
        """(A,) what ``rows`` (R,) or (R, L) hold of the anchors themselves."""
        return rows[self.rows] if self.label is None else rows[self.rows, self.label]

    def by_label(self, where: Tensor | None) -> Tensor | None:
        """(L, A) weight 1 for the anchors in ``where`` of each label; None where that is all."""
        if self.label is None:
            return None if where is None else where[None].to(self.gap.dtype)
        own = self.labels().index[:, None] == self.label
        return (own if where is None else own & where).to(self.gap.dtype)

    def labels(self) -> Keys:
        """(L,) the state's key of each label."""
        return Keys.each(self.num_labels, self.rows.device)

    def for_anchors(self, values: Tensor) -> Tensor:
        """``values`` (L,) of each anchor's label, (A,), or (1,) of the only label."""
        return values if self.label is None else values[self.label]

    def means(self, *values: Tensor) -> tuple[Tensor, ...]:
        """(A,) mean of each of ``values`` (A, N) over the entries that count."""
        if self.weight is None:
            scale = 1 / max(self.gap.shape[-1], 1)
            return tuple(v.sum(-1).mul_(scale) for v in values)
        share = self.shares()
        if self.label is None:
            return tuple(v @ share for v in values)
        return tuple((v * share).sum(-1) for v in values)

    def shares(self) -> Tensor:
        """What each entry weighs in a mean over those that count, (N,) or (A, N)."""
        weight = self.gap.new_ones(self.gap.shape[-1]) if self.weight is None else self.weight
        return weight / weight.sum(-1, keepdim=True).clamp_(min=1)

    def sums(self, values: Tensor, columns: Tensor) -> Tensor:
        """(A, K) sum over entries j of ``values`` (A, N) times ``columns`` (K, N) or (K, A, N)."""
        if self.label is None:
            return values @ columns.T
        return torch.einsum("aj,kaj->ak", values, columns)

    def attach(
        self,
        value: Tensor,
        slope: Tensor,
        columns: Tensor | None = None,
        scale: Tensor | float = 1.0,
    ) -> Tensor:
        """Give ``value`` its gradient in s_j - s_i; see with_pair_gradient.

        ``slope`` may be one number.
        """
        slope = slope if slope.dim() == 2 else slope.expand(self.gap.shape)
        return with_pair_gradient(
            self.scores, self.rows, value, slope, columns, self.label, self.others, scale
        )

    def attach_mean(self, value: Tensor, slope: Tensor) -> Tensor:
        """Give ``value`` (A,) the gradient of a mean over the entries that count."""
        if self.weight is None:
            return self.attach(value, slope, scale=1 / max(self.gap.shape[-1], 1))
        return self.attach(value, slope * self.shares())

    def mean(self, values: Tensor, where: Tensor | None) -> Tensor:
        """Mean over labels of the mean of ``values`` (A,) over their anchors in ``where``.

        Labels without one are left out; 0 where nothing is left.
        """
        if self.label is None:
            return masked_mean(values, where)
        weight = torch.ones_like(values) if where is None else where.to(values.dtype)
        count = weight.new_zeros(self.num_labels).index_add(0, self.label, weight)
        weight = weight / count[self.label].clamp(min=1)
        values = values if where is None else values.masked_fill(~where, 0.0)
        return (values * weight).sum() / (count > 0).sum().clamp(min=1)

    def share(self) -> Tensor:
        """() share of positives: a metric."""
        return self.positive.to(self.gap.dtype).mean()

    def skipped(self, where: Tensor | None) -> Tensor:
        """() 1 where no anchor is in ``where``, else 0: a metric."""
        if where is None:
            return self.gap.new_full((), float(len(self.rows) == 0))
        return (~where.any()).to(self.gap.dtype)
