"""Temperatures that give every token the same entropy: TempNet's optimum, and its baseline."""

import math

import torch
from torch import Tensor

from llm_xrisk.models.logprobs import _chunks
from llm_xrisk.models.tempnet_loss import as_rows, log_norms_and_entropy, wide

_HALVINGS = {torch.float32: 32, torch.float64: 64}  # of log tau: down to its rounding


@torch.no_grad()
def fixed_entropy_temperature(
    logits: Tensor, entropy: float, *, tau_min: float = 0.01, tau_max: float = 2.0
) -> Tensor:
    r"""The tau of each token at which softmax(s / tau) has the entropy asked for, by bisection.

    .. math:: H(\mathrm{softmax}(s / \tau)) = h, \qquad \tau \in [\tau_{\min}, \tau_{\max}]

    With h = log V - rho this is where ``tempered_loss`` is least in tau, one token at a time: what
    a TempNet of a frozen model could learn at best, and a sampler without training that it is to
    be compared with.

    H grows with tau. A token too flat, or too peaked, for h within the bounds gets the bound.

    Args:
        logits: (..., V) with up to two dimensions before V, any float dtype.
        entropy: h in nats, in (0, log V].
        tau_min: Smallest temperature, > 0.
        tau_max: Largest.

    Returns:
        (...) in float32, or float64 for float64 logits; no gradient.

    Raises:
        ValueError: an argument out of range.

    Example:
        >>> half = torch.tensor([math.log(3.0), 0.0])  # p = 3/4 and 1/4 at tau = 1
        >>> h = torch.distributions.Categorical(logits=half).entropy().item()
        >>> fixed_entropy_temperature(half, h).round(decimals=4)
        tensor(1.)
    """
    vocab_size = logits.shape[-1]
    if not 0 < entropy <= math.log(vocab_size):
        raise ValueError(
            f"entropy must be in (0, log V], got {entropy} nats with log V = "
            f"{math.log(vocab_size):.3f} for V = {vocab_size}; 1.9 is what rho = 8.5 asks for at "
            "V = 32000"
        )
    if not 0 < tau_min < tau_max < math.inf:
        raise ValueError(f"need 0 < tau_min < tau_max, got tau_min={tau_min}, tau_max={tau_max}")
    rows = as_rows(logits)
    tau = torch.empty(rows.shape[:2], dtype=wide(logits), device=logits.device)
    for part in _chunks(*rows.shape):
        numbers = rows[part].to(tau.dtype)
        tau[part] = _bisected(numbers - numbers.amax(-1, keepdim=True), entropy, tau_min, tau_max)
    return tau.view(logits.shape[:-1])


def _bisected(shifted: Tensor, entropy: float, tau_min: float, tau_max: float) -> Tensor:
    low = torch.full_like(shifted[..., 0], tau_min)
    high = torch.full_like(low, tau_max)
    # exactly the bounds where the entropy lies outside, which halving would only come close to
    below = _entropy(shifted, low) >= entropy
    above = _entropy(shifted, high) <= entropy
    for _ in range(_HALVINGS[shifted.dtype]):
        middle = (low * high).sqrt()
        flat = _entropy(shifted, middle) > entropy
        low, high = torch.where(flat, low, middle), torch.where(flat, middle, high)
    middle = (low * high).sqrt()
    return middle.masked_fill(below, tau_min).masked_fill(above & ~below, tau_max)


def _entropy(shifted: Tensor, tau: Tensor) -> Tensor:
    return log_norms_and_entropy(shifted / tau.unsqueeze(-1))[1]
