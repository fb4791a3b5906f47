"""K-SONG: (6.36), and (6.37) with the corrected step of lambda."""

import math
from typing import Any

from tests.reference import ndcg
from tests.reference.ndcg import Lists
from tests.reference.tracking import track


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x > -700 else 0.0


def item_weights(
    rows: list[int], relevance: list[int], sample: list[int], q: int, lists: Lists
) -> dict[int, float]:
    """Weight of each of the list's rows in a mean over the list: sums to 1."""
    share = lists.relevant[q] / lists.items[q]
    mates = {sample[j] for j in rows if relevance[j] > 0}
    rest = {sample[j] for j in rows if relevance[j] <= 0}
    kind = {j: share / len(mates) if relevance[j] > 0 else (1 - share) / len(rest) for j in rows}
    return {j: weight / sample.count(sample[j]) for j, weight in kind.items()}


def solve(scores: list[float], weight: dict[int, float], level: float) -> float:
    """The minimiser of level * x + sum_j weight_j (s_j - x)_+: one of the scores."""
    return min(
        (scores[j] for j in weight),
        key=lambda x: level * x + sum(w * max(scores[j] - x, 0.0) for j, w in weight.items()),
    )


def advance(
    scores: list[float],
    relevance: list[int],
    sample: list[int],
    query: list[int],
    u: dict[Any, float],
    *,
    lists: Lists,
    top_k: int,
    eps: float,
    lr: float,
    smooth: tuple[float, float] | None,
) -> set[int]:
    """Step lambda of the batch's lists of more than K items, or solve it; returns these lists."""
    found = set()
    for q in {q for q in query if lists.items[q] > top_k}:
        own = [j for j in range(len(scores)) if query[j] == q]
        kinds = {relevance[j] > 0 for j in own}
        if len(kinds) < 2:
            continue
        weight = item_weights(own, relevance, sample, q, lists)
        level = (top_k + eps) / lists.items[q]
        old = u.get(("lambda", q))
        if old is None:
            new = solve(scores, weight, level)
        elif smooth is None:  # (K + eps) / N minus the share above
            new = old - lr * (level - sum(w for j, w in weight.items() if scores[j] > old))
        else:
            tau1, tau2 = smooth
            share = sum(w * sigmoid((scores[j] - old) / tau1) for j, w in weight.items())
            new = old - lr * (level - share + tau2 * old)
        u["lambda", q] = new
        found.add(q)
    return found


def step(
    scores: list[float],
    relevance: list[int],
    sample: list[int],
    query: list[int],
    u: dict[Any, float],
    *,
    gamma: float,
    lists: Lists,
    top_k: int,
    alpha: float,
    approach: str = "bilevel",
    gradient: str = "practical",
    lr: float = 0.01,
    eps: float = 0.5,
    tau1: float = 0.01,
    tau2: float = 1e-4,
    gamma_hessian: float = 0.9,
) -> tuple[float, list[float]]:
    """One step: loss, gradient; ``u`` holds u by sample, and lambda and s by (name, query)."""
    rows, found = (scores, relevance, sample, query), dict[int, float]()
    by_sample = {key: value for key, value in u.items() if isinstance(key, int)}
    smooth = (tau1, tau2) if gradient == "theoretical" else None
    long: set[int] = set()
    if approach == "bilevel":
        long = advance(*rows, u, lists=lists, top_k=top_k, eps=eps, lr=lr, smooth=smooth)

    def inclusion(i: int, u_i: float) -> tuple[float, float]:
        found[i] = u_i
        q, n = query[i], lists.items[query[i]]
        if n <= top_k:  # all items are in the first K places
            return 1.0, 0.0
        if approach == "bilevel":
            return sigmoid(alpha * (scores[i] - u["lambda", q])), 0.0
        value = sigmoid(alpha * (top_k - n * u_i))
        return value, -n * alpha * value * (1 - value)  # d psi(K - N u) / du = -N psi'

    loss, total = ndcg.step(*rows, by_sample, gamma=gamma, lists=lists, inclusion=inclusion)
    u.update(by_sample)
    if smooth is not None:
        anchors = [i for i in found if query[i] in long]
        pulls = implicit(*rows, u, anchors, lists, smooth, gamma_hessian)
        weights = ndcg.outer_weights(list(found), sample, query, lists, "queries")
        outer = dict(zip(found, weights, strict=True))
        for i in anchors:  # alpha psi' f(u) (grad s_i - grad lambda)
            q, n, psi = query[i], lists.items[query[i]], inclusion(i, found[i])[0]
            f = -(2 ** relevance[i] - 1) / (lists.ideal[q] * math.log2(n * found[i] + 1))
            push = outer[i] * alpha * psi * (1 - psi) * f
            total[i] += push
            for j, part in pulls[i].items():
                total[j] -= push * part
    return loss, total


def implicit(
    scores: list[float],
    relevance: list[int],
    sample: list[int],
    query: list[int],
    u: dict[Any, float],
    anchors: list[int],
    lists: Lists,
    smooth: tuple[float, float],
    gamma: float,
) -> dict[int, dict[int, float]]:
    """The derivatives of lambda as each anchor sees them, over the tracked Hessian s_q."""
    tau1, tau2 = smooth
    pulls, hessians = {}, []
    for i in anchors:
        q = query[i]
        weight = ndcg.weights_of(i, relevance, sample, query, lists) or {}
        own = {i if j < 0 else j: w / lists.items[q] for j, w in weight.items()}
        near = {j: sigmoid((scores[j] - u["lambda", q]) / tau1) for j in own}
        pulls[i] = {j: w * near[j] * (1 - near[j]) / tau1 for j, w in own.items()}
        hessians.append((q, sum(pulls[i].values()) + tau2))
    kept = {key[1]: value for key, value in u.items() if isinstance(key, tuple) and key[0] == "s"}
    values = track(kept, hessians, gamma, None)
    u.update({("s", q): value for q, value in kept.items()})
    return {
        i: {j: part / s_q for j, part in pulls[i].items()}
        for i, s_q in zip(anchors, values, strict=True)
    }
