"""Algorithm 36 (DFT)."""

import math

from tests.reference.tracking import track


def step(
    scores: list[float],
    gold: list[bool],
    prompt: list[int],
    ref: list[float],
    u: dict[int, float],
    *,
    gamma: float,
    tau: float,
    initial: float | None = 1.0,  # line 1: u_0 = 1
) -> tuple[float, list[float]]:
    """One step on a mini-batch: loss, gradient in the scores, ``u`` updated in place.

    ``ref`` is log pi_ref of each row; zeros drop the importance weight (6.71).
    """
    rows = range(len(scores))
    anchors = [i for i in rows if gold[i]]  # line 3
    observed = []
    for i in anchors:  # line 4
        negatives = [j for j in rows if not gold[j] and prompt[j] == prompt[i]]  # line 5
        if negatives:
            weights = [math.exp(scores[j] / tau) / math.exp(ref[j]) for j in negatives]
            observed.append((prompt[i], sum(weights) / len(weights)))  # line 6, (6.72)
    track(u, observed, gamma, initial)  # line 6, (6.72)
    loss, gradient = 0.0, [0.0 for _ in rows]
    for i in anchors:
        negatives = [j for j in rows if not gold[j] and prompt[j] == prompt[i]]
        gradient[i] -= 1 / len(anchors)  # line 8, first term of (6.73)
        loss -= scores[i] / len(anchors)  # first term of (6.69)
        if negatives:
            loss += tau * math.log(u[prompt[i]]) / len(anchors)  # second term of (6.69) at u
        for j in negatives:
            weight = math.exp(scores[j] / tau) / math.exp(ref[j])
            share = weight / (u[prompt[i]] * len(negatives))
            gradient[j] += share / len(anchors)  # line 8, second term of (6.73)
    return loss, gradient
