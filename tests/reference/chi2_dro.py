"""Stochastic descent on the duals of the chi-square problems, and their primal by bisection."""

import math
from collections.abc import Callable

from tests.reference.tracking import track

ETA = 1  # key of the dual, beside u[0]


def penalised(
    losses: list[float], reference: list[float], u: dict[int, float], *, lam: float, lr: float
) -> tuple[float, list[float]]:
    """One step on a mini-batch: loss, gradient in the losses, ``u`` updated in place."""
    rho_loss = [a - b for a, b in zip(losses, reference, strict=True)]
    size = len(losses)
    if ETA not in u:
        u[ETA] = balanced_eta(rho_loss, lam)
    eta = u[ETA]
    p = [max((x - eta) / lam + 1, 0.0) for x in rho_loss]
    u[ETA] -= lr * (1 - mean(p))
    return eta + lam / 2 * (mean([w * w for w in p]) - 1), [w / size for w in p]


def constrained(
    losses: list[float],
    reference: list[float],
    u: dict[int, float],
    *,
    gamma: float,
    rho: float,
    lr: float,
) -> tuple[float, list[float]]:
    """One step on a mini-batch: loss, gradient in the losses, ``u`` updated in place."""
    rho_loss = [a - b for a, b in zip(losses, reference, strict=True)]
    size, c = len(losses), math.sqrt(1 + 2 * rho)
    if ETA not in u:
        u[ETA] = best_eta(rho_loss, rho)
    eta = u[ETA]
    track(u, [(0, mean([max(x - eta, 0.0) ** 2 for x in rho_loss]))], gamma, None)
    p = [c * max(x - eta, 0.0) / math.sqrt(u[0]) for x in rho_loss]
    u[ETA] -= lr * (1 - mean(p))
    return c * math.sqrt(u[0]) + eta, [w / size for w in p]


def balanced_eta(losses: list[float], lam: float) -> float:
    """Where the weights [(l - eta) / lam + 1]_+ have mean 1."""

    def surplus(eta: float) -> float:
        return mean([max((x - eta) / lam + 1, 0.0) for x in losses]) - 1

    return root(surplus, min(losses) - lam, max(losses))


def best_eta(losses: list[float], rho: float) -> float:
    """Where weights in proportion to [l - eta]_+ are at distance rho from uniform."""
    width = max(losses) - min(losses)
    low = min(losses) - width / math.sqrt(2 * rho)
    return root(lambda eta: rho - spread(shaped(losses, eta)), low, max(losses) - 1e-9 * width)


def shaped(losses: list[float], eta: float) -> list[float]:
    """Weights of mean 1 in proportion to [l - eta]_+."""
    parts = [max(x - eta, 0.0) for x in losses]
    return [part / mean(parts) for part in parts]


def spread(weights: list[float]) -> float:
    """Half the mean of (p - 1)^2."""
    return mean([(w - 1) ** 2 for w in weights]) / 2


def mean(values: list[float]) -> float:
    """Average."""
    return sum(values) / len(values)


def root(function: Callable[[float], float], low: float, high: float) -> float:
    """Zero of a decreasing function."""
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if function(middle) > 0 else (low, middle)
    return (low + high) / 2
