"""Mini-batch contrastive losses, the baselines of the global ones (section 6.5.1)."""

import torch
import torch.nn.functional as F
from torch import Tensor

from llm_xrisk.objectives.base import ObjectiveOutput, require_index
from llm_xrisk.objectives.reductions import masked_mean, widened
from llm_xrisk.objectives.similarities import (
    Contrast,
    ContrastiveObjective,
    contrast_pairs,
    contrast_views,
    normalised,
)
from llm_xrisk.objectives.temperatures import Temperature, as_temperature


class MinibatchContrastive(ContrastiveObjective):
    """What the two mini-batch losses share: no state, the temperature, the cross-entropy."""

    def __init__(self, tau: float | Temperature) -> None:
        super().__init__()
        self.temperature = as_temperature(tau)
        if self.temperature.keyed:
            raise ValueError(
                f"{type(self).__name__} keeps nothing for samples, got a temperature for each; "
                "pass a number or a GlobalTemperature, or take a global contrastive objective"
            )

    def forward(
        self, scores: Tensor, targets: Tensor, *, index: Tensor | None = None
    ) -> ObjectiveOutput:
        """Return the loss of the joined rows; see the class."""
        ids = None if index is None else require_index(self, index)
        first, second, ids = self.joined(scores, targets, ids)
        own = torch.arange(len(first), device=first.device) if ids is None else ids
        self.temperature.begin(torch.cat([second, first]), torch.cat([own, own]))
        loss, tau, rows = self._loss(first, second, ids)
        return ObjectiveOutput(loss, rows.metrics(loss, tau))

    def exact(self, scores: Tensor, targets: Tensor, *, index: Tensor | None = None) -> Tensor:
        """The loss of the given rows as one mini-batch."""
        self.check_shapes(scores=scores, targets=targets, index=index)
        return self._loss(widened(scores), widened(targets), index)[0]

    def _loss(
        self, first: Tensor, second: Tensor, ids: Tensor | None
    ) -> tuple[Tensor, Tensor, Contrast]:
        raise TypeError(f"{type(self).__name__} does not define _loss")


class InfoNCE(MinibatchContrastive):
    r"""InfoNCE of two views, SimCLR: picks each view's positive out of the mini-batch.

    .. math:: L_B = \frac{1}{2B} \sum_i -\log \frac{\exp(h_i^\top h_i^+ / \tau)}{
              \exp(h_i^\top h_i^+ / \tau) + \sum_{x_j \in B_i^-} \exp(h_i^\top h_j / \tau)}
              \qquad (6.38)

    Both views of a sample are anchors; the negatives of both are the 2 (B - 1) views of the other
    samples of the mini-batch. There is no inner function to track; the gradient is that of the
    loss, the estimator BSGD of the global objective, whose bias falls with B alone.

    Args:
        tau: Temperature > 0, or a module such as a :class:`GlobalTemperature` with rho = 0; 0.1
            to 0.5 in the author's recipes.

    Shapes:
        scores (B, d) features of the first views, targets (B, d) of the second, index (B,) if
        rows of one sample can meet in a batch. Features are scaled to length 1 here.

    State: none.

    Departures: rows of one sample are never each other's negatives.

    Raises:
        ValueError: tau <= 0, or a temperature for each sample.

    Example:
        >>> objective = InfoNCE(tau=0.5)
        >>> first = second = torch.eye(2)
        >>> objective(first, second).loss                   # log(1 + 2 exp(-2))
        tensor(0.2395)

    Relations: :class:`GlobalContrastive` is tau times this without the positive in the
    denominator and with the mean over all data in place of the sum over the batch.

    Source: book section 6.5.1; Chen et al., ICML 2020.
    """

    def __init__(self, tau: float | Temperature = 0.1) -> None:
        super().__init__(tau)

    def _loss(
        self, first: Tensor, second: Tensor, ids: Tensor | None
    ) -> tuple[Tensor, Tensor, Contrast]:
        own = torch.arange(len(first), device=first.device) if ids is None else ids
        views, both = normalised(torch.cat([first, second])), torch.cat([own, own])
        tau = self.temperature(views.detach(), both)
        rows = contrast_views(views, both, tau, learned=self.temperature.learned).relative(tau)
        # -log(1 / (1 + m g)) with m negatives and g their mean exp(l / tau)
        loss = F.softplus(rows.log_g + rows.count.clamp(min=1).log())
        return masked_mean(loss, rows.anchors), tau, rows


class CLIPLoss(MinibatchContrastive):
    r"""InfoNCE between images and texts, CLIP: picks each one's partner out of the mini-batch.

    .. math:: L_B = \frac1B \sum_i \Big\{ -\log \frac{\exp(s_{ii} / \tau)}{
              \sum_{t_j \in B} \exp(s_{ij} / \tau)} - \log \frac{\exp(s_{ii} / \tau)}{
              \sum_{x_j \in B} \exp(s_{ji} / \tau)} \Big\} \qquad (6.39), (6.40)

    with s_ij = h_1(x_i)^T h_2(t_j). There is no inner function to track; the gradient is that of
    the loss, in the features and, where it is learned, in tau.

    Args:
        tau: Temperature > 0, or a module: CLIP learns it, ``GlobalTemperature(0.07, rho=0.0)``.

    Shapes:
        scores (B, d) features of the images, targets (B, d) of the texts, index (B,) if rows of
        one sample can meet in a batch. Features are scaled to length 1 here.

    State: none, or the temperature's parameter.

    Departures: the two losses are added, as in the book; OpenCLIP and others take their mean,
    which is half. Rows of one sample are never each other's negatives.

    Raises:
        ValueError: tau <= 0, or a temperature for each sample.

    Example:
        >>> objective = CLIPLoss(tau=0.5)
        >>> images = texts = torch.eye(2)
        >>> objective(images, texts).loss                   # 2 log(1 + exp(-2))
        tensor(0.2539)

    Relations: :class:`GlobalCLIP` contrasts with the texts and images of all data.

    Source: book section 6.5.1; Radford et al., ICML 2021.
    """

    def __init__(self, tau: float | Temperature = 0.07) -> None:
        super().__init__(tau)

    def _loss(
        self, first: Tensor, second: Tensor, ids: Tensor | None
    ) -> tuple[Tensor, Tensor, Contrast]:
        own = torch.arange(len(first), device=first.device) if ids is None else ids
        first, second = normalised(first), normalised(second)
        tau = torch.stack([self.temperature(side.detach(), own) for side in (first, second)], -1)
        rows = contrast_pairs(first, second, own, tau, learned=self.temperature.learned)
        rows = rows.relative(tau)
        loss = F.softplus(rows.log_g + rows.count.clamp(min=1).log()[:, None])
        return masked_mean(loss.sum(-1), rows.anchors), tau, rows
