"""Global contrastive learning of two views (section 6.5.2)."""

import math
from typing import ClassVar

import torch
from torch import Tensor

from llm_xrisk.fcco import InnerEstimator
from llm_xrisk.fcco.schedules import GammaSchedule
from llm_xrisk.objectives.base import ObjectiveOutput
from llm_xrisk.objectives.reductions import masked_mean, widened
from llm_xrisk.objectives.similarities import (
    Contrast,
    ContrastiveObjective,
    contrast_views,
    normalised,
)
from llm_xrisk.objectives.temperatures import Temperature, as_temperature


class GlobalContrastive(ContrastiveObjective):
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
        tau: Temperature > 0, or a module that does not learn; 0.1 in the authors' recipe.
        eps: Added to u inside the logarithm, Algorithm 34's epsilon >= 0.
        state_dtype: dtype of the state.

    Shapes:
        scores (B, d) features of the first views, targets (B, d) of the second, index (B,).
        Features are scaled to length 1 here.

    State: one log u per sample, 5 bytes.

    Departures: (6.43) drops the factor tau and the mean of (6.42); this is (6.42). Rows of one
    sample are never each other's negatives, also where the sample stands twice in a batch.

    Raises:
        ValueError: gamma outside (0, 1], tau <= 0 or one that learns, eps < 0, or a missing index.

    Example:
        >>> objective = GlobalContrastive(num_samples=2, tau=0.5)
        >>> first = second = torch.eye(2)                   # positives agree, negatives do not
        >>> objective(first, second, index=torch.tensor([0, 1])).loss  # -1 + 0.5 log exp(0)
        tensor(-1.)

    Relations: gamma=1 is the mini-batch (decoupled) InfoNCE; DFT and SOPA-s keep the same log u
    for other scores.

    Source: book section 6.5.2, Algorithm 34; Yuan et al., ICML 2022.
    """

    relative: ClassVar[bool] = (
        False  # whether u is of h_i^T h_j - h_i^T h_i^+ rather than h_i^T h_j
    )
    temperature: Temperature

    def __init__(
        self,
        num_samples: int,
        gamma: float | GammaSchedule = 0.9,
        tau: float | Temperature = 0.1,
        *,
        eps: float = 0.0,
        state_dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        if eps < 0 or (not isinstance(tau, Temperature) and tau <= 0):
            raise ValueError(f"need tau > 0 and eps >= 0, got tau={tau} and eps={eps}")
        self.log_eps = math.log(eps) if eps else -math.inf
        self.num_samples = num_samples
        self.temperature = as_temperature(tau)
        if self.temperature.learned:  # u of h_i^T h_j would be of another size at another tau
            kind = type(tau).__name__
            raise ValueError(
                f"{type(self).__name__} needs a tau that stays, got a {kind}; pass "
                f"RobustGlobalContrastive(num_samples, temperature={kind}(...))"
            )
        self.inner = InnerEstimator(num_samples, gamma, log=True, state_dtype=state_dtype)

    def forward(
        self, scores: Tensor, targets: Tensor, *, index: Tensor | None = None
    ) -> ObjectiveOutput:
        """Return the objective of the joined views; see the class."""
        first, second, ids = self.joined(scores, targets, index)
        both = torch.cat([ids, ids])
        self.temperature.begin(torch.cat([second, first]), both)
        tau, views = self._views(first, second, both)
        log_u = self.inner(views.log_g, both, where=views.anchors)
        loss = self._loss(views, log_u, tau)
        if self.temperature.keyed:
            z = views.temperature_gradient(self.plus_eps(log_u), self.temperature.rho)
            self.temperature.step(z, both, views.anchors)
        return ObjectiveOutput(loss, views.metrics(loss, tau, log_u))

    def exact(self, scores: Tensor, targets: Tensor, *, index: Tensor) -> Tensor:
        """(6.42) of the given views, without state."""
        self.check_shapes(scores=scores, targets=targets, index=index)
        both = torch.cat([index, index])
        tau, views = self._views(widened(scores), widened(targets), both)
        return self._loss(views, views.log_g, tau)

    def _views(self, first: Tensor, second: Tensor, both: Tensor) -> tuple[Tensor, Contrast]:
        """Temperature of the 2B views, and what their negatives amount to."""
        views = normalised(torch.cat([first, second]))
        tau = self.temperature(views.detach(), both)
        contrast = contrast_views(views, both, tau, learned=self.temperature.learned)
        return tau, contrast.relative(tau) if self.relative else contrast

    def _loss(self, views: Contrast, log_u: Tensor, tau: Tensor) -> Tensor:
        value = tau * (self.plus_eps(log_u) + self.temperature.rho)
        return masked_mean(value if self.relative else value - views.positive, views.anchors)
