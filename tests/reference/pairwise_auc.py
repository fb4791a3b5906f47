"""The mini-batch pairwise loss of section 6.4.1, method 1."""

from collections.abc import Callable

from tests.reference.average_precision import loss_of, slope_of

Function = Callable[[float], float]


def step(
    scores: list[float], positive: list[bool], loss: Function = loss_of, slope: Function = slope_of
) -> tuple[float, list[float]]:
    """Loss and gradient in the scores of one mini-batch of one label."""
    rows = range(len(scores))
    pairs = [(i, j) for i in rows if positive[i] for j in rows if not positive[j]]
    value, gradient = 0.0, [0.0 for _ in rows]
    for i, j in pairs:
        value += loss(scores[j] - scores[i]) / len(pairs)
        gradient[j] += slope(scores[j] - scores[i]) / len(pairs)
        gradient[i] -= slope(scores[j] - scores[i]) / len(pairs)
    return value, gradient


def rank_auc(scores: list[float], positive: list[bool]) -> float:
    """The AUC by the sum of ranks (Mann and Whitney); ties share their mean rank."""
    rank = {s: sum(t < s for t in scores) + (scores.count(s) + 1) / 2 for s in scores}
    won = [s for s, y in zip(scores, positive, strict=True) if y]
    p, n = len(won), len(scores) - len(won)
    return (sum(rank[s] for s in won) - p * (p + 1) / 2) / (p * n)
