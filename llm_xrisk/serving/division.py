"""Logits over the temperatures of their rows: what every engine's processor does with a tau."""

import math

import torch
from torch import Tensor


def divide_logits(logits: Tensor, tau: Tensor) -> Tensor:
    """Divide each row of logits by its temperature; the largest logit stays the largest.

    A division rounds neighbours together now and then. Where that would make a second logit as
    large as the largest one, it is kept a step below, so that greedy decoding does not change.
    Rows of tau 1 come back as they are, NaN and infinities included.

    Args:
        logits: (rows, V), any float dtype.
        tau: (rows,) in float32 or wider, > 0.

    Returns:
        (rows, V) in the dtype of ``tau``.

    Example:
        >>> divide_logits(torch.tensor([[3.0, 1.0], [3.0, 1.0]]), torch.tensor([2.0, 1.0]))
        tensor([[1.5000, 0.5000],
                [3.0000, 1.0000]])
    """
    tau = tau.unsqueeze(-1)
    numbers = logits.to(tau.dtype)
    top = numbers.amax(-1, keepdim=True)
    divided = numbers / tau
    next_best = torch.nextafter(top / tau, torch.full_like(tau, -math.inf))
    return torch.where(numbers < top, divided.minimum(next_best), divided)
