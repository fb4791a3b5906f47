"""Algorithm 33 (SONG)."""

import math
from collections.abc import Callable
from dataclasses import dataclass

from tests.reference.average_precision import loss_of, slope_of
from tests.reference.tracking import track


@dataclass(frozen=True)
class Lists:
    """Size N_q, number of relevant items n_q and ideal DCG Z_q of each query's list."""

    items: list[int]
    relevant: list[int]
    ideal: list[float]


def statistics(relevance: list[int], query: list[int], top_k: int | None = None) -> Lists:
    """The lists' statistics, of all the data."""
    items, relevant, ideal = [], [], []
    for q in range(max(query) + 1):
        own = sorted((y for y, of in zip(relevance, query, strict=True) if of == q), reverse=True)
        items.append(len(own))
        relevant.append(sum(y > 0 for y in own))
        best = own if top_k is None else own[:top_k]
        ideal.append(sum((2**y - 1) / math.log2(1 + r) for r, y in enumerate(best, start=1)))
    return Lists(items, relevant, ideal)


def weights_of(
    i: int, relevance: list[int], sample: list[int], query: list[int], lists: Lists
) -> dict[int, float] | None:
    """How many of its list's items each row stands for beside row i; -1 is a tie with i.

    None where the batch has no irrelevant item of the list and the list has some.
    """
    q = query[i]
    own = [j for j in range(len(query)) if query[j] == q]
    mates = {sample[j] for j in own if relevance[j] > 0}
    rest = {sample[j] for j in own if relevance[j] <= 0}
    irrelevant = lists.items[q] - lists.relevant[q]
    if irrelevant and not rest:
        return None
    weight = {-1: 1.0 if len(mates) > 1 else float(lists.relevant[q])}  # the item itself
    for j in own:
        rows = sample.count(sample[j])  # which share what the item stands for
        if relevance[j] <= 0:
            weight[j] = irrelevant / len(rest) / rows
        elif sample[j] != sample[i]:
            weight[j] = (lists.relevant[q] - 1) / (len(mates) - 1) / rows
    return weight


def outer_weights(
    anchors: list[int], sample: list[int], query: list[int], lists: Lists, average: str
) -> list[float]:
    """What each anchor weighs in the objective: (6.34) or, for pairs, (6.35)."""
    if average == "pairs":
        return [1 / len(anchors) for _ in anchors]
    drawn: dict[int, set[int]] = {}
    for i in anchors:
        drawn.setdefault(query[i], set()).add(sample[i])
    return [
        lists.relevant[q] / len(drawn[q]) / sample.count(x) / len(drawn)
        for q, x in ((query[i], sample[i]) for i in anchors)
    ]


def step(
    scores: list[float],
    relevance: list[int],
    sample: list[int],
    query: list[int],
    u: dict[int, float],
    *,
    gamma: float,
    lists: Lists,
    average: str = "queries",
    inclusion: Callable[[int, float], tuple[float, float]] = lambda i, u: (1.0, 0.0),
) -> tuple[float, list[float]]:
    """One step on a mini-batch: loss, gradient in the scores, ``u`` updated in place.

    ``inclusion`` gives psi of a row at its u, and the derivative in u, for (6.36).
    """
    rows = range(len(scores))
    weight = {i: weights_of(i, relevance, sample, query, lists) for i in rows if relevance[i] > 0}
    anchors = [i for i in weight if weight[i] is not None]  # line 3
    observed = []
    for i in anchors:  # line 5
        total = sum(
            w * loss_of(scores[j] - scores[i] if j >= 0 else 0.0) for j, w in weight[i].items()
        )
        observed.append((sample[i], total / lists.items[query[i]]))  # line 6
    own = track(u, observed, gamma, None)  # line 6
    loss, gradient = 0.0, [0.0 for _ in rows]
    for i, u_i, outer in zip(
        anchors, own, outer_weights(anchors, sample, query, lists, average), strict=True
    ):
        n, z, gain = lists.items[query[i]], lists.ideal[query[i]], 2 ** relevance[i] - 1
        psi, psi_slope = inclusion(i, u_i)
        f = -gain / (z * math.log2(n * u_i + 1))  # (6.35)
        loss += outer * psi * f
        p = gain * n / (z * (n * u_i + 1) * math.log2(n * u_i + 1) ** 2 * math.log(2))  # line 7
        p = psi * p + psi_slope * f
        for j, w in weight[i].items():  # line 9
            push = outer * p * w / n * slope_of(scores[j] - scores[i] if j >= 0 else 0.0)
            if j >= 0:
                gradient[j] += push
                gradient[i] -= push
    return loss, gradient
