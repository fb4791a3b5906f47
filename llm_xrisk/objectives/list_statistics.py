"""What the objectives of lists know of all the data: sizes, relevant items, ideal gains."""

from typing import Any

import torch
from torch import Tensor

from llm_xrisk.fcco.arguments import shown

_LARGEST_GRADE = 100.0  # 2^y - 1 stays within float32, and so do sums of it
_ADVICE = "take it from ranking_statistics(targets, query)"


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

    Raises:
        TypeError: targets or query that are no tensors.
        ValueError: shapes that differ, ids or grades that are none, or top_k < 1.

    Example:
        >>> ranking_statistics(torch.tensor([1, 0, 2]), torch.tensor([0, 0, 1]))
        (tensor([2, 1]), tensor([1, 1]), tensor([1., 3.], dtype=torch.float64))
    """
    _check_data(targets, query, top_k)
    query = query.long()
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
    ideal: Any = share.new_zeros(count).index_add(0, query[order], share)
    ideal.top_k = top_k  # so that an objective of another K can refuse it
    return num_items, num_relevant, ideal


def check_statistics(num_items: Tensor, num_relevant: Tensor) -> None:
    """Refuse numbers of items that are no numbers of items.

    Raises:
        ValueError: a shape that is not (Q,), numbers that are no integers, or below 0.
    """
    for name, counts in (("num_items", num_items), ("num_relevant", num_relevant)):
        if counts.dim() != 1 or counts.is_floating_point() or counts.dtype == torch.bool:
            raise ValueError(
                f"{name} must be integers (queries,), got {counts.dtype} {tuple(counts.shape)}; "
                f"{_ADVICE}"
            )
        if bool((counts < 0).any()):
            raise ValueError(f"{name} must not be negative, got {int(counts.min())}; {_ADVICE}")


def check_ideal(ideal_dcg: Tensor, num_relevant: Tensor, top_k: int | None) -> None:
    """Refuse ideal gains that belong to other lists, or to another number of places.

    Raises:
        ValueError: another shape, numbers that are none, or those of another K.
    """
    if ideal_dcg.shape != num_relevant.shape:
        raise ValueError(
            f"ideal_dcg must be {tuple(num_relevant.shape)}, one for each query, got "
            f"{tuple(ideal_dcg.shape)}; {_ADVICE}"
        )
    if not bool((ideal_dcg[num_relevant > 0] > 0).all()) or not bool(ideal_dcg.isfinite().all()):
        raise ValueError(
            "ideal_dcg must be positive and finite for each query that has a relevant item; "
            f"{_ADVICE}"
        )
    made_for = getattr(ideal_dcg, "top_k", top_k)  # of a tensor that came another way: unknown
    if made_for != top_k:
        got, need = ("all places" if k is None else f"the first {k}" for k in (made_for, top_k))
        asked = "" if top_k is None else f", top_k={top_k}"
        raise ValueError(
            f"got the ideal_dcg of {got} and needs that of {need}; take it from "
            f"ranking_statistics(targets, query{asked}), or build by from_data(targets, query)"
        )


def _check_data(targets: Any, query: Any, top_k: Any) -> None:
    for name, rows in (("targets", targets), ("query", query)):
        if not isinstance(rows, Tensor):
            raise TypeError(
                f"ranking_statistics got {name} as {shown(rows)} and needs a tensor (pairs,); "
                "torch.as_tensor makes one; texts are numbered by "
                "numpy.unique(ids, return_inverse=True)[1]"
            )
    if targets.dim() != 1 or targets.shape != query.shape or len(targets) == 0:
        raise ValueError(
            f"ranking_statistics got targets {tuple(targets.shape)} and query "
            f"{tuple(query.shape)} and needs both (pairs,), of all (query, item) pairs of the data"
        )
    if query.is_floating_point() or query.dtype == torch.bool or int(query.min()) < 0:
        raise ValueError(
            f"query must be integers, ids from 0 up; ranking_statistics got {query.dtype} from "
            f"{query.min().item():g} up: number the queries 0..Q-1"
        )
    if not bool((targets <= _LARGEST_GRADE).all()):
        raise ValueError(
            f"targets must be grades, whose gain is 2^y - 1, got {targets.max().item():g}; bring "
            "them to 0, 1, 2, ... (5 is usual for the best)"
        )
    if top_k is not None and (not isinstance(top_k, int) or top_k < 1):
        raise ValueError(f"top_k must be an integer of at least 1, got {shown(top_k)}")
