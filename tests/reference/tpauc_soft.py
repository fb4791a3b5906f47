"""Algorithm 32 (SOTA-s)."""

import math

from tests.reference.average_precision import loss_of, slope_of
from tests.reference.tracking import track

SHARED = -1  # the key of v, where samples have their u


def step(
    scores: list[float],
    positive: list[bool],
    sample: list[int],
    u: dict[int, float],
    *,
    gamma: float,
    outer_gamma: float,
    tau1: float,
    tau2: float,
) -> tuple[float, list[float]]:
    """One step on a mini-batch: loss, gradient in the scores, ``u`` and v updated in place."""
    rows = range(len(scores))
    anchors = [i for i in rows if positive[i]]  # line 3
    negatives = [j for j in rows if not positive[j]]  # line 3
    observed = []
    for i in anchors:  # line 4
        weights = [math.exp(loss_of(scores[j] - scores[i]) / tau2) for j in negatives]
        observed.append((sample[i], sum(weights) / len(negatives)))  # line 5
    own = track(u, observed, gamma, None)  # line 5; lines 6, 7: others stay
    mean = sum(u_i ** (tau2 / tau1) for u_i in own) / len(anchors)
    (v,) = track(u, [(SHARED, mean)], outer_gamma, None)  # line 8
    gradient = [0.0 for _ in rows]
    for i, u_i in zip(anchors, own, strict=True):
        for j in negatives:
            p = math.exp(loss_of(scores[j] - scores[i]) / tau2) * u_i ** (tau2 / tau1 - 1) / v
            push = p * slope_of(scores[j] - scores[i]) / (len(anchors) * len(negatives))  # line 10
            gradient[j] += push
            gradient[i] -= push
    return tau1 * math.log(v), gradient  # (6.33)
