"""Dr. GRPO, as a baseline on DisCO's interface."""

from torch import Tensor

from llm_xrisk.objectives.grpo import GRPO
from llm_xrisk.objectives.sequence import require_length


class DrGRPO(GRPO):
    r"""Dr. GRPO: GRPO without the division by the group's std and by the answer's length.

    .. math:: \max_w\; \frac1m \sum_i \frac1K \sum_j \frac{1}{L} \sum_t f(r_{ij,t}, A_{ij}),
              \qquad A = r - \mathrm{mean}

    with a constant L. Its weight on a question is p (1 - p) where GRPO's (6.76) is the square
    root of that; the gradient is autograd's.

    Args:
        max_length: L > 0, the largest number of tokens of an answer.
        clip_low: epsilon of wrong answers; 0.2.
        clip_high: epsilon of right answers; 0.2.
        normalizer: "all" averages over all questions, "valid" over those with a signal.

    Shapes: as :class:`GRPO`; ``length`` is required.

    State: none.

    Departures: as :class:`GRPO`.

    Raises:
        ValueError: max_length <= 0, clip ranges below 0, unknown normalizer, missing length.

    Example:
        >>> import torch
        >>> scores, rewards = torch.tensor([1.0, 0.5]), torch.tensor([1.0, 0.0])
        >>> length, group = torch.tensor([4, 2]), torch.tensor([0, 0])
        >>> DrGRPO(max_length=4)(scores, rewards, group=group, length=length).loss
        tensor(-0.1875)

    Relations: :class:`GRPO` divides by the std and by each answer's own length.

    Source: book section 6.6.3; Liu et al., arXiv 2503.20783.
    """

    def __init__(
        self,
        max_length: int,
        clip_low: float = 0.2,
        clip_high: float = 0.2,
        *,
        normalizer: str = "all",
    ) -> None:
        super().__init__(clip_low, clip_high, normalizer=normalizer)
        if max_length <= 0:
            raise ValueError(f"max_length must be positive, got {max_length}")
        self.max_length = max_length

    def advantages(self, rewards: Tensor, mean: Tensor, size: Tensor) -> Tensor:
        """Reward minus the group's mean."""
        return rewards - mean

    def row_weights(self, share: Tensor, counted: Tensor, length: Tensor | None) -> Tensor:
        """GRPO's weight times |y| / L: the scores are means over tokens."""
        tokens = require_length(type(self).__name__, length).to(share.dtype)
        return super().row_weights(share, counted, length) * tokens / self.max_length
