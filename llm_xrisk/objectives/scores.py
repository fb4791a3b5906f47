r"""Scores of whole sequences from the log-probabilities of their tokens.

All take ``log_probs`` (R, T) of the current policy and ``mask`` (R, T), true on completion
tokens, and return (R,) with gradient. An empty completion has score 0 and no gradient; trainers
refuse it beforehand.

The k1 and k3 terms estimate KL(pi_old || pi_w) per token from samples of pi_old.
"""

from collections.abc import Callable

import torch
from torch import Tensor

SequenceScore = Callable[[Tensor, Tensor, Tensor | None], Tensor]


def log_likelihood(log_probs: Tensor, mask: Tensor, old: Tensor | None = None) -> Tensor:
    r"""Log pi_w(y|x), the sum over tokens (DFT, eq. 6.74).

    Example:
        >>> lp, mask = torch.tensor([[-1.0, -3.0, -9.0]]), torch.tensor([[True, True, False]])
        >>> log_likelihood(lp, mask), mean_log_likelihood(lp, mask)
        (tensor([-4.]), tensor([-2.]))
    """
    return torch.where(mask, log_probs, 0.0).sum(-1)


def mean_log_likelihood(log_probs: Tensor, mask: Tensor, old: Tensor | None = None) -> Tensor:
    r"""(1/|y|) log pi_w(y|x): DFT2's score, and log-L of DisCO (section 6.6.3)."""
    return log_likelihood(log_probs, mask) / lengths(mask)


def likelihood_ratio(log_probs: Tensor, mask: Tensor, old: Tensor | None = None) -> Tensor:
    r"""(1/|y|) sum_t pi_w(y_t) / pi_old(y_t): L-ratio of DisCO (section 6.6.3)."""
    return torch.where(mask, ratio(log_probs, mask, old), 0.0).sum(-1) / lengths(mask)


def clipped_ratio(
    log_probs: Tensor,
    mask: Tensor,
    old: Tensor | None,
    targets: Tensor,
    *,
    low: float,
    high: float,
) -> Tensor:
    r"""GRPO's two scores: mean of min(r, 1 + high) for right, of max(r, 1 - low) for wrong answers.

    Equations (6.77) and (6.78) with separate clip ranges; ``targets`` (R,) chooses.
    """
    r = ratio(log_probs, mask, old)
    clipped = torch.where(targets[:, None] > 0.5, r.clamp(max=1 + high), r.clamp(min=1 - low))
    return torch.where(mask, clipped, 0.0).sum(-1) / lengths(mask)


def k1(log_probs: Tensor, mask: Tensor, old: Tensor | None) -> Tensor:
    """Sum over tokens of log pi_old - log pi_w: unbiased, noisy, of either sign."""
    return -torch.where(mask, log_ratio(log_probs, mask, old), 0.0).sum(-1)


def k3(log_probs: Tensor, mask: Tensor, old: Tensor | None) -> Tensor:
    """Sum over tokens of r - 1 - log r, r = pi_w / pi_old: unbiased, never negative.

    Example:
        >>> lp, mask = torch.tensor([[-1.0, -1.0]]), torch.tensor([[True, True]])
        >>> k3(lp, mask, lp)
        tensor([0.])
    """
    log_r = log_ratio(log_probs, mask, old)
    return torch.where(mask, torch.expm1(log_r) - log_r, 0.0).sum(-1)


def lengths(mask: Tensor) -> Tensor:
    """|y| (R,), at least 1."""
    return mask.sum(-1).clamp(min=1)


def ratio(log_probs: Tensor, mask: Tensor, old: Tensor | None) -> Tensor:
    """pi_w / pi_old per token (R, T), 1 outside the mask."""
    return log_ratio(log_probs, mask, old).exp()


def log_ratio(log_probs: Tensor, mask: Tensor, old: Tensor | None) -> Tensor:
    """Log of pi_w / pi_old per token (R, T), 0 outside the mask."""
    if old is None:
        raise ValueError(
            "this score compares with the policy that generated the completions and got no "
            "old log-probs; pass old_log_probs (R, T), the trainer's own, taken before the update"
        )
    return torch.where(mask, log_probs - old, 0.0)


SCORES: dict[str, SequenceScore] = {
    "log_likelihood": log_likelihood,
    "mean_log_likelihood": mean_log_likelihood,
    "likelihood_ratio": likelihood_ratio,
}
KL_TERMS: dict[str, Callable[[Tensor, Tensor, Tensor | None], Tensor]] = {"k1": k1, "k3": k3}
