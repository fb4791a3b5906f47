"""NDCG of the first K places (section 6.4.4)."""

from typing import Any, Literal

import torch
from torch import Tensor

from llm_xrisk.fcco import InnerEstimator
from llm_xrisk.fcco.groups import readable
from llm_xrisk.fcco.keyed import Keys
from llm_xrisk.fcco.schedules import GammaSchedule
from llm_xrisk.objectives.base import ObjectiveOutput, later
from llm_xrisk.objectives.lists import Average, ListRows
from llm_xrisk.objectives.ndcg import NDCG
from llm_xrisk.objectives.reductions import observed_mean
from llm_xrisk.objectives.surrogates import SQUARED_HINGE, Surrogate
from llm_xrisk.objectives.thresholds import Thresholds, upper_quantile


class TopKNDCG(NDCG):
    r"""NDCG of the first K places, K-SONG: ranks the top of each list by graded relevance.

    .. math:: \frac1N \sum_q \sum_{x_i \in S_q^+} \psi(K - N_q g(w; x_i, S_q)) f_{q,i}(g)
              \qquad (6.36)
    .. math:: \frac1N \sum_q \sum_{x_i \in S_q^+} \psi(s_i - \lambda_q(w)) f_{q,i}(g), \qquad
              \lambda_q(w) = \arg\min_\lambda \frac{K + \varepsilon}{N_q} \lambda + \frac{1}{N_q}
              \sum_{x_j \in S_q} (s_j - \lambda)_+ \qquad (6.37)

    g and f are those of :class:`NDCG` with the ideal DCG of K places, psi(x) = sigmoid(alpha x).
    ``product`` is (6.36), of one inner value: the gradient takes f' and psi' at the tracked u.
    ``bilevel`` is (6.37) with lambda_q tracked beside u; its ``practical`` gradient is the book's
    p_{q,i} = psi(s_i - lambda_q) f'(u), which leaves psi's own out. ``theoretical`` adds it,

    .. math:: \alpha \psi' f(u) \Big(\nabla s_i - \frac{1}{s_q N_q} \sum_{x_j \in S_q} t_j
              \nabla s_j \Big), \qquad t_j = \sigma'((s_j - \lambda_q) / \tau_1) / \tau_1,

    with the lower level smoothed by tau_1 and tau_2 lambda^2 / 2, and s_q the moving average of
    its Hessian mean_j t_j + tau_2. The loss is the objective's value at u and lambda.

    Args:
        num_samples: n, the number of (query, item) pairs the index counts.
        num_items: (Q,) N_q; this and the next two are ``ranking_statistics(..., top_k=K)``, which
            ``TopKNDCG.from_data(targets, query, top_k=K)`` takes itself.
        num_relevant: (Q,) relevant items of each query.
        ideal_dcg: (Q,) Z_q of the first K places.
        gamma: Weight of the new mini-batch value in (0, 1]; 0.1 in the authors' recipes.
        top_k: K >= 1.
        approach: ``bilevel`` or ``product``.
        gradient: ``practical`` or ``theoretical``, of the bilevel approach.
        alpha: Slope of psi > 0; 2 in the authors' recipes.
        lr: Step eta of lambda; 0.01 in the authors' code. It wanders about as far as that.
        eps: Epsilon in (0, 1) of Lemma 6.3.
        tau1: Smoothing of the lower level > 0, on the scale of scores; 0.01.
        tau2: Its regularisation > 0; 1e-4.
        gamma_hessian: Weight of the new Hessian in (0, 1].
        surrogate: l, non-decreasing with l(0) >= 1.
        average: As in :class:`NDCG`.
        state_dtype: dtype of the state.

    Shapes:
        scores (B,), targets (B,) graded relevance, 0 is irrelevant, index (B,) of the pair, query
        (B,). Rows of several queries, in any order.

    State: as NDCG, and 9 bytes per query for lambda (14 with the Hessian).

    Departures: as NDCG, N for the book's |S| in the outer mean. The book adds the share of scores
    above lambda to (K + eps) / N_q; the derivative subtracts it (with its sign lambda falls for
    ever). The authors' code misses the factor alpha in psi'. The first visit of a query stores
    the lambda of the mini-batch. Items of a list of at most K are all in its first K places: psi
    is 1. In ``eval()`` lambda is that of the batch.

    Raises:
        ValueError: as NDCG; K < 1, the ideal DCG of another K, an unknown approach or gradient,
            alpha, lr, tau1 or tau2 <= 0, eps outside (0, 1), or gamma_hessian outside (0, 1].

    Example:
        >>> lists = torch.tensor([3]), torch.tensor([1]), torch.tensor([1.0])    # N, n, ideal DCG
        >>> objective, query = TopKNDCG(3, *lists, top_k=1), torch.zeros(3, dtype=torch.long)
        >>> scores, targets = torch.tensor([1.0, 0.0, -9.0]), torch.tensor([1, 0, 0])
        >>> objective(scores, targets, index=torch.arange(3), query=query).loss  # -sigmoid(2 (1-0))
        tensor(-0.8808)

    Relations: K at least the longest list is :class:`NDCG`; lambda_q is the threshold that SOPA
    keeps for each positive.

    Source: book section 6.4.4, (6.36), (6.37); Qiu et al., ICML 2022.
    """

    def __init__(
        self,
        num_samples: int,
        num_items: Tensor,
        num_relevant: Tensor,
        ideal_dcg: Tensor,
        *,
        gamma: float | GammaSchedule = 0.1,
        top_k: int,
        approach: Literal["bilevel", "product"] = "bilevel",
        gradient: Literal["practical", "theoretical"] = "practical",
        alpha: float = 2.0,
        lr: float = 0.01,
        eps: float = 0.5,
        tau1: float = 0.01,
        tau2: float = 1e-4,
        gamma_hessian: float = 0.9,
        surrogate: Surrogate = SQUARED_HINGE,
        average: Average = "queries",
        state_dtype: torch.dtype = torch.float32,
    ) -> None:
        if approach not in ("bilevel", "product") or gradient not in ("practical", "theoretical"):
            raise ValueError(
                f"need approach 'bilevel' or 'product' and gradient 'practical' or 'theoretical', "
                f"got {approach!r} and {gradient!r}"
            )
        within = top_k >= 1 and 0 < eps < 1 and 0 < gamma_hessian <= 1
        if not within or min(alpha, lr, tau1, tau2) <= 0:
            raise ValueError(
                "need top_k >= 1, eps in (0, 1), gamma_hessian in (0, 1] and alpha, lr, tau1, tau2 "
                f"> 0, got {top_k}, {eps}, {gamma_hessian}, {alpha}, {lr}, {tau1} and {tau2}"
            )
        self._places = top_k  # whose ideal gains NDCG asks for
        shared: dict[str, Any] = {"surrogate": surrogate, "average": average, "gamma": gamma}
        shared["state_dtype"] = state_dtype
        super().__init__(num_samples, num_items, num_relevant, ideal_dcg, **shared)
        self.top_k, self.alpha, self.eps, self.tau1, self.tau2 = top_k, alpha, eps, tau1, tau2
        self.implicit, count = gradient == "theoretical", len(num_items)
        if approach == "bilevel":
            self.thresholds = Thresholds(count, lr, state_dtype)
            if self.implicit:
                self.hessian = InnerEstimator(count, gamma_hessian, state_dtype=state_dtype)
        else:
            self.thresholds = None

    def forward(
        self,
        scores: Tensor,
        targets: Tensor,
        *,
        index: Tensor | None = None,
        query: Tensor | None = None,
    ) -> ObjectiveOutput:
        """Return the objective of the joined rows; see the class."""
        scores, targets, ids, own, lists = self.joined_lists(scores, targets, index, query)
        u = self.tracked(scores, ids, lists)
        if self.thresholds is None:
            ahead = self.top_k - lists.items * u
        else:
            ahead = self._ahead(self.thresholds, scores, targets, ids, own, lists)
        inside = self._psi(ahead, lists)
        loss = -self.outer_mean(inside * self.gains(u, targets, lists), lists)

        def metrics() -> dict[str, Tensor]:
            return self.list_metrics(loss, targets, lists) | {
                "rank/mean": observed_mean(lists.items * u, lists.usable),
                "top_k/share": observed_mean(inside, lists.usable),
            }

        return ObjectiveOutput(loss, later(metrics))

    def exact(
        self, scores: Tensor, targets: Tensor, *, query: Tensor, index: Tensor | None = None
    ) -> Tensor:
        """(6.36), or (6.37) with the (K+1)-th largest score as lambda, of the given rows."""
        scores, lists = self.full_lists(scores, targets, query, index)
        g = self.inner_values(scores, lists)
        if self.thresholds is None:
            ahead = self.top_k - lists.items * g
        else:
            ids = torch.arange(len(query), device=query.device) if index is None else index
            ahead = (scores - self._solved(scores, targets, ids, query))[lists.rows]
        return -self.outer_mean(self._psi(ahead, lists) * self.gains(g, targets, lists), lists)

    def _psi(self, ahead: Tensor, lists: ListRows) -> Tensor:
        return torch.where(lists.items > self.top_k, torch.sigmoid(self.alpha * ahead), 1.0)

    def _solved(self, scores: Tensor, targets: Tensor, ids: Tensor, query: Tensor) -> Tensor:
        """Lambda of each row's list (B,) by the rows alone; for full lists the (K+1)-th score."""
        share, slot = self.item_shares(targets, ids, query, scores.dtype)
        level = (self.top_k + self.eps) / self.num_items[query].to(scores.dtype)
        return upper_quantile(scores, share, slot, level)

    def _ahead(
        self,
        thresholds: Thresholds,
        scores: Tensor,
        targets: Tensor,
        ids: Tensor,
        query: Tensor,
        lists: ListRows,
    ) -> Tensor:
        """S - lambda of each anchor (A,) after lambda's step, with the gradient asked for."""
        fixed, longer = scores.detach(), lists.usable_and(lists.items > self.top_k)
        keys, own = Keys(query, len(thresholds.value)), Keys(lists.query, len(thresholds.value))
        weight = lists.shares_with_own()
        place = old = thresholds(keys).to(fixed.dtype)
        known = thresholds.known(own) | ~longer
        if readable(query) and bool(known.all()):
            known = None
        if known is not None or not self.training:
            place = self._solved(fixed, targets, ids, query)
        if self.training:
            level = (self.top_k + self.eps) / lists.items
            if self.implicit:
                above = torch.sigmoid((fixed - old) / self.tau1)
                level = level + self.tau2 * old[lists.rows]
            else:
                above = (fixed > old).to(fixed.dtype)
            slope = level - weight @ above
            thresholds.advance(place[lists.rows], slope, own, longer, known)
            place = thresholds(keys).to(fixed.dtype)
        ahead = (fixed - place).index_select(0, lists.rows)
        return ahead + self._rise(scores, place, weight, lists, longer) if self.implicit else ahead

    def _rise(
        self, scores: Tensor, place: Tensor, weight: Tensor, lists: ListRows, longer: Tensor
    ) -> Tensor:
        """Zero (A,), with the gradient of s_i - lambda_q(w) by the implicit function theorem."""
        share = torch.sigmoid((scores.detach() - place) / self.tau1)
        pull = weight * (share * (1 - share) / self.tau1)
        curvature = self.hessian(pull.sum(-1) + self.tau2, lists.query, where=longer)
        rise = scores - scores.detach()
        return rise[lists.rows] - pull @ rise / curvature.to(rise.dtype)
