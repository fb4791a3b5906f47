"""Update rules of the tracked inner value: pure functions of the gathered rows.

Every rule takes ``(u, g, gamma)``: the tracked value, the mini-batch value and the weight of
the *new* value, all of shape (rows, ...), and returns the next tracked value. None of them
carries a gradient; :class:`~llm_xrisk.fcco.InnerEstimator` gives its result the gradient of ``g``.

MSVR and STORM need ``g`` at the previous weights as well; they enter here as rules of
``(u, g, gamma, g_previous)`` once an objective asks for them.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

Rule = Callable[[Tensor, Tensor, Tensor], Tensor]
MAX_LOG_WEIGHT = 60.0  # above any weight that trains and far below the largest float32


def moving_average(u: Tensor, g: Tensor, gamma: Tensor) -> Tensor:
    r"""Return :math:`(1-\gamma) u + \gamma g` (SOX and SCMA; Algorithms 24, 28, 36).

    ``gamma`` is the weight of the new mini-batch value; 1 forgets the past.

    Example:
        >>> moving_average(torch.tensor(1.0), torch.tensor(3.0), torch.tensor(0.5))
        tensor(2.)
    """
    return torch.lerp(u, g, gamma)


def log_moving_average(log_u: Tensor, log_g: Tensor, gamma: Tensor) -> Tensor:
    r"""The same average kept as a logarithm (eq. 6.14), for inner functions of exponential type.

    .. math:: \log u \leftarrow \log\big((1-\gamma) e^{\log u} + \gamma e^{\log g}\big)

    Nothing is exponentiated on the way, so it is finite wherever its arguments are.

    Example:
        >>> log_moving_average(torch.tensor(0.0), torch.tensor(-1e5), torch.tensor(0.75)).exp()
        tensor(0.2500)
    """
    return torch.logaddexp(torch.log1p(-gamma) + log_u, torch.log(gamma) + log_g)


def scent(
    log_u: Tensor, log_g: Tensor, gamma: Tensor, *, log_alpha: float, multiplier: float = 1.0
) -> Tensor:
    r"""SCENT: the moving average whose weight adapts to the value it tracks (Algorithm 26).

    .. math:: \gamma_i = \sigma(\log\alpha + m \nu_i), \qquad \nu_i = \log u_i

    ``multiplier`` m = 1 is SCENT, the proximal step of the dual of log E exp with step size
    alpha; m = 0 is SOX with gamma = sigmoid(log alpha). ``gamma`` is ignored: bind the other two
    with ``functools.partial(scent, log_alpha=-4.0)``.

    Departure: the book prints alpha = gamma e^-nu for the case in which SCENT equals SOX; the
    right one is alpha = gamma / (1 - gamma) e^-nu.

    No weight e^(log g - log u) exceeds e^60: where log u is far below log g, its gamma is 0 in
    any floating-point type, and the quotient would be infinite.

    Example:
        >>> zero = torch.tensor(0.0)
        >>> scent(zero, torch.tensor(2.0).log(), zero, log_alpha=0.0).exp()
        tensor(1.5000)
    """
    logit = log_alpha + multiplier * log_u
    new = torch.logaddexp(log_u - F.softplus(logit), log_g - F.softplus(-logit))
    return torch.maximum(new, log_g - MAX_LOG_WEIGHT)
