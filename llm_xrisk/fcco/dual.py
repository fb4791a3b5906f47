"""Per-sample dual variables with their own projected step."""

import torch
from torch import Tensor

from llm_xrisk.fcco.arguments import checked
from llm_xrisk.fcco.groups import finite_rows, group_mean
from llm_xrisk.fcco.keyed import KeyedState, Keys, kept


class PerSampleDual(KeyedState):
    r"""Variables nu_i, tau_i, y_i or lambda_q kept beside the model and stepped by key.

    .. math:: v_i \leftarrow \mathrm{clip}\big(v_i - \eta\, m_i,\; lower,\; upper\big),
              \qquad m_i \leftarrow (1-\beta) m_i + \beta z_i

    They are buffers, not optimizer parameters: Adam would move samples that were not visited.
    Duplicated indices count once, with their mean gradient. ``num_samples=1`` is a global dual.
    Ascent is a negative gradient. Two numbers (8 bytes) per sample, its value and its momentum.

    Args:
        num_samples: Number of samples.
        num_labels: Variables for each sample; label l of sample i has the index i L + l.
        initial: First value.
        lr: Step size eta.
        beta: Weight of the new gradient in (0, 1]; 1 is plain SGD.
        lower: Projection's lower end, or None.
        upper: Projection's upper end, or None.
        state_dtype: dtype of the state, whatever ``.to()`` says.

    Raises:
        TypeError: an argument of another kind.
        ValueError: num_samples < 1, lr <= 0, beta outside (0, 1], lower > upper, or a checkpoint
            of another size.
        IndexError: index outside [0, num_samples) (checked on the CPU).

    Example:
        >>> nu = PerSampleDual(num_samples=4, lr=0.5, lower=0.0)
        >>> index = torch.tensor([2])
        >>> nu.step(torch.tensor([-3.0]), index)
        tensor([1.5000])
    """

    value: Tensor
    direction: Tensor

    @checked
    def __init__(
        self,
        num_samples: int,
        *,
        num_labels: int | None = None,
        lr: float,
        initial: float = 0.0,
        beta: float = 1.0,
        lower: float | None = None,
        upper: float | None = None,
        state_dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(num_samples, num_labels)
        if lr <= 0 or not 0 < beta <= 1:
            raise ValueError(f"need lr > 0 and beta in (0, 1], got lr={lr}, beta={beta}")
        if lower is not None and upper is not None and lower > upper:
            raise ValueError(f"lower must not exceed upper, got [{lower}, {upper}]")
        self.lr, self.beta = lr, beta
        self.lower = float("-inf") if lower is None else lower
        self.upper = float("inf") if upper is None else upper
        self.register_buffer("value", torch.full((self.num_keys,), initial, dtype=state_dtype))
        self.register_buffer("direction", torch.zeros(self.num_keys, dtype=state_dtype))

    def forward(self, index: Tensor | Keys) -> Tensor:
        """The current values of ``index`` (B,), without gradient."""
        return kept(self.value.index_select(0, self.check(index).index))

    def step(self, grad: Tensor, index: Tensor | Keys, where: Tensor | None = None) -> Tensor:
        """Take one projected step against ``grad`` (B,) on the rows ``where`` (all by default).

        In ``eval()`` nothing is done.

        Returns:
            (B,) the values of ``index`` after the step, without gradient.
        """
        keys = self.check(index)
        index, old = keys.index, self.value.index_select(0, keys.index)
        if not self.training:
            return old
        mean = grad.detach().to(self.value.dtype)
        moved = where = finite_rows(mean, where)
        if not keys.distinct:
            mean, count = group_mean(mean, keys.slots, where)
            moved = None if where is None else count > 0
        if self.beta < 1:
            before = self.direction.index_select(0, index)
            mean = torch.lerp(before, mean, self.beta)
            kept_direction = mean if moved is None else torch.where(moved, mean, before)
            self.direction.index_copy_(0, index, kept_direction)
        value = torch.sub(old, mean, alpha=self.lr).clamp_(self.lower, self.upper)
        value = value if moved is None else torch.where(moved, value, old)
        self.value.index_copy_(0, index, value)
        return kept(value)
