"""Global contrastive learning of images and texts (sections 6.5.2, 6.5.3)."""

import math

import torch
from torch import Tensor

from llm_xrisk.fcco import InnerEstimator
from llm_xrisk.fcco.schedules import GammaSchedule
from llm_xrisk.objectives.base import ObjectiveOutput
from llm_xrisk.objectives.reductions import masked_mean, widened
from llm_xrisk.objectives.similarities import (
    Contrast,
    ContrastiveObjective,
    contrast_pairs,
    normalised,
)
from llm_xrisk.objectives.temperatures import Temperature, as_temperature


class GlobalCLIP(ContrastiveObjective):
    r"""Global contrastive loss of images and texts, FastCLIP: contrasts with all data at any B.

    .. math:: F(w) = \frac1n \sum_i \Big\{ \tau_{i,1} \log \Big( \frac{1}{|T_i^-|}
              \sum_{t \in T_i^-} \exp\frac{s(x_i, t) - s(x_i, t_i)}{\tau_{i,1}} \Big)
              + \tau_{i,1} \rho + \tau_{i,2} \log \Big( \frac{1}{|I_i^-|} \sum_{x \in I_i^-}
              \exp\frac{s(x, t_i) - s(x_i, t_i)}{\tau_{i,2}} \Big) + \tau_{i,2} \rho \Big\}
              \qquad (6.48)

    A pair has two inner values g, the mean of exp(l / tau) over the other texts and over the other
    images, and the outer function f = tau log(eps + .) + tau rho for each, tracked as log u in the
    form of (6.14). The gradient in w has the weights exp(l / tau) / (eps + u), as Algorithm 35,
    line 9; that in a learned tau is line 7, log(eps + u) + rho - mean_j p_j l_j / tau. The loss
    is the objective's value at u and tau.

    The temperature makes the version: a number, FastCLIP-v1; ``IndividualTemperature`` for images
    and another for texts, v2, (6.48); one ``GlobalTemperature``, v3, (6.49) with tau_1 = tau_2; a
    network, (6.50).

    Args:
        num_samples: n, the number of pairs.
        gamma: Weight of the new mini-batch value in (0, 1], or a schedule: the authors go from 1
            down to 0.2 (``cosine``) within half of the epochs, to 0.8 for 315 million pairs.
        tau: Temperature > 0, or a module.
        text_tau: The texts' temperature, by default the images'; one ``IndividualTemperature``
            for both is one tau for each pair.
        eps: Added to u inside the logarithm, >= 0; 1e-14, and 1e-6 for 315 million pairs.
        state_dtype: dtype of the state.

    Shapes:
        scores (B, d) features of the images, targets (B, d) of the texts, index (B,). Features
        are scaled to length 1 here.

    State: two log u per pair, 9 bytes, and the temperature's.

    Departures: the two sides are added, as in the book; the authors' code has their mean, half of
    it. (6.49) has a tau for each side, RGCL-g and the default here one for both. The authors'
    gradient of a global tau counts the mean of p l / tau twice; this is the exact one at the
    exact u. u keeps the scale of the tau it was averaged at: begun 9 times too small, a tau
    stayed there with gamma = 0.03 from the start, and came out right with the schedule. Rows of
    one sample are never each other's negatives.

    Raises:
        ValueError: gamma outside (0, 1], tau <= 0, eps < 0, or a missing index.

    Example:
        >>> objective = GlobalCLIP(num_samples=2, tau=0.5)
        >>> images = texts = torch.eye(2)                   # every l is -1
        >>> objective(images, texts, index=torch.tensor([0, 1])).loss  # 2 (0.5 log exp(-2))
        tensor(-2.)

    Relations: gamma=1 is the mini-batch loss, :class:`CLIPLoss` but for the positive in its
    denominator and the factor tau; :class:`RobustGlobalContrastive` is the same for two views.

    Source: book sections 6.5.2 and 6.5.3, (6.48)-(6.50); Wei et al., 2024 (FastCLIP).
    """

    def __init__(
        self,
        num_samples: int,
        gamma: float | GammaSchedule = 0.8,
        tau: float | Temperature = 0.03,
        *,
        text_tau: float | Temperature | None = None,
        eps: float = 0.0,
        state_dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        if eps < 0:
            raise ValueError(f"eps must be >= 0, got {eps}; the authors use 1e-14 to 1e-6")
        self.log_eps = math.log(eps) if eps else -math.inf
        self.num_samples = num_samples
        self.image_tau = as_temperature(tau)
        self.text_tau = self.image_tau if text_tau is None else as_temperature(text_tau)
        self.inner = InnerEstimator(
            num_samples, gamma, shape=(2,), log=True, state_dtype=state_dtype
        )

    def forward(
        self, scores: Tensor, targets: Tensor, *, index: Tensor | None = None
    ) -> ObjectiveOutput:
        """Return the objective of the joined pairs; see the class."""
        first, second, ids = self.joined(scores, targets, index)
        tau, pairs = self._pairs(first, second, ids)
        log_u = self.inner(pairs.log_g, ids, where=pairs.anchors)
        loss = self._loss(log_u, tau, pairs.anchors)
        self._step(pairs, log_u, ids)
        return ObjectiveOutput(loss, pairs.metrics(loss, tau, log_u))

    def exact(self, scores: Tensor, targets: Tensor, *, index: Tensor) -> Tensor:
        """(6.48) of the given pairs at the present tau, without state."""
        self.check_shapes(scores=scores, targets=targets, index=index)
        tau, pairs = self._pairs(widened(scores), widened(targets), index)
        return self._loss(pairs.log_g, tau, pairs.anchors)

    def _pairs(self, first: Tensor, second: Tensor, ids: Tensor) -> tuple[Tensor, Contrast]:
        """Temperatures (B, 2) of the pairs, and what the negatives of each side amount to."""
        sides = ((self.image_tau, normalised(first)), (self.text_tau, normalised(second)))
        tau = torch.stack([module(side.detach(), ids) for module, side in sides], -1)
        learned = any(module.learned for module, _ in sides)
        pairs = contrast_pairs(sides[0][1], sides[1][1], ids, tau, learned=learned)
        return tau, pairs.relative(tau)

    def _loss(self, log_u: Tensor, tau: Tensor, anchors: Tensor) -> Tensor:
        image, text = (tau * self.plus_eps(log_u)).unbind(-1)
        image = image + tau[:, 0] * self.image_tau.rho
        return masked_mean(image + text + tau[:, 1] * self.text_tau.rho, anchors)

    def _step(self, pairs: Contrast, log_u: Tensor, ids: Tensor) -> None:
        """Move the temperatures that the objective steps itself."""
        modules = (self.image_tau, self.text_tau)
        if not any(module.keyed for module in modules):
            return
        z = pairs.temperature_gradient(self.plus_eps(log_u), 0.0).unbind(-1)
        z = [side + module.rho for side, module in zip(z, modules, strict=True)]
        if self.image_tau is self.text_tau:
            self.image_tau.step(z[0] + z[1], ids, pairs.anchors)
            return
        for module, side in zip(modules, z, strict=True):
            module.step(side, ids, pairs.anchors)
