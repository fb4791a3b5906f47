"""Normalised discounted cumulative gain (section 6.4.4)."""

import math
from typing import Any, Self

import torch
from torch import Tensor

from llm_xrisk.fcco import InnerEstimator
from llm_xrisk.fcco.schedules import GammaSchedule
from llm_xrisk.objectives.base import ObjectiveOutput, later
from llm_xrisk.objectives.list_statistics import (
    check_ideal,
    check_statistics,
    ranking_statistics,
)
from llm_xrisk.objectives.lists import Average, ListObjective, ListRows
from llm_xrisk.objectives.pairs import differences, with_pair_gradient
from llm_xrisk.objectives.reductions import observed_mean
from llm_xrisk.objectives.surrogates import SQUARED_HINGE, Surrogate


class NDCG(ListObjective):
    r"""Normalised discounted cumulative gain, SONG: ranks items by graded relevance.

    .. math:: F(w) = \frac{1}{N} \sum_q \sum_{x_i \in S_q^+} f_{q,i}(g(w; x_i, S_q)), \qquad
              f_{q,i}(g) = \frac{1}{Z_q} \frac{1 - 2^{y_{q,i}}}{\log_2(N_q g + 1)}
              \qquad (6.34), (6.35)
    .. math:: g(w; x_i, S_q) = \frac{1}{N_q} \sum_{x_j \in S_q} \ell(s_j - s_i)

    The inner value N_q g stands for the rank of a relevant item, tracked by the moving average of
    Algorithm 33, line 6. The gradient is line 9's with the missing nabla, weights p_{q,i} of line
    7; the loss is the objective's value at u, minus a smoothed NDCG, in [-1, 0] for full lists.

    Args:
        num_samples: n, the number of (query, item) pairs the index counts.
        num_items: (Q,) N_q; this and the next two are what :func:`ranking_statistics` returns, and
            :meth:`from_data` takes.
        num_relevant: (Q,) relevant items of each query.
        ideal_dcg: (Q,) Z_q.
        gamma: Weight of the new mini-batch value in (0, 1]; 0.1 in the authors' recipes.
        surrogate: l, non-decreasing with l(0) >= 1, so that no rank is below 1.
        average: ``queries`` is (6.34); ``pairs`` is (6.35), the mean over sampled relevant pairs,
            |S| / N times less.
        state_dtype: dtype of the state.

    Shapes:
        scores (B,), targets (B,) graded relevance, 0 is irrelevant, index (B,) of the pair, query
        (B,). Rows of several queries, in any order.

    State: one number per pair, 5 bytes; relevant pairs alone use theirs.

    Departures: Algorithm 33's plain mean over the sampled items is biased where relevant ones are
    oversampled, and by the anchor's own pair. Here the pair j = i counts l(0) / N_q as in S_q,
    other relevant and irrelevant rows weigh as many items as the list has of each: g has the same
    mean for every rate. A single relevant row of its list ties with the relevant ones not drawn;
    one without irrelevant rows, where the list has some, is left out. ``queries`` is the default
    because samplers draw queries first. The first visit of a pair stores its mini-batch value.

    Raises:
        ValueError: gamma outside (0, 1], l(0) < 1, statistics that do not fit, or a missing index
            or query.

    Example:
        >>> targets, query = torch.tensor([1, 0]), torch.tensor([0, 0])
        >>> objective = NDCG(2, *ranking_statistics(targets, query))
        >>> scores, index = torch.tensor([0.0, 1.0]), torch.tensor([0, 1])
        >>> objective(scores, targets, index=index, query=query).loss   # -1 / log2(1 + (2^2 + 1))
        tensor(-0.3869)

    Relations: gamma=1 is the mini-batch surrogate; :class:`AveragePrecision` is the ratio of two
    such inner values; :class:`TopKNDCG` counts the first K places alone.

    Source: book section 6.4.4, Algorithm 33; Qiu et al., ICML 2022.
    """

    ideal_dcg: Tensor
    _places: int | None = None

    def __init__(
        self,
        num_samples: int,
        num_items: Tensor,
        num_relevant: Tensor,
        ideal_dcg: Tensor,
        *,
        gamma: float | GammaSchedule = 0.1,
        surrogate: Surrogate = SQUARED_HINGE,
        average: Average = "queries",
        state_dtype: torch.dtype = torch.float32,
    ) -> None:
        check_statistics(num_items, num_relevant)
        super().__init__(num_items, num_relevant, average)
        self.self_pair = float(surrogate(torch.zeros(())))
        if self.self_pair < 1:
            raise ValueError(
                f"the surrogate must be at least 1 at 0, got {self.self_pair:.4g}: N_q g stands "
                "for a rank, which the item's own pair makes 1; SquaredHinge(1.0) is"
            )
        check_ideal(ideal_dcg, num_relevant, self._places)
        self.surrogate, self.num_samples = surrogate, num_samples
        ideal = torch.where(ideal_dcg > 0, ideal_dcg, 1.0)  # of no account, and no division by 0
        self.register_buffer("ideal_dcg", ideal.to(state_dtype), persistent=False)
        self.inner = InnerEstimator(num_samples, gamma, state_dtype=state_dtype)

    @classmethod
    def from_data(cls, targets: Tensor, query: Tensor, **options: Any) -> Self:
        """The objective of all (query, item) pairs of the data, which the index numbers in order.

        Args:
            targets: (n,) graded relevance of every pair; up to 0 is irrelevant.
            query: (n,) query ids from 0 to Q - 1.
            **options: Further arguments of the class.

        Example:
            >>> NDCG.from_data(torch.tensor([1, 0, 2]), torch.tensor([0, 0, 1])).num_samples
            3
        """
        found = ranking_statistics(targets, query, top_k=options.get("top_k"))
        return cls(len(targets), *found, **options)

    def forward(
        self,
        scores: Tensor,
        targets: Tensor,
        *,
        index: Tensor | None = None,
        query: Tensor | None = None,
    ) -> ObjectiveOutput:
        """Return the objective of the joined rows; see the class."""
        scores, targets, ids, _, lists = self.joined_lists(scores, targets, index, query)
        u = self.tracked(scores, ids, lists)
        loss = -self.outer_mean(self.gains(u, targets, lists), lists)

        def metrics() -> dict[str, Tensor]:
            rank = observed_mean(lists.items * u, lists.usable)
            return self.list_metrics(loss, targets, lists) | {"rank/mean": rank}

        return ObjectiveOutput(loss, later(metrics))

    def exact(
        self, scores: Tensor, targets: Tensor, *, query: Tensor, index: Tensor | None = None
    ) -> Tensor:
        """(6.34) or (6.35) of the given rows, without state; of the objective for full lists."""
        scores, lists = self.full_lists(scores, targets, query, index)
        return -self.outer_mean(self.gains(self.inner_values(scores, lists), targets, lists), lists)

    def tracked(self, scores: Tensor, ids: Tensor, lists: ListRows) -> Tensor:
        """The average u of each anchor, (A,), after its update."""
        keys = self.keys(ids.index_select(0, lists.rows))
        return self.inner(self.inner_values(scores, lists), keys, where=lists.usable)

    def inner_values(self, scores: Tensor, lists: ListRows) -> Tensor:
        """Mean g of l(s_j - s_i) over the list of each anchor, (A,)."""
        fixed, rows, share = scores.detach(), lists.rows, lists.shares()
        pairwise, slope = self.surrogate.with_slope(differences(fixed, fixed.index_select(0, rows)))
        value = pairwise.mul_(share).sum(-1)
        value = with_pair_gradient(scores, rows, value, share.mul_(slope))
        return value + lists.own * self.self_pair / lists.items

    def gains(self, u: Tensor, targets: Tensor, lists: ListRows) -> Tensor:
        """(2^y - 1) / (Z_q log2(N_q u + 1)) of each anchor, -f of (6.35)."""
        gain = torch.exp2(targets.index_select(0, lists.rows).to(u.dtype)) - 1
        scaled = math.log(2) * gain / self.ideal_dcg.index_select(0, lists.query).to(u.dtype)
        return scaled / torch.log1p(lists.items * u)
