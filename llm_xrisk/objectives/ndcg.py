"""Normalised discounted cumulative gain (section 6.4.4)."""

import math

import torch
from torch import Tensor

from llm_xrisk.fcco import InnerEstimator
from llm_xrisk.fcco.schedules import GammaSchedule
from llm_xrisk.objectives.base import ObjectiveOutput
from llm_xrisk.objectives.lists import Average, ListObjective, ListRows
from llm_xrisk.objectives.pairs import differences, with_pair_gradient
from llm_xrisk.objectives.reductions import observed_mean
from llm_xrisk.objectives.surrogates import SQUARED_HINGE, Surrogate


def ranking_statistics(
    targets: Tensor, query: Tensor, *, top_k: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Size, number of relevant items and ideal DCG of the list of each query, from all the data.

    Args:
        targets: (n,) graded relevance of every (query, item) pair; up to 0 is irrelevant.
        query: (n,) query ids from 0 to Q - 1.
        top_k: K for the ideal DCG of the first K positions; all positions by default.

    Returns:
        N_q (Q,), n_q (Q,) and, with gains 2^y - 1 and discounts log2(1 + position), Z_q (Q,).

    Example:
        >>> ranking_statistics(torch.tensor([1, 0, 2]), torch.tensor([0, 0, 1]))
        (tensor([2, 1]), tensor([1, 1]), tensor([1., 3.], dtype=torch.float64))
    """
    count = int(query.max()) + 1
    num_items = torch.bincount(query, minlength=count)
    num_relevant = torch.bincount(query[targets > 0], minlength=count)
    gain = torch.exp2(targets.double().clamp(min=0)) - 1
    order = torch.argsort(gain, descending=True)
    order = order[torch.argsort(query[order], stable=True)]
    start = num_items.cumsum(0) - num_items
    place = torch.arange(len(order), device=query.device) - start[query[order]]
    share = gain[order] / torch.log2(place.double() + 2)
    if top_k is not None:
        share = share * (place < top_k)
    return num_items, num_relevant, share.new_zeros(count).index_add(0, query[order], share)


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
        num_items: (Q,) N_q; this and the next two are what :func:`ranking_statistics` returns.
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

    def __init__(
        self,
        num_samples: int,
        num_items: Tensor,
        num_relevant: Tensor,
        ideal_dcg: Tensor,
        gamma: float | GammaSchedule = 0.1,
        *,
        surrogate: Surrogate = SQUARED_HINGE,
        average: Average = "queries",
        state_dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(num_items, num_relevant, average)
        self.self_pair = float(surrogate(torch.zeros(())))
        if self.self_pair < 1:
            raise ValueError(
                f"the surrogate must be at least 1 at 0, got {self.self_pair:.4g}: N_q g stands "
                "for a rank, which the item's own pair makes 1; SquaredHinge(1.0) is"
            )
        if ideal_dcg.shape != num_items.shape or bool((ideal_dcg[num_relevant > 0] <= 0).any()):
            raise ValueError("ideal_dcg must be positive for each query that has a relevant item")
        self.surrogate, self.num_samples = surrogate, num_samples
        ideal = torch.where(ideal_dcg > 0, ideal_dcg, 1.0)  # of no account, and no division by 0
        self.register_buffer("ideal_dcg", ideal.to(state_dtype), persistent=False)
        self.inner = InnerEstimator(num_samples, gamma, state_dtype=state_dtype)

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
        u = self.inner(self.inner_values(scores, lists), ids[lists.rows], where=lists.usable)
        loss = -self.outer_mean(self.gains(u, targets, lists), lists)
        metrics = self.list_metrics(loss, targets, lists)
        metrics["rank/mean"] = observed_mean((lists.items * u).detach(), lists.usable)
        return ObjectiveOutput(loss, metrics)

    def exact(
        self, scores: Tensor, targets: Tensor, *, query: Tensor, index: Tensor | None = None
    ) -> Tensor:
        """(6.34) or (6.35) of the given rows, without state; of the objective for full lists."""
        scores, lists = self.full_lists(scores, targets, query, index)
        return -self.outer_mean(self.gains(self.inner_values(scores, lists), targets, lists), lists)

    def inner_values(self, scores: Tensor, lists: ListRows) -> Tensor:
        """Mean g of l(s_j - s_i) over the list of each anchor, (A,)."""
        fixed, rows = scores.detach(), lists.rows
        pairwise, slope = self.surrogate.with_slope(differences(fixed, fixed[rows]))
        sums = pairwise.mul_(lists.others) @ lists.kinds.T
        sums = with_pair_gradient(scores, rows, sums, lists.others * slope, lists.kinds)
        shares = lists.factors / lists.items[:, None]
        return (sums * shares).sum(-1) + lists.own * self.self_pair / lists.items

    def gains(self, u: Tensor, targets: Tensor, lists: ListRows) -> Tensor:
        """(2^y - 1) / (Z_q log2(N_q u + 1)) of each anchor, -f of (6.35)."""
        gain = torch.exp2(targets[lists.rows].to(u.dtype)) - 1
        scaled = math.log(2) * gain / self.ideal_dcg[lists.query].to(u.dtype)
        return scaled / torch.log1p(lists.items * u)
