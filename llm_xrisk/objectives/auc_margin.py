"""AUC as a minimax problem (section 6.4.1)."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from llm_xrisk.fcco.groups import readable
from llm_xrisk.fcco.keyed import kept
from llm_xrisk.fcco.schedules import GammaSchedule, constant
from llm_xrisk.objectives.base import Objective, ObjectiveOutput
from llm_xrisk.objectives.reductions import masked_mean, widened
from llm_xrisk.objectives.surrogates import SQUARED_HINGE, Squared, SquaredHinge


class AUCMargin(Objective):
    r"""AUC, PDMA and PDAdam: ranks positives above negatives, by means of classes, not by pairs.

    .. math:: \min_{w, a, b} \max_{\alpha \ge 0} \; E_{+} (h_i - a)^2 + E_{-} (h_j - b)^2
              + \alpha (m + E_{-} h_j - E_{+} h_i) - \tfrac{\alpha^2}{4} \qquad (6.21)

    E_+ and E_- are the means over positives and negatives. a and b are parameters of this module,
    which the optimizer of the model trains too: with momentum that is PDMA, with Adam PDAdam.
    alpha is a dual with its own projected ascent, Algorithm 27, line 4, taken in every forward of
    a training step:

    .. math:: \alpha \leftarrow [(1 - \gamma) \alpha + 2 \gamma (m + E_{-} h_j - E_{+} h_i)]_+

    The gradient is line 5's, at the alpha found; the loss is (6.21), which can be negative away
    from the saddle. The metric ``saddle`` is what to watch: the value with a, b and alpha solved
    for, Var_+ + Var_- + [m + E_- h - E_+ h]_+^2. It is :meth:`exact`, and the loss in ``eval()``.

    Args:
        gamma: Weight of the new mini-batch value in alpha, in (0, 1], or a schedule of the epoch;
            Algorithm 27's step tau_t is 2 gamma. 0.2 in the authors' recipes, tuned there.
        surrogate: f of (6.20) and its margin m: ``SquaredHinge`` keeps alpha >= 0, ``Squared``
            leaves it free.
        num_labels: L for several labels at once, each with its own a, b, alpha: the objective is
            the mean over the labels.
        initial: a_1, b_1 and alpha_1. By default the first batch of a label that holds both of
            its classes sets them to its own saddle.
        state_dtype: dtype of a, b and alpha, whatever ``.to()`` says.

    Shapes:
        scores (B,) or (B, L), targets the same, 1 or 0 (or 1 and -1, or booleans). No index.

    State: for each label the parameters a and b, alpha and whether they have started, 13 bytes.
    Give the parameters to the optimizer, without weight decay. A label without both classes in the
    batch is left out: no loss, no step of alpha, gradients of 0.

    Departures: the book leaves the starting point open and the authors' library starts at 0, where
    the first steps pull all scores to 0. Their step of alpha has b - a for the means of the batch
    and half of alpha for alpha. The pull of PESG is :class:`llm_xrisk.optim.ProximalPull`.

    Raises:
        ValueError: gamma outside (0, 1], num_labels < 1, or shapes that do not fit.

    Example:
        >>> objective = AUCMargin()
        >>> scores, targets = torch.tensor([1.0, 0.5, 0.0]), torch.tensor([1, 0, 0])
        >>> objective(scores, targets).loss                 # 0 + 0.25^2 + [1 + 0.25 - 1]^2
        tensor(0.1250, grad_fn=<DivBackward0>)

    Relations: with ``Squared`` the saddle is the mean over pairs of (m + h_j - h_i)^2, exactly;
    with ``SquaredHinge`` it does not push apart classes whose means are m apart.

    Source: book section 6.4.1, (6.20), (6.21), Algorithm 27; Guo et al. 2021, Yuan et al. 2021.
    """

    alpha: Tensor
    started: Tensor
    gamma: Tensor

    def __init__(
        self,
        *,
        gamma: float | GammaSchedule = 0.2,
        surrogate: SquaredHinge | Squared = SQUARED_HINGE,
        num_labels: int | None = None,
        initial: tuple[float, float, float] | None = None,
        state_dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        if num_labels is not None and num_labels < 1:
            raise ValueError(f"num_labels must be at least 1, got {num_labels}: targets' columns")
        self.surrogate, self.num_labels = surrogate, num_labels
        self.lowest = 0.0 if isinstance(surrogate, SquaredHinge) else -math.inf
        count = 1 if num_labels is None else num_labels
        a, b, alpha = (torch.full((count,), v, dtype=state_dtype) for v in initial or (0.0,) * 3)
        self.a, self.b = nn.Parameter(a), nn.Parameter(b)
        self.register_buffer("alpha", alpha)
        self.register_buffer("started", torch.full((count,), initial is not None))
        self.schedule = gamma if callable(gamma) else constant(gamma)
        # a tensor: compiled code would be compiled anew for each number
        self.register_buffer("gamma", torch.tensor(1.0, dtype=state_dtype), persistent=False)
        self.set_epoch(0.0)

    def set_epoch(self, epoch: float) -> None:
        """Set gamma to its schedule's value at ``epoch``."""
        gamma = self.schedule(epoch)
        if not 0 < gamma <= 1:
            raise ValueError(
                f"gamma must be in (0, 1], got {gamma}; Algorithm 27's step tau is 2 gamma"
            )
        self.gamma.fill_(gamma)

    def stats(self, metrics: Mapping[str, Tensor] | None = None) -> dict[str, float]:
        """How the objective is doing, read on the host: means over the labels, and ``metrics``."""
        held = {"a": self.a, "b": self.b, "alpha": self.alpha, "started": self.started}
        own = {name: float(value.detach().float().mean()) for name, value in held.items()}
        return own | {name: float(value) for name, value in (metrics or {}).items()}

    def forward(
        self, scores: Tensor, targets: Tensor, *, index: Tensor | None = None
    ) -> ObjectiveOutput:
        """Return the objective of the joined rows; see the class."""
        scores, targets, _ = self.joined(scores, targets, index)
        classes = _Classes(scores, targets)
        saddle = classes.variance + self.surrogate(classes.gap)
        if self.training:
            self._start(classes)
        loss = classes.mean(self._ascend(classes) if self.training else saddle)
        with torch.no_grad():
            observed = classes.both.sum()
            metrics = {
                "objective": loss.detach(),
                "saddle": classes.mean(saddle),
                "difference": -classes.mean(classes.gap) / (observed > 0),  # NaN without a pair
                "alpha": self.alpha.mean(),
                "skipped": 1 - observed / len(self.alpha),
            }
        return ObjectiveOutput(loss, metrics)

    def exact(self, scores: Tensor, targets: Tensor) -> Tensor:
        """(6.21) of the given rows with a, b and alpha solved for, without state."""
        self.check_shapes(scores=scores, targets=targets)
        classes = _Classes(widened(scores), targets)
        return classes.mean(classes.variance + self.surrogate(classes.gap))

    @torch.no_grad()
    def _start(self, classes: "_Classes") -> None:
        """Put a, b and alpha of the labels that have not started at the saddle of the batch."""
        if readable(self.started) and bool(self.started.all()):
            return
        first = classes.both & ~self.started & classes.gap.isfinite()
        alpha = (2 * (self.surrogate.margin + classes.gap)).clamp(self.lowest)
        found = ((self.a, classes.positive_mean), (self.b, classes.negative_mean))
        for state, value in (*found, (self.alpha, alpha)):
            state.copy_(torch.where(first, value.to(state.dtype), state))
        self.started |= first

    def _ascend(self, classes: "_Classes") -> Tensor:
        """(6.21) of each label at its alpha_t, (L,), and the step to alpha_{t+1}."""
        alpha, rise = kept(self.alpha.clone()), self.surrogate.margin + classes.gap
        with torch.no_grad():  # line 4
            new = torch.lerp(alpha, 2 * rise.to(alpha.dtype), self.gamma).clamp(self.lowest)
            self.alpha.copy_(torch.where(classes.both & new.isfinite(), new, alpha))
        # the mean of (h - a)^2 is the variance of h and the square of what its mean lacks to a
        to_a, to_b = classes.positive_mean - self.a, classes.negative_mean - self.b
        return classes.variance + to_a * to_a + to_b * to_b + alpha * (rise - alpha / 4)


class _Classes:
    """Scores of each label, (B, L), by class: means, and the sum of both variances, all (L,)."""

    def __init__(self, scores: Tensor, targets: Tensor) -> None:
        scores, targets = (t if t.dim() == 2 else t[:, None] for t in (scores, targets))
        is_positive = targets > 0.5
        positive = is_positive.to(scores.dtype)
        count, rows = positive.sum(0), len(scores)
        self.both = (count > 0) & (count < rows)
        positive = positive / count.clamp(min=1)
        negative = (~is_positive) / (rows - count).clamp(min=1)
        self.positive_mean = (positive * scores).sum(0)
        self.negative_mean = (negative * scores).sum(0)
        self.gap = self.negative_mean - self.positive_mean
        # around a mean that is held fixed the variance has the same gradient
        means = (self.positive_mean.detach(), self.negative_mean.detach())
        distance = scores - torch.where(is_positive, *means)
        self.variance = ((positive + negative) * distance * distance).sum(0)

    def mean(self, values: Tensor) -> Tensor:
        """Mean of ``values`` (L,) over the labels that have both classes, 0 if none has."""
        return masked_mean(values, self.both)
