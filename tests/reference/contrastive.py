"""Algorithm 34 (SogCLR) with two views of each sample."""

import math

from tests.reference.tracking import track

Vector = list[float]


def dot(a: Vector, b: Vector) -> float:
    """Inner product."""
    return sum(x * y for x, y in zip(a, b, strict=True))


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
    views, owner, size = first + second, sample + sample, len(first)  # line 3
    length = [math.sqrt(dot(v, v)) for v in views]
    h = [[x / length[a] for x in v] for a, v in enumerate(views)]
    rows = range(len(views))
    observed = []
    for i in rows:  # line 4
        negatives = [j for j in rows if owner[j] != owner[i]]  # line 5
        values = [math.exp(dot(h[i], h[j]) / tau) for j in negatives]
        observed.append((owner[i], sum(values) / len(negatives)))  # line 6, both views
    own = track(u, observed, gamma, None)
    loss, gradient = 0.0, [[0.0 for _ in v] for v in views]

    def push(i: int, j: int, weight: float) -> None:
        """Add ``weight`` times the gradient of h_i^T h_j in the unscaled views."""
        similarity = dot(h[i], h[j])
        for a, b in ((i, j), (j, i)):
            for k, value in enumerate(h[b]):
                gradient[a][k] += weight * (value - similarity * h[a][k]) / length[a]

    for i in rows:
        positive = (i + size) % len(views)
        negatives = [j for j in rows if owner[j] != owner[i]]
        loss -= dot(h[i], h[positive]) / len(views)  # first term of (6.42)
        loss += tau * math.log(eps + own[i]) / len(views)  # second term at u
        push(i, positive, -1 / len(views))  # line 8, first term
        for j in negatives:
            p = math.exp(dot(h[i], h[j]) / tau) / (eps + own[i])
            push(i, j, p / (len(negatives) * len(views)))  # line 8, second term
    return loss, gradient[:size], gradient[size:]
