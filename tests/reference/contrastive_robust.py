"""Algorithm 35 (iSogCLR) with two views of each sample."""

import math

from tests.reference.embeddings import Embeddings, Vector
from tests.reference.tracking import track


def step(
    first: list[Vector],
    second: list[Vector],
    sample: list[int],
    u: dict[int, float],
    tau: dict[int, float],
    momentum: dict[int, float],
    *,
    gamma: float,
    rho: float,
    lr: float,
    beta: float,
    bounds: tuple[float, float],
    eps: float = 0.0,
) -> tuple[float, list[Vector], list[Vector]]:
    """One step on a mini-batch; ``u``, ``tau`` and ``momentum`` are updated in place."""
    views, owner, size = Embeddings(first + second), sample + sample, len(first)  # line 3
    rows = range(len(owner))

    def difference(i: int, j: int) -> float:
        """l_i(w; z_j), below (6.46)."""
        return views.similarity(i, j) - views.similarity(i, (i + size) % len(owner))

    observed, terms = [], []
    for i in rows:  # line 4
        negatives = [j for j in rows if owner[j] != owner[i]]  # line 5
        values = [math.exp(difference(i, j) / tau[owner[i]]) for j in negatives]
        observed.append((owner[i], sum(values) / len(negatives)))  # line 6
        terms.append(list(zip(negatives, values, strict=True)))
    own = track(u, observed, gamma, None)
    loss, z = 0.0, []
    for i in rows:
        t, weight = tau[owner[i]], 1 / (len(terms[i]) * len(owner))
        loss += t * (math.log(eps + own[i]) + rho) / len(owner)  # (6.47) at u and tau
        z.append(math.log(eps + own[i]) + rho)  # line 7
        for j, value in terms[i]:
            p = value / (eps + own[i])
            z[i] -= p * difference(i, j) / t / len(terms[i])  # line 7
            views.push(i, j, p * weight)  # line 9
            views.push(i, (i + size) % len(owner), -p * weight)
    for i in set(owner):  # line 10, with the projection the book leaves out
        mean = sum(z[a] for a in rows if owner[a] == i) / owner.count(i)
        momentum[i] = (1 - beta) * momentum.get(i, 0.0) + beta * mean
        tau[i] = min(max(tau[i] - lr * momentum[i], bounds[0]), bounds[1])
    return loss, views.gradient[:size], views.gradient[size:]
