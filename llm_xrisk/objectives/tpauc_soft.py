"""Two-way partial AUC with soft weights (section 6.4.3)."""

from typing import NamedTuple

import torch
from torch import Tensor

from llm_xrisk.fcco import InnerEstimator
from llm_xrisk.fcco.schedules import GammaSchedule
from llm_xrisk.objectives.base import Objective, ObjectiveOutput, later
from llm_xrisk.objectives.log_means import effective_fraction, logmeanexp
from llm_xrisk.objectives.opauc_soft import SoftMean
from llm_xrisk.objectives.pairs import Pairs
from llm_xrisk.objectives.reductions import masked_mean, observed_max, observed_mean, widened
from llm_xrisk.objectives.surrogates import SQUARED_HINGE, Surrogate


class TPAUCSoft(Objective):
    r"""Two-way partial AUC, SOTA-s: ranks the lowest positives above the highest negatives.

    .. math:: F(w) = \tau_1 \log \Big( \frac{1}{n_+} \sum_{x_i \in S_+} g_i^{\tau_2 / \tau_1}
              \Big), \qquad g_i = \frac{1}{n_-} \sum_{x_j \in S_-}
              \exp\frac{\ell(h_j - h_i)}{\tau_2} \qquad (6.33)

    Three levels: f_1 = tau_1 log of the mean v of f_2(g_i) = g_i^(tau_2 / tau_1). Both averages of
    Algorithm 32 are tracked as logarithms, log u_i of each positive (line 5) and one log v
    (line 8), which averages the u just found:

    .. math:: v \leftarrow (1 - \gamma_1) v + \gamma_1 \frac{1}{|B_+|} \sum_{x_i \in B_+}
              u_i^{\tau_2 / \tau_1}

    The gradient is line 10's, with weights exp(l_ij / tau_2) u_i^(tau_2 / tau_1 - 1) / v; the loss
    is tau_1 log v, the objective's value.

    Args:
        num_samples: n, the number of examples the index counts.
        gamma: gamma_0, the weight of the new mini-batch value in u, in (0, 1]; 0.9 and 0.5 in the
            authors' recipes.
        outer_gamma: gamma_1, that in v; the same as ``gamma`` by default.
        tau1: Temperature > 0 of the positives: the smaller, the fewer count; 1.0 in the recipes.
        tau2: Temperature > 0 of the negatives; 0.5 and 1.0 in the recipes.
        surrogate: l, non-decreasing.
        num_labels: L for several labels at once, each with its own v: F is the mean over labels.
        state_dtype: dtype of the state.

    Shapes:
        scores (B,) or (B, L), targets the same, 1 or 0 (or 1 and -1, or booleans), index (B,).

    State: one log u per sample and label, 5 bytes (positives alone use theirs), and one log v per
    label.

    Departures: u and v start at their first mini-batch value and are logarithms; the authors'
    library starts at 0, overflows from tau_2 = 0.04 down, and lets all labels share one v.

    Raises:
        ValueError: a gamma outside (0, 1], a temperature <= 0, or a missing index.

    Example:
        >>> objective = TPAUCSoft(num_samples=3)
        >>> scores, targets = torch.tensor([1.0, 0.0, 0.0]), torch.tensor([1, 0, 0])
        >>> objective(scores, targets, index=torch.tensor([0, 1, 2])).loss  # every l is 0
        tensor(0.)

    Relations: tau1 to infinity is :class:`OPAUCSoft`, tau1 = tau2 the KL-regularised DRO of all
    pairs (:class:`KLDRO`); gamma=1 is the mini-batch loss. :class:`TPAUC` selects by hard weights.

    Source: book section 6.4.3, Algorithm 32; Zhu et al., ICML 2022.
    """

    def __init__(
        self,
        num_samples: int,
        *,
        gamma: float | GammaSchedule = 0.9,
        outer_gamma: float | GammaSchedule | None = None,
        tau1: float = 1.0,
        tau2: float = 1.0,
        surrogate: Surrogate = SQUARED_HINGE,
        num_labels: int | None = None,
        state_dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        if tau1 <= 0 or tau2 <= 0:
            raise ValueError(f"tau1 and tau2 must be positive, got {tau1} and {tau2}")
        self.tau1, self.tau2, self.surrogate = tau1, tau2, surrogate
        self.num_samples, self.num_labels = num_samples, num_labels
        self.inner = InnerEstimator(
            num_samples, gamma, log=True, num_labels=num_labels, state_dtype=state_dtype
        )
        over = gamma if outer_gamma is None else outer_gamma
        self.outer = InnerEstimator(
            1, over, log=True, num_labels=num_labels, state_dtype=state_dtype
        )

    def forward(
        self, scores: Tensor, targets: Tensor, *, index: Tensor | None = None
    ) -> ObjectiveOutput:
        """Return the objective of the joined rows; see the class."""
        scores, targets, ids = self.joined(scores, targets, index)
        pairs = Pairs(scores, targets > 0.5)
        anchors = pairs.contrasted
        inner = SoftMean(pairs, self.surrogate, self.tau2)
        log_u = self.inner(inner.log_g, pairs.keys(self.keys(ids)), where=anchors)  # line 5
        over = self._over_positives(pairs, log_u)
        log_v = self.outer(over.log_mean, pairs.labels(), over.observed)  # line 8
        loss = self._loss(inner, log_u, log_v, over)

        def metrics() -> dict[str, Tensor]:
            return {
                "objective": loss.detach(),
                "log_u/mean": observed_mean(log_u, anchors),
                "log_u/max": observed_max(log_u, anchors),
                "log_v/mean": observed_mean(log_v, over.observed),
                "negatives/effective_fraction": observed_mean(inner.fraction(), anchors),
                "positives/effective_fraction": observed_mean(over.effective(), over.observed),
                "skipped": pairs.skipped(anchors),
            }

        return ObjectiveOutput(loss, later(metrics))

    def exact(self, scores: Tensor, targets: Tensor) -> Tensor:
        """(6.33) of the given rows, without state."""
        self.check_shapes(scores=scores, targets=targets)
        pairs = Pairs(widened(scores), targets > 0.5)
        inner = SoftMean(pairs, self.surrogate, self.tau2)
        over = self._over_positives(pairs, inner.log_g)
        return self._loss(inner, inner.log_g, over.log_mean, over)

    def _loss(self, inner: SoftMean, log_u: Tensor, log_v: Tensor, over: "_Positives") -> Tensor:
        """(6.33) at log v, with the gradient of line 10 in one step from the pairs."""
        lag = torch.exp(over.log_mean - log_v)  # of v in its mini-batch value
        if over.observed is None:
            pull, count = lag, lag.numel()
        else:
            known = over.observed.to(lag.dtype)
            pull, count = lag * known, known.sum().clamp(min=1)
        weight = (pull @ over.share).mul_(self.tau2 / count)
        return inner.weighted(self.tau1 * masked_mean(log_v, over.observed), log_u, weight)

    def _over_positives(self, pairs: Pairs, log_u: Tensor) -> "_Positives":
        own, ratio = pairs.by_label(pairs.contrasted), self.tau2 / self.tau1
        if len(log_u) == 0:  # no positive at all, which only a CPU knows
            nothing = log_u.new_zeros(pairs.num_labels)
            return _Positives(nothing, log_u.new_zeros(len(nothing), 0), nothing > 0, 0)
        if own is None:
            count, observed, rows = len(log_u), None, log_u.unsqueeze(0)
        else:
            count, rows = own.sum(-1), own * log_u
            observed = count > 0
        value, share = logmeanexp(rows, own, 1 / ratio)
        return _Positives(value, share, observed, count)


class _Positives(NamedTuple):
    """Of each label: log of the mean of u^(tau2 / tau1), shares (L, A) in it, whether there is one.

    ``observed`` is None where every label has one.
    """

    log_mean: Tensor
    share: Tensor
    observed: Tensor | None
    size: Tensor | int

    def effective(self) -> Tensor:
        """(L,) effective number of positives, as a fraction of theirs."""
        return effective_fraction(self.share, self.size)
