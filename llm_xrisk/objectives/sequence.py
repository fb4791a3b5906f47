"""Objectives of whole sequences: what a trainer of language models needs to know of them."""

from torch import Tensor

from llm_xrisk.objectives.base import Objective, masked_logmeanexp
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

    score: str = "log_likelihood"
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
        return {"scores": SCORES[self.score](log_probs, mask, old_log_probs)}


def same_group(group: Tensor) -> Tensor:
    """(R, R) mask of the rows that belong to one question."""
    return group[:, None] == group[None, :]


def effective_fraction(values: Tensor, mask: Tensor) -> Tensor:
    """Effective number of entries under weights exp(values), as a fraction of their number.

    (sum w)^2 / (m sum w^2) over the last dimension: 1 is uniform, 1/m a single entry.

    Example:
        >>> effective_fraction(torch.tensor([0.0, -99.0]), torch.tensor([True, True]))
        tensor(0.5000)
    """
    return (2 * masked_logmeanexp(values, mask) - masked_logmeanexp(2 * values, mask)).exp()
