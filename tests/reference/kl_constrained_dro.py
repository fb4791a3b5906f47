"""Algorithm 24 over (w, tau), for (6.16), and the best tau by bisection."""

import math

from tests.reference.tracking import track

TAU, DIRECTION = 1, 2  # keys of the dual and its momentum beside u[0]


def step(
    losses: list[float],
    reference: list[float],
    u: dict[int, float],
    *,
    gamma: float,
    rho: float,
    tau: float,
    tau_0: float,
    lr: float,
    beta: float,
    clip: float,
) -> tuple[float, list[float]]:
    """One step on a mini-batch: loss, gradient in the losses, ``u`` updated in place."""
    rho_loss = [a - b for a, b in zip(losses, reference, strict=True)]  # (6.120)
    size, tau = len(losses), u.get(TAU, tau)  # line 2
    g = sum(math.exp(loss / tau) for loss in rho_loss) / size  # line 3
    track(u, [(0, g)], gamma, None)  # line 4
    p = [math.exp(loss / tau) / u[0] for loss in rho_loss]  # line 5
    mean_p = sum(p) / size
    # below (6.16)
    z = math.log(u[0]) + rho - sum(w * x / tau for w, x in zip(p, rho_loss, strict=True)) / size
    z -= (1 - mean_p) * math.log(u[0])  # our departure: this term is 0 on average
    z = min(max(z, -clip), clip)
    u[DIRECTION] = (1 - beta) * u.get(DIRECTION, 0.0) + beta * z
    u[TAU] = max(tau - lr * u[DIRECTION], tau_0)  # line 6, projected
    loss = tau * math.log(u[0]) + tau * rho  # (6.16) at u and the old tau
    u[0] **= tau / u[TAU]  # our departure: tau log u stays
    return loss, [w / size for w in p]


def divergence(losses: list[float], tau: float) -> float:
    """KL of softmax(l / tau) from uniform."""
    top = max(losses)
    weights = [math.exp((loss - top) / tau) for loss in losses]
    shares = [w / sum(weights) for w in weights]
    return sum(s * math.log(s * len(losses)) for s in shares if s > 0)


def best_tau(losses: list[float], rho: float, tau_0: float) -> float:
    """Where the divergence is rho; it falls with tau."""
    low, high = tau_0, 1e6
    for _ in range(200):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if divergence(losses, middle) > rho else (low, middle)
    return low
