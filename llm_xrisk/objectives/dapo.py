"""DAPO, as a baseline on DisCO's interface."""

from torch import Tensor

from llm_xrisk.objectives.grpo import GRPO
from llm_xrisk.objectives.sequence import require_length


class DAPO(GRPO):
    r"""DAPO: GRPO averaged over the tokens of the mini-batch, clipped higher, on mixed groups.

    .. math:: \max_w\; \frac{1}{\sum_{ij} |y_{ij}|} \sum_{ij} \sum_t f(r_{ij,t}, A_{ij}),
              \quad f(r, A) = \min(r A, \mathrm{clip}(r, 1 - \epsilon_{low},
              1 + \epsilon_{high}) A)

    Long answers weigh more than in (6.64). The sum runs over the questions with right and wrong
    answers, which is what DAPO's dynamic sampling leaves; the gradient is autograd's.

    Args:
        clip_low: epsilon of wrong answers; 0.2.
        clip_high: epsilon of right answers; 0.28.
        std: "population" or "sample", as :class:`GRPO`.
        normalizer: "valid" counts the tokens of questions with a signal, "all" those of all.

    Shapes: as :class:`GRPO`; ``length`` is required.

    State: none.

    Departures: as :class:`GRPO`. The penalty on overlong answers is the reward's business.

    Raises:
        ValueError: clip ranges below 0, unknown std or normalizer, missing length.

    Example:
        >>> import torch
        >>> scores, rewards = torch.tensor([1.0, 0.5]), torch.tensor([1.0, 0.0])
        >>> length, group = torch.tensor([6, 2]), torch.tensor([0, 0])
        >>> DAPO()(scores, rewards, group=group, length=length).loss  # -(6 * 1 - 2 * 0.5) / 8
        tensor(-0.6250)

    Relations: with answers of one length, groups of one size and the same clip it is
    :class:`GRPO` on the questions with a signal.

    Source: book section 6.6.3; Yu et al., arXiv 2503.14476.
    """

    def __init__(
        self,
        clip_low: float = 0.2,
        clip_high: float = 0.28,
        *,
        std: str = "population",
        normalizer: str = "valid",
    ) -> None:
        super().__init__(clip_low, clip_high, std=std, normalizer=normalizer)

    def row_weights(self, share: Tensor, counted: Tensor, length: Tensor | None) -> Tensor:
        """The row's part of the counted tokens."""
        tokens = require_length(type(self).__name__, length) * counted
        return tokens / tokens.sum().clamp(min=1)
