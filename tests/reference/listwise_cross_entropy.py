"""Listwise cross-entropy (2.47) by SOX, with one tracked mean for each query."""

import math

from tests.reference.ndcg import Lists, outer_weights, weights_of
from tests.reference.tracking import track


def step(
    scores: list[float],
    relevance: list[int],
    sample: list[int],
    query: list[int],
    u: dict[int, float],
    *,
    gamma: float,
    lists: Lists,
    tau: float,
    average: str = "queries",
) -> tuple[float, list[float]]:
    """One step on a mini-batch: loss, gradient in the scores, ``u`` updated in place."""
    rows = range(len(scores))
    weight = {i: weights_of(i, relevance, sample, query, lists) for i in rows if relevance[i] > 0}
    anchors = [i for i in weight if weight[i] is not None]
    observed, shares = [], {}
    for i in anchors:  # the mean over the list of exp(s / tau), as item i sees it
        own = {i if j < 0 else j: w / lists.items[query[i]] for j, w in weight[i].items()}
        shares[i] = {j: w * math.exp(scores[j] / tau) for j, w in own.items()}
        observed.append((query[i], sum(shares[i].values())))
    values = track(u, observed, gamma, None)
    loss, gradient = 0.0, [0.0 for _ in rows]
    for i, u_i, outer in zip(
        anchors, values, outer_weights(anchors, sample, query, lists, average), strict=True
    ):
        n = lists.items[query[i]]
        y = outer * relevance[i] / n
        loss -= y * math.log(math.exp(scores[i] / tau) / (n * u_i))
        gradient[i] -= y / tau
        for j, share in shares[i].items():
            gradient[j] += y * share / u_i / tau
    return loss, gradient
