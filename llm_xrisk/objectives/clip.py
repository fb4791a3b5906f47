"""Global contrastive learning of images and texts (sections 6.5.2, 6.5.3 and 6.9)."""

import math
from collections.abc import Sequence

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
    and another for texts, v2, (6.48); one ``GlobalTemperature``, v3, (6.49) with tau_1 = tau_2;
    ``TemperatureNetwork`` for images and another for texts, CLIP-TempNet, (6.50).

    With ``use_reference`` it is DRRho-CLIP: from each difference of similarities that of a
    reference model is taken away at the same tau, and negatives that the reference tells apart
    better than the model weigh more:

    .. math:: \ell_1(w; x_i, t_i, t) - \ell_1(w_{ref}; x_i, t_i, t), \quad
              \ell_1(w; x_i, t_i, t) = s(w; x_i, t) - s(w; x_i, t_i) \qquad (6.121)

    and likewise for texts. The reference's features are constants, of any width: compute them
    once for all data and pass those of the batch's ids, ``ref_scores=images[index]``. A reference
    that is the model weighs all negatives alike, one with features 0 changes nothing.

    Args:
        num_samples: n, the number of pairs.
        gamma: Weight of the new mini-batch value in (0, 1], or a schedule: the authors go from 1
            down to 0.2 (``cosine``) within half of the epochs, to 0.8 for 315 million pairs.
        tau: Temperature > 0, or a module.
        text_tau: The texts' temperature, by default the images'; one ``IndividualTemperature``
            for both is one tau for each pair.
        eps: Added to u inside the logarithm, >= 0; 1e-14, and 1e-6 for 315 million pairs.
        use_reference: Whether batches bring a reference model's features. DRRho-CLIP's recipe for
            192 million pairs and 7 epochs: tau=0.01 (rho 11 where it is learned), eps=1e-4,
            gamma=1; for more epochs a cosine down to min(1, 4.177 epochs^-0.7265).
        state_dtype: dtype of the state.

    Shapes:
        scores (B, d) features of the images, targets (B, d) of the texts, index (B,), with a
        reference ref_scores (B, d_ref) and ref_targets (B, d_ref). Features are scaled to length
        1 here. In ``eval()`` and ``exact`` the reference's may be left out, for (6.48).

    State: two log u per pair, 9 bytes, and the temperature's.

    Departures: the two sides are added, as in the book; the authors' code has their mean, half of
    it. (6.49) has a tau for each side, RGCL-g and the default here one for both. The authors'
    gradient of a global tau counts the mean of p l / tau twice; this is the exact one at the
    exact u. u keeps the scale of the tau it was averaged at: begun 9 times too small, a tau
    stayed there with gamma = 0.03 from the start, and came out right with the schedule. Rows of
    one sample are never each other's negatives.

    Raises:
        ValueError: gamma outside (0, 1], tau <= 0, eps < 0, a missing index, or a reference's
            features that are missing or not asked for.

    Example:
        >>> objective = GlobalCLIP(num_samples=2, tau=0.5)
        >>> images = texts = torch.eye(2)                   # every l is -1
        >>> index = torch.tensor([0, 1])
        >>> objective(images, texts, index=index).loss      # 2 (0.5 log exp(-2))
        tensor(-2.)
        >>> objective = GlobalCLIP(num_samples=2, tau=0.5, use_reference=True)
        >>> known = torch.ones(2, 3)                        # one that cannot tell: l - 0
        >>> objective(images, texts, index=index, ref_scores=known, ref_targets=known).loss
        tensor(-2.)

    Relations: gamma=1 is the mini-batch loss, :class:`CLIPLoss` but for the positive in its
    denominator and the factor tau; :class:`RobustGlobalContrastive` is the same for two views.

    Source: book sections 6.5.2, 6.5.3 and 6.9, (6.48)-(6.50), (6.121); Wei et al., 2024
    (FastCLIP); Wei et al., 2025 (DRRho-CLIP).
    """

    def __init__(
        self,
        num_samples: int,
        gamma: float | GammaSchedule = 0.8,
        tau: float | Temperature = 0.03,
        *,
        text_tau: float | Temperature | None = None,
        eps: float = 0.0,
        use_reference: bool = False,
        state_dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        if eps < 0:
            raise ValueError(f"eps must be >= 0, got {eps}; the authors use 1e-14 to 1e-6")
        self.log_eps = math.log(eps) if eps else -math.inf
        self.num_samples, self.use_reference = num_samples, use_reference
        self.image_tau = as_temperature(tau)
        self.text_tau = self.image_tau if text_tau is None else as_temperature(text_tau)
        self.inner = InnerEstimator(
            num_samples, gamma, shape=(2,), log=True, state_dtype=state_dtype
        )

    def forward(
        self,
        scores: Tensor,
        targets: Tensor,
        *,
        index: Tensor | None = None,
        ref_scores: Tensor | None = None,
        ref_targets: Tensor | None = None,
    ) -> ObjectiveOutput:
        """Return the objective of the joined pairs; see the class."""
        reference = self._reference(ref_scores, ref_targets, needed=self.training)
        first, second, ids, *known = self.joined(scores, targets, index, **reference)
        self.image_tau.begin(second, ids)
        if self.text_tau is not self.image_tau:
            self.text_tau.begin(first, ids)
        tau, pairs = self._pairs(first, second, ids, known)
        log_u = self.inner(pairs.log_g, ids, where=pairs.anchors)
        loss = self._loss(log_u, tau, pairs.anchors)
        self._step(pairs, log_u, ids)
        return ObjectiveOutput(loss, pairs.metrics(loss, tau, log_u))

    def exact(
        self,
        scores: Tensor,
        targets: Tensor,
        *,
        index: Tensor,
        ref_scores: Tensor | None = None,
        ref_targets: Tensor | None = None,
    ) -> Tensor:
        """(6.48), or (6.121), of the given pairs at the present tau, without state."""
        reference = self._reference(ref_scores, ref_targets, needed=False)
        self.check_shapes(scores=scores, targets=targets, index=index, **reference)
        known = list(reference.values())
        tau, pairs = self._pairs(widened(scores), widened(targets), index, known)
        return self._loss(pairs.log_g, tau, pairs.anchors)

    def _reference(
        self, ref_scores: Tensor | None, ref_targets: Tensor | None, *, needed: bool
    ) -> dict[str, Tensor]:
        """The reference's features by name, without gradient; both of them or none."""
        rows = {"ref_scores": ref_scores, "ref_targets": ref_targets}
        given = {name: side.detach() for name, side in rows.items() if side is not None}
        if given and not self.use_reference:
            raise ValueError(
                "GlobalCLIP got a reference model's features and was built to do without; build it "
                "with use_reference=True, or leave ref_scores and ref_targets out"
            )
        if self.use_reference and len(given) < 2 and (needed or given):
            raise ValueError(
                "GlobalCLIP with use_reference=True needs ref_scores and ref_targets, got "
                f"{' and '.join(given) or 'neither'}; compute the reference model's features of "
                "both sides once and pass those of the batch's ids"
            )
        return given

    def _pairs(
        self, first: Tensor, second: Tensor, ids: Tensor, known: Sequence[Tensor]
    ) -> tuple[Tensor, Contrast]:
        """Temperatures (B, 2) of the pairs, and what the negatives of each side amount to."""
        sides = ((self.image_tau, normalised(first)), (self.text_tau, normalised(second)))
        fixed = [normalised(side.to(first.dtype)) for side in known]
        reference = (fixed[0], fixed[1]) if fixed else None
        tau = torch.stack([module(side.detach(), ids) for module, side in sides], -1)
        learned = any(module.learned for module, _ in sides)
        pairs = contrast_pairs(
            sides[0][1], sides[1][1], ids, tau, learned=learned, reference=reference
        )
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
