"""Pairwise surrogates l(s) of 1[s >= 0], s the score of a negative minus that of a positive.

Each is non-decreasing in ``s`` and acts elementwise. Bind a margin with
``functools.partial(squared_hinge, margin=0.6)``.
"""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

Surrogate = Callable[[Tensor], Tensor]


def identity(s: Tensor) -> Tensor:
    """l(s) = s: what the authors of DisCO use."""
    return s


def hinge(s: Tensor, *, margin: float = 1.0) -> Tensor:
    """l(s) = [margin + s]_+."""
    return F.relu(s + margin)


def squared_hinge(s: Tensor, *, margin: float = 1.0) -> Tensor:
    """l(s) = [margin + s]_+^2."""
    return F.relu(s + margin).square()


def squared(s: Tensor, *, margin: float = 1.0) -> Tensor:
    """l(s) = (margin + s)^2; non-decreasing only for s >= -margin."""
    return (s + margin).square()


def logistic(s: Tensor, *, scale: float = 1.0) -> Tensor:
    """l(s) = log(1 + exp(s / scale)), without overflow."""
    return F.softplus(s / scale)
