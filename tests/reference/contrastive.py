"""Algorithm 34 (SogCLR) with two views of each sample."""

import math

from tests.reference.embeddings import Embeddings, Vector
from tests.reference.tracking import track


def step(
    first: list[Vector],
    second: list[Vector],
    sample: list[int],
    u: dict[int, float],
    *,
    gamma: float,
    tau: float,
    eps: float = 0.0,
) -> tuple[float, list[Vector], list[Vector]]:
    """One step on a mini-batch: loss, gradients in the views, ``u`` updated in place."""
    views, owner, size = Embeddings(first + second), sample + sample, len(first)  # line 3
    rows = range(len(owner))
    observed = []
    for i in rows:  # line 4
        negatives = [j for j in rows if owner[j] != owner[i]]  # line 5
        values = [math.exp(views.similarity(i, j) / tau) for j in negatives]
        observed.append((owner[i], sum(values) / len(negatives)))  # line 6, both views
    own = track(u, observed, gamma, None)
    loss = 0.0
    for i in rows:
        positive = (i + size) % len(owner)
        negatives = [j for j in rows if owner[j] != owner[i]]
        loss -= views.similarity(i, positive) / len(owner)  # first term of (6.42)
        loss += tau * math.log(eps + own[i]) / len(owner)  # second term at u
        views.push(i, positive, -1 / len(owner))  # line 8, first term
        for j in negatives:
            p = math.exp(views.similarity(i, j) / tau) / (eps + own[i])
            views.push(i, j, p / (len(negatives) * len(owner)))  # line 8, second term
    return loss, views.gradient[:size], views.gradient[size:]
