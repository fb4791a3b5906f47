"""Objectives of whole sequences: what a trainer of language models needs to know of them."""

import torch
from torch import Tensor

from llm_xrisk.fcco.groups import group_sum
from llm_xrisk.objectives.base import Objective
from llm_xrisk.objectives.scores import SCORES


class SequenceObjective(Objective):
    """An objective of sequence scores, one row for each completion.

    A trainer hands the tokens' log-probabilities to :meth:`row_scores`, the differentiable
    scalars it returns to ``forward`` ("score"), differentiates the loss in them ("weigh") and
    backpropagates their sum weighted by the derivatives ("backprop").

    Attributes:
        score: Name of the sequence score in :data:`~llm_xrisk.objectives.scores.SCORES`.
        needs_old: Whether the scores compare with the policy that generated the completions.
    """

    score: str | None = "log_likelihood"
    needs_old: bool = False

    def row_scores(
        self, log_probs: Tensor, mask: Tensor, old_log_probs: Tensor | None, targets: Tensor
    ) -> dict[str, Tensor]:
        """Map tokens to the scalars per row that ``forward`` takes by these names.

        Args:
            log_probs: (R, T) log-probabilities of the current policy, with gradient.
            mask: (R, T) true on completion tokens.
            old_log_probs: (R, T) of the policy that generated them, or None.
            targets: (R,) labels or rewards.
        """
        return {"scores": SCORES[self.score or "log_likelihood"](log_probs, mask, old_log_probs)}


def kl_statistics(kl: Tensor, length: Tensor) -> tuple[Tensor, Tensor]:
    """Mean KL per token of the mini-batch, with gradient, and its standard error.

    Args:
        kl: (R,) sums over tokens.
        length: (R,) numbers of tokens.

    Example:
        >>> import torch
        >>> kl_statistics(torch.tensor([0.5, 0.1]), torch.tensor([2, 1]))
        (tensor(0.2000), tensor(0.0471))
    """
    tokens = length.sum().clamp(min=1)
    mean = kl.sum() / tokens
    error = (kl - mean * length).detach().square().sum().sqrt() / tokens
    return mean, error


def effective_in_group(values: Tensor, log_mean: Tensor, mask: Tensor, slot: Tensor) -> Tensor:
    """Effective number of a group's rows under weights exp(values), as a fraction of their number.

    Args:
        values: (R,) exponents.
        log_mean: (R,) log of the mean of exp(values) over the group's rows in ``mask``.
        mask: (R,) which rows count.
        slot: (R,) the group of each row.

    Returns:
        (R,): 1 is uniform, 1/m a single one of m.

    Example:
        >>> import torch
        >>> one, both = torch.zeros(2), torch.tensor([True, True])
        >>> effective_in_group(one, one, both, torch.tensor([0, 0]))
        tensor([1., 1.])
    """
    share = torch.exp(values - log_mean).masked_fill(~mask, 0.0)  # m times that in the sum
    count = group_sum(mask.to(values.dtype), slot)
    return count / group_sum(share.square(), slot).clamp(min=1e-12)


def require_length(name: str, length: Tensor | None) -> Tensor:
    """Return ``length`` or raise the error that shows how to get it."""
    if length is None:
        raise ValueError(f"{name} weighs tokens and got no length; pass length=mask.sum(-1)")
    return length
