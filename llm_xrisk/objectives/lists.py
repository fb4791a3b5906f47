"""Lists of the items of queries, of which a batch holds some rows."""

from typing import Any, Literal

import torch
from torch import Tensor

from llm_xrisk.fcco.groups import distinct, group_sum, readable, slots
from llm_xrisk.objectives.base import Objective
from llm_xrisk.objectives.pairs import rows_of
from llm_xrisk.objectives.reductions import masked_mean, widened
from llm_xrisk.objectives.refusals import check_grades

Average = Literal["queries", "pairs"]


class ListRows:
    r"""The rows of a batch as parts of the lists of their queries, and their relevant rows.

    The sampler may draw any number of relevant and irrelevant items of a list. The rows of each
    kind stand for as many items as the list has of it, beside an anchor: a relevant row, which
    stands for itself. A sum over the rows so weighted has, given the anchor, the mean of the sum
    over the list; a plain mean has not, since the anchor's own row is always in it.

    Args:
        counts: (Q, 4) relevant and irrelevant items of each list beside a relevant one, all its
            items, and the relevant ones.
        relevant: (B,) booleans.
        ids: (B,) items; rows of one item share what it stands for.
        query: (B,) queries.
        dtype: of the weights.

    Attributes:
        rows: (A,) the anchors' rows; all rows where finding the relevant ones would wait.
        query: (A,) their queries.
        others: (A, B) weight 1 for rows of other items of the anchor's list, else 0.
        kinds: (2, B) relevant rows and the rest, each item of weight 1.
        alone: Whether each item is known to have one row.
        factors: (A, 2) how many items a row of each kind stands for.
        own: (A,) what the anchor stands for: 1, or all relevant items where no other is drawn.
        part: (A,) the anchor's share of the relevant items that are drawn of its list.
        items, relevant: (A,) size and number of relevant items of the anchor's list.
        usable: (A,) whether the batch can stand for the anchor's list: it has irrelevant rows of
            it, or there are none. Rows that are not relevant are not usable. None where all are.

    Example:
        >>> counts = torch.tensor([[2, 2, 5, 3]])                      # 3 of 5 are relevant
        >>> relevant, query = torch.tensor([True, True, False]), torch.zeros(3, dtype=torch.long)
        >>> ListRows(counts, relevant, torch.arange(3), query, torch.float32).factors
        tensor([[2., 2.],
                [2., 2.]])
    """

    def __init__(
        self,
        counts: Tensor,
        relevant: Tensor,
        ids: Tensor,
        query: Tensor,
        dtype: torch.dtype,
    ) -> None:
        self.rows, self.alone = rows_of(relevant), distinct(ids)
        self.kinds = torch.stack((relevant, ~relevant)).to(dtype)
        self.query = query.index_select(0, self.rows)
        self.others = (query == self.query.unsqueeze(1)).to(dtype)
        if self.alone:
            self.others.scatter_(1, self.rows.unsqueeze(1), 0.0)
        else:
            self.others.sub_((ids == ids[self.rows][:, None]).to(dtype))
            self.kinds.div_(group_sum(torch.ones_like(self.kinds[0]), slots(ids)))
        drawn, known = self.others @ self.kinds.T, counts.index_select(0, self.query).to(dtype)
        left, (mates, rest) = known.narrow(1, 0, 2), drawn.unbind(1)
        _, missing, self.items, self.relevant = known.unbind(1)
        self.factors = left / drawn.clamp(min=1)
        self.own = torch.where(mates == 0, self.relevant, 1.0)
        part = (1 + mates).reciprocal_()
        self.part = part if self.alone else part * self.kinds[0, self.rows]
        usable = rest >= missing.clamp(max=1)
        if readable(usable):  # then the rows are the anchors
            self.usable = None if bool(usable.all()) else usable
        else:
            self.usable = usable & relevant[self.rows]

    def shares(self) -> Tensor:
        """(A, B) share of each row in the mean over the anchor's list, but for the anchor's own."""
        return ((self.factors / self.items.unsqueeze(1)) @ self.kinds).mul_(self.others)

    def shares_with_own(self) -> Tensor:
        """(A, B) the same with the anchor's own."""
        return self.shares().scatter_(
            1, self.rows.unsqueeze(1), (self.own / self.items).unsqueeze(1)
        )

    def usable_and(self, condition: Tensor) -> Tensor:
        """(A,) anchors that are usable and meet a condition."""
        return condition if self.usable is None else self.usable & condition


class ListObjective(Objective):
    r"""An objective of the lists of queries, of which a batch holds some rows in any order.

    Args:
        num_items: (Q,) items in each query's list, N_q.
        num_relevant: (Q,) relevant ones among them, n_q.
        average: How the outer mean counts. ``queries``: (1/N) sum_q of the sum over the relevant
            items of q, estimated by n_q times their mean in the batch, whatever share of them the
            sampler draws. ``pairs``: the mean over the batch's relevant rows, for samplers that
            draw (query, relevant item) pairs uniformly.

    Raises:
        ValueError: statistics that do not fit, an unknown average, or a missing query.
        IndexError: on a CPU, a query outside [0, Q).
    """

    binary_targets = False
    num_items: Tensor
    num_relevant: Tensor
    counts: Tensor

    def __init__(self, num_items: Tensor, num_relevant: Tensor, average: Average) -> None:
        super().__init__()
        if num_items.dim() != 1 or num_items.shape != num_relevant.shape:
            raise ValueError(
                f"num_items {tuple(num_items.shape)} and num_relevant {tuple(num_relevant.shape)} "
                "must both have one entry for each query; take them from ranking_statistics"
            )
        if bool((num_relevant > num_items).any()):
            raise ValueError("a query has more relevant items than items; see ranking_statistics")
        if average not in ("queries", "pairs"):
            raise ValueError(f"average must be 'queries' or 'pairs', got {average!r}")
        self.average = average
        # the data's, not the run's: resuming takes them from the constructor
        self.register_buffer("num_items", num_items.clone(), persistent=False)
        self.register_buffer("num_relevant", num_relevant.clone(), persistent=False)
        # rows that are no anchors get a number too, where finding the anchors would wait
        mates = (num_relevant - 1).clamp(min=0)
        beside = mates, (num_items - 1 - mates).clamp(min=0)
        counts = torch.stack([*beside, num_items, num_relevant], -1)
        self.register_buffer("counts", counts, persistent=False)

    def joined_lists(
        self, scores: Tensor, targets: Tensor, index: Tensor | None, query: Tensor | None
    ) -> tuple[Any, Any, Any, Any, ListRows]:
        """Check the rows of this process and join those of all."""
        if query is None:
            raise ValueError(
                f"{type(self).__name__} ranks the items of each query and got no query; pass "
                "query=batch['query'], the ids that ranking_statistics got"
            )
        query = query.long()
        count, read = len(self.num_items), readable(query) and query.numel() > 0
        low, high = (int(end) for end in torch.aminmax(query)) if read else (0, 0)
        if low < 0 or high >= count:
            raise IndexError(
                f"query ids {low} to {high} are out of range for {count} queries; number them "
                "0..Q-1 and pass all to ranking_statistics"
            )
        check_grades(type(self).__name__, targets)
        scores, targets, ids, own = self.joined(scores, targets, index, query=query)
        return scores, targets, ids, own, self.list_rows(scores, targets, ids, own)

    def full_lists(
        self, scores: Tensor, targets: Tensor, query: Tensor, index: Tensor | None
    ) -> tuple[Tensor, ListRows]:
        """Check rows that nothing is to be joined to; without an index they are distinct items."""
        self.check_shapes(scores=scores, targets=targets, query=query, index=index)
        check_grades(type(self).__name__, targets)
        ids = torch.arange(len(query), device=query.device) if index is None else index
        scores = widened(scores)
        return scores, self.list_rows(scores, targets, ids, query)

    def list_rows(self, scores: Tensor, targets: Tensor, ids: Tensor, query: Tensor) -> ListRows:
        """The rows as parts of their lists."""
        return ListRows(self.counts, targets > 0, ids, query, scores.dtype)

    def item_shares(
        self, targets: Tensor, ids: Tensor, query: Tensor, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        """Weight of each row in the mean over its list (B,), and its slot."""
        kinds = torch.stack([targets > 0, targets <= 0], -1).to(dtype)
        if not distinct(ids):
            kinds = kinds / group_sum(torch.ones_like(kinds), slots(ids))
        slot = slots(query)
        mine, items = self.num_relevant[query], self.num_items[query]
        left = torch.stack([mine, items - mine], -1) / group_sum(kinds, slot).clamp(min=1)
        return (kinds * left).sum(-1) / items.clamp(min=1), slot

    def outer_mean(self, values: Tensor, lists: ListRows) -> Tensor:
        """Mean of the anchors' ``values`` (A,), see ``average``; 0 where none is usable."""
        if self.average == "pairs":
            return masked_mean(values, lists.usable)
        part = lists.part  # sums to 1 over each list
        if lists.usable is not None:
            part = part * lists.usable
            values = values.masked_fill(~lists.usable, 0.0)
        return values @ (part * lists.relevant) / part.sum().clamp(min=1)

    def list_metrics(self, loss: Tensor, targets: Tensor, lists: ListRows) -> dict[str, Tensor]:
        """What the objectives of lists have in common to log."""
        relevant = (targets > 0).to(loss.dtype)
        some = lists.usable
        usable = loss.new_tensor(len(lists.rows)) if some is None else some.sum()
        return {
            "objective": loss.detach(),
            "relevant": relevant.mean(),
            "relevant/usable": usable / relevant.sum(),
            "skipped": (usable == 0).to(loss.dtype),
        }
