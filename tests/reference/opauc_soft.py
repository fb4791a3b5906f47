"""Algorithm 30 (SOPA-s)."""

import math

from tests.reference.average_precision import loss_of, slope_of
from tests.reference.tracking import track


def step(
    scores: list[float],
    positive: list[bool],
    sample: list[int],
    u: dict[int, float],
    *,
    gamma: float,
    tau: float,
) -> tuple[float, list[float]]:
    """One step on a mini-batch: loss, gradient in the scores, ``u`` updated in place."""
    rows = range(len(scores))
    anchors = [i for i in rows if positive[i]]  # line 3
    negatives = [j for j in rows if not positive[j]]  # line 3
    observed = []
    for i in anchors:  # line 4
        weights = [math.exp(loss_of(scores[j] - scores[i]) / tau) for j in negatives]
        observed.append((sample[i], sum(weights) / len(negatives)))  # line 5
    own = track(u, observed, gamma, None)  # line 5; lines 6, 7: others stay
    loss, gradient = 0.0, [0.0 for _ in rows]
    for i, u_i in zip(anchors, own, strict=True):
        loss += tau * math.log(u_i) / len(anchors)  # f of (6.28)
        for j in negatives:
            p = math.exp(loss_of(scores[j] - scores[i]) / tau) / u_i  # line 8
            push = p * slope_of(scores[j] - scores[i]) / (len(anchors) * len(negatives))  # line 9
            gradient[j] += push
            gradient[i] -= push
    return loss, gradient
