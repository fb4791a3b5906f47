"""Listwise cross-entropy (the warm-up of section 6.4.4, eq. 2.47)."""

from typing import Any, Self

import torch
from torch import Tensor

from llm_xrisk.fcco import InnerEstimator
from llm_xrisk.fcco.keyed import Keys
from llm_xrisk.fcco.schedules import GammaSchedule
from llm_xrisk.objectives.base import ObjectiveOutput, later
from llm_xrisk.objectives.list_statistics import check_statistics, ranking_statistics
from llm_xrisk.objectives.lists import Average, ListObjective, ListRows
from llm_xrisk.objectives.log_means import logsumexp
from llm_xrisk.objectives.pairs import differences, with_pair_gradient
from llm_xrisk.objectives.reductions import observed_mean


class ListwiseCrossEntropy(ListObjective):
    r"""Listwise cross-entropy, ListNet by SOX: the softmax over a whole list from some of its rows.

    .. math:: F(w) = \frac1N \sum_q \frac{1}{N_q} \sum_{x_i \in S_q^+} -y_{q,i} \log
              \frac{\exp(s_i / \tau)}{\sum_{x_j \in S_q} \exp(s_j / \tau)} \qquad (2.47)

    Inner value g_q = mean_j exp(s_j / tau) of the list, outer function y (log N_q + log g - s_i /
    tau), tracked as one log u_q for each query in the form of (6.14). The gradient is -y / tau
    (grad s_i - mean_j exp(s_j / tau) / u_q grad s_j); the loss is the objective's value at u.

    Args:
        num_samples: n, the number of (query, item) pairs the index counts.
        num_items: (Q,) N_q; this and the next are the first two of ``ranking_statistics``, which
            :meth:`from_data` takes itself.
        num_relevant: (Q,) relevant items of each query.
        gamma: Weight of the new mini-batch value in (0, 1]; 0.1 in the authors' recipes.
        tau: Temperature > 0; the book has 1.
        average: ``queries`` is (2.47); ``pairs`` the mean over the batch's relevant rows.
        state_dtype: dtype of the state.

    Shapes:
        scores (B,), targets (B,) graded relevance, 0 is irrelevant, index (B,) of the pair, query
        (B,). Rows of several queries, in any order.

    State: one log u per query, 5 bytes.

    Departures: the state is a logarithm for each query, not a sum less the largest score of the
    batch for each pair, which mixes scales in the authors' library. The rows of a batch weigh as
    in :class:`NDCG`: an anchor sees itself as one item of the list and the others as the rest, so
    that graded relevance and rows drawn together leave no bias; u keeps the mean over anchors.
    The first visit of a query stores its mini-batch value.

    Raises:
        ValueError: gamma outside (0, 1], tau <= 0, statistics that do not fit, or a missing index
            or query.

    Example:
        >>> objective = ListwiseCrossEntropy(2, torch.tensor([2]), torch.tensor([1]))
        >>> scores, targets, query = torch.zeros(2), torch.tensor([1, 0]), torch.tensor([0, 0])
        >>> objective(scores, targets, index=torch.arange(2), query=query).loss     # log(2) / 2
        tensor(0.3466)

    Relations: full lists are ``F.cross_entropy`` for any gamma while the model stands; the warm-up
    of :class:`NDCG` and :class:`TopKNDCG`; DFT keeps the same log u of a question's answers.

    Source: book section 6.4.4 and (2.47); Cao et al., ICML 2007 (ListNet).
    """

    def __init__(
        self,
        num_samples: int,
        num_items: Tensor,
        num_relevant: Tensor,
        *,
        gamma: float | GammaSchedule = 0.1,
        tau: float = 1.0,
        average: Average = "queries",
        state_dtype: torch.dtype = torch.float32,
    ) -> None:
        check_statistics(num_items, num_relevant)
        super().__init__(num_items, num_relevant, average)
        if num_samples < 1:
            raise ValueError(f"num_samples must be at least 1, got {num_samples}: pass len(data)")
        if tau <= 0:
            raise ValueError(f"tau must be positive, got {tau}; the book has 1.0")
        self.tau, self.num_samples = tau, num_samples
        self.inner = InnerEstimator(len(num_items), gamma, log=True, state_dtype=state_dtype)

    @classmethod
    def from_data(cls, targets: Tensor, query: Tensor, **options: Any) -> Self:
        """The objective of all (query, item) pairs of the data, which the index numbers in order.

        Args:
            targets: (n,) graded relevance of every pair; up to 0 is irrelevant.
            query: (n,) query ids from 0 to Q - 1.
            **options: Further arguments of the class.
        """
        return cls(len(targets), *ranking_statistics(targets, query)[:2], **options)

    def forward(
        self,
        scores: Tensor,
        targets: Tensor,
        *,
        index: Tensor | None = None,
        query: Tensor | None = None,
    ) -> ObjectiveOutput:
        """Return the objective of the joined rows; see the class."""
        scores, targets, _, _, lists = self.joined_lists(scores, targets, index, query)
        log_g, own = self._log_inner_values(scores, lists)
        keys = Keys(lists.query, len(self.num_items))
        log_u = self.inner(log_g, keys, where=lists.usable)
        loss = self.outer_mean(self._surprise(own, targets, log_u, lists), lists)

        def metrics() -> dict[str, Tensor]:
            mean = observed_mean(log_u, lists.usable)
            return self.list_metrics(loss, targets, lists) | {"log_u/mean": mean}

        return ObjectiveOutput(loss, later(metrics))

    def exact(
        self, scores: Tensor, targets: Tensor, *, query: Tensor, index: Tensor | None = None
    ) -> Tensor:
        """(2.47) of the given rows, without state; of the objective for full lists."""
        scores, lists = self.full_lists(scores, targets, query, index)
        log_g, own = self._log_inner_values(scores, lists)
        return self.outer_mean(self._surprise(own, targets, log_g, lists), lists)

    def _log_inner_values(self, scores: Tensor, lists: ListRows) -> tuple[Tensor, Tensor]:
        """Log of the mean of exp(s_j / tau) over its list as each anchor sees it, (A,).

        And what the anchor's own s_i / tau exceeds the log of the list's size by, (A,).
        """
        rows, fixed = lists.rows, scores.detach() / self.tau
        # others: 0 or the lowest number, and log of how many items each row stands for
        exponent = lists.others.sub_(1).mul_(torch.finfo(fixed.dtype).max)
        standing = lists.factors.clamp(min=torch.finfo(fixed.dtype).tiny).log()
        single = lists.kinds if lists.alone else (lists.kinds > 0).to(fixed.dtype)
        exponent.addmm_(standing, single)
        beside = fixed if lists.alone else fixed + lists.kinds.sum(0).log()
        exponent.add_(differences(beside, fixed.index_select(0, rows)))
        exponent.scatter_(1, rows.unsqueeze(1), lists.own.log().unsqueeze(1))
        log_sum, share = logsumexp(exponent)
        ahead = with_pair_gradient(scores, rows, log_sum, share, scale=1 / self.tau)
        own = scores.index_select(0, rows) / self.tau - lists.items.log()
        return ahead + own, own

    def _surprise(self, own: Tensor, targets: Tensor, log_u: Tensor, lists: ListRows) -> Tensor:
        """-y log softmax of each anchor, over the size of its list."""
        return targets.index_select(0, lists.rows) * (log_u - own) / lists.items
