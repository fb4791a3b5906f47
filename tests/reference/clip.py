"""Algorithm 35 on both sides of (6.48) and (6.121), and the mini-batch losses (6.38) to (6.40)."""

import math
from collections.abc import Callable

from tests.reference.embeddings import Embeddings, Vector
from tests.reference.tracking import track

Taus = list[list[float]]


def step(
    images: list[Vector],
    texts: list[Vector],
    sample: list[int],
    u: tuple[dict[int, float], dict[int, float]],
    *,
    gamma: float,
    tau: Taus,
    rho: float = 0.0,
    eps: float = 0.0,
    reference: tuple[list[Vector], list[Vector]] | None = None,
) -> tuple[float, list[Vector], list[Vector], Taus]:
    """One step: loss, gradients in the features, z of each tau of each side; ``u`` is updated.

    ``tau`` holds those of the images and those of the texts, row by row; ``reference`` the
    reference model's features of both.
    """
    size = len(images)
    pairs, rows = Embeddings(images + texts), range(len(images))
    known = None if reference is None else Embeddings(reference[0] + reference[1])
    partner: list[Callable[[int, int], tuple[int, int]]] = [
        lambda i, j: (i, size + j),  # image i with text j
        lambda i, j: (j, size + i),  # text i with image j
    ]
    loss, z = 0.0, [[0.0 for _ in rows], [0.0 for _ in rows]]
    for side in (0, 1):

        def difference(i: int, j: int, side: int = side) -> float:
            """l of (6.48), or that less the reference's of (6.121)."""
            own = pairs.similarity(*partner[side](i, j)) - pairs.similarity(i, size + i)
            if known is None:
                return own
            return own - (known.similarity(*partner[side](i, j)) - known.similarity(i, size + i))

        terms = [[j for j in rows if sample[j] != sample[i]] for i in rows]  # line 5
        values = [[math.exp(difference(i, j) / tau[side][i]) for j in terms[i]] for i in rows]
        observed = [(sample[i], sum(values[i]) / len(values[i])) for i in rows]
        own = track(u[side], observed, gamma, None)  # line 6
        for i in rows:
            t = tau[side][i]
            loss += t * (math.log(eps + own[i]) + rho) / size
            z[side][i] = math.log(eps + own[i]) + rho  # line 7
            for j, value in zip(terms[i], values[i], strict=True):
                p = value / (eps + own[i])
                z[side][i] -= p * difference(i, j) / t / len(terms[i])  # line 7
                weight = p / (len(terms[i]) * size)
                pairs.push(*partner[side](i, j), weight)  # line 9
                pairs.push(i, size + i, -weight)
    return loss, pairs.gradient[:size], pairs.gradient[size:], z


def minibatch(
    features: list[Vector], choices: list[list[int]], positives: list[int], *, tau: float
) -> tuple[float, list[Vector]]:
    """Sum over anchors of -log softmax of the positive among it and the ``choices``; gradient."""
    rows, loss = Embeddings(features), 0.0
    for i, (others, positive) in enumerate(zip(choices, positives, strict=True)):
        if not others:
            continue
        members = [positive, *others]
        values = [math.exp(rows.similarity(i, j) / tau) for j in members]
        loss -= math.log(values[0] / sum(values))  # (6.38), (6.39), (6.40)
        rows.push(i, positive, -1 / tau)
        for j, value in zip(members, values, strict=True):
            rows.push(i, j, value / sum(values) / tau)
    return loss, rows.gradient
