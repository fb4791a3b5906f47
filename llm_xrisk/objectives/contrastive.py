"""Global contrastive learning of two views (section 6.5.2)."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from llm_xrisk.fcco import InnerEstimator, join
from llm_xrisk.fcco.groups import group_sum, slots
from llm_xrisk.fcco.schedules import GammaSchedule
from llm_xrisk.objectives.base import (
    Objective,
    ObjectiveOutput,
    masked_mean,
    observed_max,
    observed_mean,
    require_index,
    widened,
)
from llm_xrisk.objectives.pairs import (
    effective_fraction,
    logsumexp,
    same_group,
    with_similarity_gradient,
)


class GlobalContrastive(Objective):
    r"""Global contrastive loss, SogCLR: contrasts each sample with all others, at any batch size.

    .. math:: F(w) = \frac1n \sum_i \tau \log \Big( \frac{1}{|S_i^-|} \sum_{x_j \in S_i^-}
              \exp\frac{h_i^\top h_j - h_i^\top h_i^+}{\tau} \Big) \qquad (6.41), (6.42)

    Both views of a sample are anchors, each the positive of the other; the negatives of both are
    the 2 (B - 1) views of other samples. Inner value g_i = mean_j exp(h_i^T h_j / tau), outer
    function f = tau log(eps + .), tracked as log u_i in the form of (6.14); each view computes
    with its own u, whose mean is the u_i kept. The gradient is Algorithm 34, line 8; the loss is
    the objective's value at u.

    Args:
        num_samples: n, the number of samples.
        gamma: Weight of the new mini-batch value in (0, 1]; 0.9 in the authors' recipe, for
            small batches a cosine schedule down to 0.2.
        tau: Temperature > 0; 0.1 in the authors' recipe.
        eps: Added to u inside the logarithm, Algorithm 34's epsilon >= 0.
        state_dtype: dtype of the state.

    Shapes:
        scores (B, d) features of the first views, targets (B, d) of the second, index (B,).
        Features are scaled to length 1 here.

    State: one log u per sample, 5 bytes.

    Departures: (6.43) drops the factor tau and the mean of (6.42); this is (6.42). Rows of one
    sample are never each other's negatives, also where the sample stands twice in a batch.

    Raises:
        ValueError: gamma outside (0, 1], tau <= 0, eps < 0, or a missing index.

    Example:
        >>> objective = GlobalContrastive(num_samples=2, tau=0.5)
        >>> first = second = torch.eye(2)                   # positives agree, negatives do not
        >>> objective(first, second, index=torch.tensor([0, 1])).loss  # -1 + 0.5 log exp(0)
        tensor(-1.)

    Relations: gamma=1 is the mini-batch (decoupled) InfoNCE; DFT and SOPA-s keep the same log u
    for other scores.

    Source: book section 6.5.2, Algorithm 34; Yuan et al., ICML 2022.
    """

    binary_targets = False

    def __init__(
        self,
        num_samples: int,
        gamma: float | GammaSchedule = 0.9,
        tau: float = 0.1,
        *,
        eps: float = 0.0,
        state_dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        if tau <= 0 or eps < 0:
            raise ValueError(f"need tau > 0 and eps >= 0, got tau={tau} and eps={eps}")
        self.tau, self.log_eps = tau, math.log(eps) if eps else -math.inf
        self.inner = InnerEstimator(num_samples, gamma, log=True, state_dtype=state_dtype)

    def forward(
        self, scores: Tensor, targets: Tensor, *, index: Tensor | None = None
    ) -> ObjectiveOutput:
        """Return the objective of the joined views; see the class."""
        first, second, ids = join(widened(scores), widened(targets), require_index(self, index))
        both = torch.cat([ids, ids])
        positive, log_g, fraction, anchors = self._similarities(first, second, both)
        log_u = self.inner(log_g, both, where=anchors)
        loss = self._loss(positive, log_u, anchors)
        with torch.no_grad():
            metrics = {
                "objective": loss.detach(),
                "log_u/mean": observed_mean(log_u, anchors),
                "log_u/max": observed_max(log_u, anchors),
                "negatives/effective_fraction": observed_mean(fraction, anchors),
                "similarity/positive": positive.mean(),
                "skipped": (~anchors.any()).to(positive.dtype),
            }
        return ObjectiveOutput(loss, metrics)

    def exact(self, scores: Tensor, targets: Tensor, *, index: Tensor) -> Tensor:
        """(6.42) of the given views, without state."""
        both = torch.cat([index, index])
        positive, log_g, _, anchors = self._similarities(widened(scores), widened(targets), both)
        return self._loss(positive, log_g, anchors)

    def _similarities(
        self, first: Tensor, second: Tensor, both: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Of the 2B views: similarity to the positive, log g, how many negatives count, if any."""
        views, slot = F.normalize(torch.cat([first, second]), dim=-1), slots(both)
        positive = (views * views.roll(first.shape[0], 0)).sum(-1)
        with torch.no_grad():
            exponent = (views / self.tau) @ views.T
            own = same_group(slot, torch.arange(len(both), device=both.device), views.dtype)
            exponent.add_(own, alpha=-torch.finfo(views.dtype).max)
            log_sum, share = logsumexp(exponent)
            count = len(both) - group_sum(torch.ones_like(log_sum), slot)
            log_g = log_sum - count.clamp(min=1).log()
            fraction = effective_fraction(share, count)
        log_g = with_similarity_gradient(views, log_g, share.div_(self.tau))
        return positive, log_g, fraction, count > 0

    def _loss(self, positive: Tensor, log_u: Tensor, anchors: Tensor) -> Tensor:
        if self.log_eps > -math.inf:
            log_u = torch.logaddexp(log_u, torch.full_like(log_u, self.log_eps))
        return masked_mean(self.tau * log_u - positive, anchors)
