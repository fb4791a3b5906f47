"""A network that predicts the temperature of each sample from its features (section 6.5.3)."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llm_xrisk.fcco.groups import group_sum, readable, slots
from llm_xrisk.objectives.temperatures import Temperature, check_bounds

_BITS = 32
_MASK = (1 << _BITS) - 1


class TemperatureNetwork(Temperature):
    r"""A tau for each sample, predicted from its features: CLIP-TempNet (6.50).

    .. math:: \tau(x) = \tau_{\min} + (\tau_{\max} - \tau_{\min}) \, \sigma\Big( b + \sum_m a_m
              \big(p_m - \tfrac1M\big) \sigma(q_m) \Big), \qquad p = \mathrm{softmax}(q / e^{c})

    with q_m the product of dropout(sigmoid(W x + v)) and prototype m, scaled to length 1. At first
    a = 1, b = 0, e^c = 0.01, and once training starts the prototypes are the first mini-batch's
    features of the other modality, spread over its samples (those beyond their number stay
    random). The gradient in the weights is that of the mean of tau_i sg[z_i] with z_i of
    Algorithm 35, line 7, and none goes to the features.

    Images and texts have a network each: ``GlobalCLIP(n, tau=TemperatureNetwork(d),
    text_tau=TemperatureNetwork(d, seed=1))``. The objective's ``parameters()`` hold the weights:
    give them to the optimizer, without weight decay and with a small step.

    Weights, prototypes and dropout are the same on all ranks: dropout is a function of the seed,
    the number of the step and the sample's id, whatever the layout of the batch, and a resumed
    run goes on with it.

    Args:
        width: d, of the features.
        rho: Bound on KL(p, uniform), less than the log of the number of negatives: beyond it tau
            goes to ``lower``. 7 in the authors' recipe, 9.5 for large batches.
        lower: tau_min; 0.005.
        upper: tau_max; 0.05.
        num_prototypes: M.
        dropout: Share of hidden units dropped in training, in [0, 1).
        seed: Of first weights and dropout; another one for the other modality.
        state_dtype: dtype of the weights, whatever ``.to()`` says.

    State: d (d + 1) + (d + 1) M + 2 weights, the number of the step and whether it has started.
    The authors train it by Adam with a step of 3e-5 times 0.9^epoch, a 27th of the encoders'.

    Raises:
        ValueError: unless 0 < lower < upper, rho >= 0, width and num_prototypes >= 1 and dropout
            in [0, 1); features of another width.

    Example:
        >>> tau = TemperatureNetwork(4, lower=0.01, upper=0.05, num_prototypes=3)
        >>> tau(torch.eye(4)[:2], torch.tensor([0, 1])).shape
        torch.Size([2])

    Source: book section 6.5.3; Qiu et al., ICML 2024 (TempNet).
    """

    started: Tensor
    steps: Tensor

    def __init__(
        self,
        width: int,
        rho: float = 7.0,
        *,
        lower: float = 0.005,
        upper: float = 0.05,
        num_prototypes: int = 256,
        dropout: float = 0.5,
        seed: int = 0,
        state_dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(rho)
        check_bounds((lower + upper) / 2, lower, upper)
        if width < 1 or num_prototypes < 1 or not 0 <= dropout < 1:
            raise ValueError(
                "need width >= 1, num_prototypes >= 1 and dropout in [0, 1), got "
                f"{width}, {num_prototypes} and {dropout}"
            )
        self.lower, self.upper, self.dropout, self.seed = lower, upper, dropout, seed
        # a generator of its own: ranks start alike, whatever they drew before
        generator = torch.Generator().manual_seed(seed)
        bound = 1 / math.sqrt(width)
        uniform = torch.rand(width, width + 1, generator=generator) * 2 * bound - bound
        uniform = uniform.to(state_dtype)
        random = torch.randn(num_prototypes, width, generator=generator).to(state_dtype)
        self.weight = nn.Parameter(uniform[:, :width].clone())
        self.bias = nn.Parameter(uniform[:, width].clone())
        self.prototypes = nn.Parameter(random)
        self.scaler = nn.Parameter(torch.full((1,), math.log(0.01), dtype=state_dtype))
        self.pool = nn.Parameter(torch.ones(num_prototypes, dtype=state_dtype))
        self.offset = nn.Parameter(torch.zeros(1, dtype=state_dtype))
        self.register_buffer("started", torch.zeros(1, dtype=torch.bool))
        self.register_buffer("steps", torch.zeros(1, dtype=torch.long))

    def forward(self, features: Tensor, index: Tensor | None) -> Tensor:
        """Return tau (R,) of features (R, d), with the gradient of the weights."""
        self._check_width(features)
        hidden = F.linear(features.detach().to(self.weight.dtype), self.weight, self.bias)
        hidden = hidden.sigmoid()
        if self.training and self.dropout and index is not None:
            hidden = hidden * self._kept(index) / (1 - self.dropout)
        q = hidden @ F.normalize(self.prototypes, dim=-1).T
        share = (q / self.scaler.exp()).softmax(-1) - 1 / q.shape[-1]
        pooled = (share * q.sigmoid()) @ self.pool + self.offset
        tau = self.lower + (self.upper - self.lower) * pooled.sigmoid()
        return tau.to(features.dtype)

    @torch.no_grad()
    def begin(self, partners: Tensor, index: Tensor) -> None:
        """Count the step, and before the first one take the prototypes from ``partners`` (R, d).

        A mini-batch of one sample, whose rows have no negatives, is no step, and one with
        infinite or NaN features gives no prototypes. In ``eval()`` nothing is done.
        """
        if not self.training or partners.shape[0] == 0:
            return
        self._check_width(partners)
        usable = (index != index[:1]).any()
        self.steps.add_(usable)
        if readable(self.started) and bool(self.started):
            return
        usable = usable & partners.isfinite().all() & ~self.started
        slot = slots(index)
        # one row for each sample, in the order of the ids: that of the rows is the layout's
        rows = group_sum(F.normalize(partners.to(self.prototypes.dtype), dim=-1), slot)
        samples = torch.zeros_like(rows).index_copy_(0, slot, F.normalize(rows, dim=-1))
        found, wanted = slot.max() + 1, self.prototypes.shape[0]
        place = torch.arange(wanted, device=slot.device)
        taken = samples[(place * found.clamp(min=wanted) // wanted).clamp(max=len(samples) - 1)]
        replaced = usable & (place < found)
        self.prototypes.copy_(torch.where(replaced[:, None], taken, self.prototypes))
        self.started.logical_or_(usable)

    def _check_width(self, features: Tensor) -> None:
        if features.shape[-1] != self.weight.shape[0]:
            raise ValueError(
                f"this TemperatureNetwork reads features (rows, {self.weight.shape[0]}), got "
                f"{tuple(features.shape)}; build it with width={features.shape[-1]}"
            )

    def _kept(self, index: Tensor) -> Tensor:
        """Weight 1 for the hidden units (R, d) that stay, by hashes of step, id and unit."""
        seed = torch.full_like(self.steps, self.seed & _MASK)
        row = _hashed(_hashed(_hashed(seed) + self.steps) + index)
        unit = _hashed(torch.arange(self.weight.shape[0], device=index.device))
        number = _hashed(row[:, None] + unit)
        return (number >= self.dropout * (1 << _BITS)).to(self.weight.dtype)


def _hashed(number: Tensor) -> Tensor:
    """Mix the lowest 32 bits of int64 numbers; no product leaves 63 bits.

    Example:
        >>> _hashed(torch.tensor([0, 1]))
        tensor([         0, 824515495])
    """
    number = number & _MASK
    for _ in range(2):
        number = ((number >> 16) ^ number) * 0x45D9F3B & _MASK
    return (number >> 16) ^ number
