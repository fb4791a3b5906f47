"""Classification into very many classes (section 6.3)."""

import math
from functools import partial

import torch
from torch import Tensor

from llm_xrisk.fcco import InnerEstimator, join, scent
from llm_xrisk.fcco.groups import distinct, group_mean, readable, slots
from llm_xrisk.fcco.schedules import GammaSchedule
from llm_xrisk.objectives.base import Objective, ObjectiveOutput, require_index
from llm_xrisk.objectives.reductions import masked_mean, observed_max, observed_mean, widened

METHODS = ("scent", "sox", "bsgd", "asgd", "umax")
MAX_EXPONENT = 10.0  # of a weight taken at the old nu: finite in float16 too


class ExtremeClassification(Objective):
    r"""Cross-entropy over K classes, SCENT: trains on sampled classes without the batch's bias.

    .. math:: F(w) = \frac1n \sum_i \log g_i(w), \qquad
              g_i = \frac1K \sum_{k=1}^K \exp(s_{ik} - s_{iy_i}) \qquad
              \text{(section 6.3; } F = \text{cross-entropy} - \log K \text{)}
    .. math:: \hat g_i = \frac1K + \sum_{j \ne y_i} w_j \exp(s_{ij} - s_{iy_i})

    Inner value g_i, estimated by the second line from m sampled classes, of which the own class
    y_i is one; outer function log. The tracked nu_i = log u_i is line 6 of Algorithm 26 in closed
    form: a moving average of u_i of weight gamma_i = sigmoid(log alpha + nu_i). The gradient is
    line 8's, weights w_j exp(s_ij - s_iy - nu_i); the loss is the objective's value at nu. In the
    place of SCENT's step, ``method`` puts one of those it is compared with:

    * "sox": moving average of u_i of constant weight gamma;
    * "bsgd": nu_i = log of the mini-batch value, no state; biased however long it runs;
    * "asgd": nu_i - alpha (1 - g_i e^-nu_i), and the gradient at the *old* nu_i: unbiased, and
      unstable, since nothing bounds its weight g_i e^-nu_i; one step that meets a large g_i lifts
      nu_i so far that the sample has no gradient for very long;
    * "umax": the same, but nu_i is set to log g_i first where nu_i < log g_i - delta, which
      bounds the weight by e^delta, and keeps nu_i too high where log g_i varies by delta.

    Args:
        num_samples: n, the number of examples the index counts.
        num_classes: K >= 2.
        gamma: Weight of the new mini-batch value in (0, 1], for "sox" alone.
        method: "scent", "sox", "bsgd", "asgd" or "umax".
        log_alpha: Logarithm of the step size of nu, tuned with the learning rate. By default
            log K for "scent", so that gamma_i is the sigmoid of sample i's own cross-entropy, near
            1 until the fit is good; log K - c suits a cross-entropy of about c (the authors: 12
            for 360 thousand classes). By default log 0.1 for "asgd" and "umax".
        multiplier: m of gamma_i = sigmoid(log alpha + m nu_i), for "scent" alone.
        delta: Lag of nu_i at which "umax" resets it, >= 0.
        state_dtype: dtype of the state.

    Shapes:
        scores (B, m) logits of the sampled classes, targets (B,) the *column* of the own class,
        index (B,), weight (m,) or (B, m). ``weight`` is w_j: 1 / (K pi_j) for distinct classes
        sampled with probability pi_j, 0 to leave a column out; by default (1 - 1/K) / (m - 1),
        classes sampled uniformly, and exact for all K of them. The own column's is not used.
        :class:`llm_xrisk.models.class_gather.ClassGather` returns scores, targets and weight.

    State: one log u per sample, 5 bytes; none for "bsgd". Nothing has the size of K.

    Departures: the book takes a batch's own labels for uniform samples; they come by class
    frequency, and without ``weight`` a frequent class counts K pi_j times too much. It leaves
    y_i out of the mean; here it has its exact share 1/K, so that all classes give the
    cross-entropy. SOX is SCENT with alpha = gamma / (1 - gamma) e^-nu, not gamma e^-nu. nu is
    only kept as a logarithm, finite for any finite scores. The first visit of a sample stores
    its mini-batch value, for "asgd" and "umax" too; their weights end at e^10.

    Raises:
        ValueError: an unknown method, gamma outside (0, 1], num_classes < 2, delta < 0, shapes
            that do not fit, or a missing index.
        IndexError: targets that are not columns, as class numbers are not (checked on the CPU).

    Example:
        >>> objective = ExtremeClassification(num_samples=2, num_classes=3)
        >>> scores, own = torch.tensor([[2.0, 1.0, 0.0]]), torch.tensor([0])
        >>> objective(scores, own, index=torch.tensor([1])).loss  # log((1 + e^-1 + e^-2) / 3)
        tensor(-0.6910)

    Relations: gamma=1 is "bsgd", and on all classes F.cross_entropy - log K; "sox" keeps the same
    log u as :class:`GlobalContrastive` and :class:`DFT`. The last layer of a language model with
    sampled vocabulary is this with one sample per token.

    Source: book section 6.3, Algorithm 26; Wei et al., 2026; U-max: Fagan and Iyengar, 2018.
    """

    binary_targets = False

    def __init__(
        self,
        num_samples: int,
        num_classes: int,
        *,
        gamma: float | GammaSchedule = 0.1,
        method: str = "scent",
        log_alpha: float | None = None,
        multiplier: float = 1.0,
        delta: float = 1.0,
        state_dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        if method not in METHODS:
            raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
        if num_classes < 2 or delta < 0:
            raise ValueError(f"need num_classes >= 2 and delta >= 0, got {num_classes} and {delta}")
        if not callable(gamma) and not 0 < gamma <= 1:  # also where only "sox" would use it
            raise ValueError(f"gamma must be in (0, 1], got {gamma}; it weighs the new value")
        if num_samples < 1:
            raise ValueError(f"num_samples must be at least 1, got {num_samples}: pass len(data)")
        if log_alpha is None:
            log_alpha = math.log(num_classes if method == "scent" else 0.1)
        self.method, self.num_classes, self.log_alpha = method, num_classes, log_alpha
        self.delta = delta if method == "umax" else math.inf
        rule = None
        if method == "scent":
            rule = partial(scent, log_alpha=log_alpha, multiplier=multiplier)
        elif method != "sox":
            rule = partial(dual_step, alpha=math.exp(log_alpha), delta=self.delta)
        self.inner = None
        if method != "bsgd":
            self.num_samples = num_samples
            weight = gamma if method == "sox" else 1.0
            self.inner = InnerEstimator(
                num_samples, weight, log=True, rule=rule, state_dtype=state_dtype
            )

    def forward(
        self,
        scores: Tensor,
        targets: Tensor,
        *,
        index: Tensor | None = None,
        weight: Tensor | None = None,
    ) -> ObjectiveOutput:
        """Return the objective of the joined rows; see the class."""
        # a row needs no other row's classes: ranks join one number each and may sample their own
        check_columns(scores, targets, index, weight)
        log_g, usable = self._log_inner_values(scores, targets, weight)
        if self.inner is not None or index is not None:
            index = require_index(self, index)
        log_g, usable, ids = join(log_g, usable, index)
        log_u = self._tracked(log_g, ids, usable)
        loss = masked_mean(log_u, usable)
        with torch.no_grad():
            lag = (log_g - log_u).clamp(max=MAX_EXPONENT)
            metrics = {
                "objective": loss.detach(),
                "log_u/mean": observed_mean(log_u, usable),
                "log_u/max": observed_max(log_u, usable),
                "classes/weight": observed_mean(lag.exp(), usable),
                "skipped": (~usable.any()).to(log_g.dtype),
            }
        return ObjectiveOutput(loss, metrics)

    def exact(self, scores: Tensor, targets: Tensor, *, weight: Tensor | None = None) -> Tensor:
        """F at the given scores, without state: with those of all K classes, exactly F."""
        check_columns(scores, targets, None, weight)
        return masked_mean(*self._log_inner_values(scores, targets, weight))

    def _log_inner_values(
        self, scores: Tensor, targets: Tensor, weight: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Log g of each row (B,), and whether the row has a class to tell its own from."""
        scores, column = widened(scores), targets.long()[:, None]
        size = max(scores.shape[1] - 1, 1)
        given = scores.new_full((1,), (1 - 1 / self.num_classes) / size)
        log_weight = (given if weight is None else widened(weight)).log().expand(scores.shape)
        usable = (log_weight > -math.inf).scatter(1, column, False).any(-1)
        # R_ij, and a constant 0 for the own class: its gradient is the others' sum, not 1 - share
        shifted = (scores - scores.gather(1, column)).scatter(1, column, 0.0)
        exponent = shifted + log_weight.scatter(1, column, -math.log(self.num_classes))
        return exponent.logsumexp(-1), usable

    def _tracked(self, log_g: Tensor, ids: Tensor, usable: Tensor) -> Tensor:
        """Value of nu, with the gradient of the method."""
        if self.inner is None or not self.training:
            return log_g
        if self.method in ("scent", "sox"):
            return self.inner(log_g, ids, where=usable)
        fixed = log_g.detach()
        nu = torch.where(self.inner.visited[ids], self.inner.u[ids], fixed.to(self.inner.u.dtype))
        nu = torch.where(nu < fixed - self.delta, fixed, nu)
        # the rows of one sample take one step together, with their mean g
        observed = fixed
        if not distinct(ids):
            observed, _ = group_mean(fixed, slots(ids), usable, log=True)
        self.inner(observed, ids, where=usable)
        return nu + (fixed - nu).clamp(max=MAX_EXPONENT).exp() * (log_g - fixed)


def dual_step(log_u: Tensor, log_g: Tensor, gamma: Tensor, *, alpha: float, delta: float) -> Tensor:
    r"""ASGD, and U-max for a finite delta: a step on min over nu of g e^-nu + nu.

    .. math:: \nu \leftarrow \nu - \alpha (1 - g e^{-\nu}), \qquad
              \text{from } \nu = \log g \text{ where } \nu < \log g - \delta

    Example:
        >>> zero, double = torch.tensor(0.0), torch.tensor(2.0).log()
        >>> dual_step(zero, double, zero, alpha=0.5, delta=1.0)    # 0 - 0.5 (1 - 2)
        tensor(0.5000)
    """
    nu = torch.where(log_u < log_g - delta, log_g, log_u)
    return nu - alpha * (1 - (log_g - nu).clamp(max=MAX_EXPONENT).exp())


def check_columns(
    scores: Tensor, targets: Tensor, index: Tensor | None, weight: Tensor | None
) -> None:
    """Refuse shapes that do not fit, and on the CPU targets that are no columns of ``scores``."""
    given = {"scores": scores, "targets": targets, "index": index, "weight": weight}
    got = {name: tuple(tensor.shape) for name, tensor in given.items() if tensor is not None}
    row = tuple(scores.shape[:1])
    fits = {"targets": (row,), "index": (row,), "weight": (got["scores"], got["scores"][1:])}
    if scores.ndim != 2 or any(s not in fits[n] for n, s in got.items() if n != "scores"):
        shapes = ", ".join(f"{name} {shape}" for name, shape in got.items())
        raise ValueError(
            f"ExtremeClassification got {shapes} and needs scores (rows, m), targets (rows), index "
            "(rows), weight (m) or (rows, m); pass the logits of m classes, each row's own included"
        )
    if targets.is_floating_point() or targets.dtype == torch.bool:
        raise ValueError(f"targets must be integers, columns of scores; got {targets.dtype}")
    if readable(targets) and targets.numel():
        low, high = int(targets.min()), int(targets.max())
        if low < 0 or high >= scores.shape[1]:
            raise IndexError(
                f"target {low if low < 0 else high} is no column of scores {got['scores']}; "
                "pass the column of each row's own class, as ClassGather does, not its number"
            )
