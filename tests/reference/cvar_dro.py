"""Stochastic subgradient descent on (6.117), with the hinge or its Moreau envelope."""

import math

NU = 0  # key of the threshold


def hinge(gap: float, eps: float) -> tuple[float, float]:
    """min over y of [y]_+ + (y - gap)^2 / (2 eps), and its slope."""
    if gap <= 0:
        return 0.0, 0.0
    return (gap - eps / 2, 1.0) if gap >= eps else (gap * gap / (2 * eps), gap / eps)


def step(
    losses: list[float],
    reference: list[float],
    u: dict[int, float],
    *,
    alpha: float,
    lr: float,
    eps: float,
) -> tuple[float, list[float]]:
    """One step on a mini-batch: loss, gradient in the losses, ``u`` updated in place."""
    rho_loss = [a - b for a, b in zip(losses, reference, strict=True)]
    size = len(losses)
    places = alpha * size
    if NU not in u:
        u[NU] = best_nu(rho_loss, places, eps)
    if (1 - alpha) ** size < 1e-3:  # else a batch may well have no row above the right nu
        best = best_nu(rho_loss, places, eps)
        if best < u[NU] if alpha == 1 else max(rho_loss) <= u[NU]:
            u[NU] = best
    value, slopes = u[NU], []
    for loss in rho_loss:
        if eps > 0:
            up, slope = hinge(loss - u[NU], eps)
        else:
            up, slope = max(loss - u[NU], 0.0), float(loss > u[NU])
            if loss == u[NU]:  # any subgradient in [0, 1]: the one that makes mean p = 1
                ties = sum(other == loss for other in rho_loss)
                above = sum(other > loss for other in rho_loss)
                slope = min(max((places - above) / ties, 0.0), 1.0)
        value += up / places
        slopes.append(slope)
    p = [slope / alpha for slope in slopes]
    u[NU] -= lr * (1 - sum(p) / size)
    return value, [w / size for w in p]


def best_nu(losses: list[float], places: float, eps: float) -> float:
    """The quantile, or with a smoothed hinge where the slopes sum to ``places``."""
    if eps == 0:
        return sorted(losses, reverse=True)[math.ceil(places - 1e-6) - 1]
    low, high = min(losses) - eps, max(losses)
    for _ in range(200):
        nu = (low + high) / 2
        many = sum(hinge(loss - nu, eps)[1] for loss in losses) > places
        low, high = (nu, high) if many else (low, nu)
    return high
