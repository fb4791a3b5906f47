"""Algorithm 24 (ABSGD) and its variant with the rule of Algorithm 26 (SCENT)."""

import math

from tests.reference.tracking import track


def step(
    losses: list[float],
    reference: list[float],
    u: dict[int, float],
    *,
    gamma: float,
    tau: float,
    alpha: float | None = None,
) -> tuple[float, list[float]]:
    """One step on a mini-batch: loss, gradient in the losses, ``u`` updated in place."""
    rho_loss = [a - b for a, b in zip(losses, reference, strict=True)]  # (6.118)
    size = len(losses)  # line 2
    g = sum(math.exp(loss / tau) for loss in rho_loss) / size  # line 3
    if alpha is None or 0 not in u:
        track(u, [(0, g)], gamma, None)  # line 4
    else:
        # Algorithm 26: nu <- nu + log(1 + alpha g) - log(1 + alpha e^nu), with nu = log u
        u[0] = u[0] * (1 + alpha * g) / (1 + alpha * u[0])
    gradient = [math.exp(loss / tau) / u[0] / size for loss in rho_loss]  # line 5, (6.119)
    return tau * math.log(u[0]), gradient  # (6.11) at u
