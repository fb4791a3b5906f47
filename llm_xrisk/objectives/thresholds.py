"""The score below the first K of each query's list, solved or tracked."""

import torch
from torch import Tensor

from llm_xrisk.fcco import PerSampleDual
from llm_xrisk.fcco.groups import group_mean
from llm_xrisk.fcco.keyed import Keys


class Thresholds(PerSampleDual):
    r"""Lambda_q of each query, the lower level of (6.37): the (K+1)-th largest score of its list.

    .. math:: \lambda_q \leftarrow \lambda_q - \eta \Big( \frac{K + \varepsilon}{N_q} -
              \frac{1}{N_q} \sum_{x_j \in S_q} \mathbb{I}(s_j > \lambda_q) \Big)

    The first visit stores what solves the mini-batch's lower level.
    """

    visited: Tensor

    def __init__(self, num_queries: int, lr: float, state_dtype: torch.dtype) -> None:
        super().__init__(num_queries, lr=lr, state_dtype=state_dtype)
        self.register_buffer("visited", torch.zeros(num_queries, dtype=torch.bool))

    def known(self, query: Keys) -> Tensor:
        """(A,) whether each query was visited before."""
        return self.visited.index_select(0, query.index)

    def advance(
        self, start: Tensor, slope: Tensor, query: Keys, where: Tensor, known: Tensor | None
    ) -> None:
        """Step by ``slope`` where the query is known, begin at ``start`` where not; by row (A,).

        ``known`` is None where all are.
        """
        if known is not None:
            mean, count = group_mean(start.to(self.value.dtype), query.slots, where & ~known)
            first, index = count > 0, query.index
            self.value.index_copy_(0, index, torch.where(first, mean, self.value[index]))
            self.visited.index_copy_(0, index, self.visited[index] | first)
            where = where & known
        self.step(slope, query, where=where)


def upper_quantile(scores: Tensor, weight: Tensor, slot: Tensor, level: Tensor) -> Tensor:
    """Largest score of each row's slot down to which the weights reach ``level``.

    Minimises level * x + sum_j weight_j (s_j - x)_+ over x: with equal weights 1 / N and level
    (K + eps) / N it is the (K+1)-th largest score. The gradient goes to the row it stands in.

    Args:
        scores: (B,).
        weight: (B,) weights of the rows, which sum to 1 over a slot.
        slot: (B,) from ``slots``.
        level: (B,) equal for the rows of a slot; where it exceeds 1 the result is 0.

    Example:
        >>> rows = torch.tensor([3.0, 1.0, 2.0]), torch.full((3,), 1 / 3), torch.zeros(3).long()
        >>> upper_quantile(*rows, torch.full((3,), 1.5 / 3))            # K = 1
        tensor([2., 2., 2.])
    """
    order = torch.argsort(scores, descending=True)
    order = order[torch.argsort(slot[order], stable=True)]
    ordered, place = weight[order], slot[order]
    sums = torch.zeros_like(weight).index_add(0, slot, weight)
    reached = ordered.cumsum(0) - (sums.cumsum(0) - sums)[place]
    aim = level[order]
    # the first row of each slot that reaches it: two roundings of one sum may not be compared
    same = place[1:] == place[:-1]
    last = torch.ones_like(place, dtype=torch.bool)
    last[:-1] = ~same
    enough = ((reached >= aim) | last) & (aim <= 1)
    there = enough.clone()
    there[1:] &= ~(enough[:-1] & same)
    value = scores[order].masked_fill(~there, 0.0)
    return torch.zeros_like(scores).index_add(0, place, value)[slot]
