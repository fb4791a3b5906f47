"""One-way partial AUC with soft weights (section 6.4.3)."""

import torch
from torch import Tensor

from llm_xrisk.fcco import InnerEstimator
from llm_xrisk.fcco.schedules import GammaSchedule
from llm_xrisk.objectives.base import Objective, ObjectiveOutput, later
from llm_xrisk.objectives.log_means import effective_fraction, logmeanexp
from llm_xrisk.objectives.pairs import Pairs
from llm_xrisk.objectives.reductions import observed_max, observed_mean, widened
from llm_xrisk.objectives.surrogates import SQUARED_HINGE, Surrogate


class OPAUCSoft(Objective):
    r"""One-way partial AUC, SOPA-s: ranks positives above the hardest negatives.

    .. math:: F(w) = \frac{1}{n_+} \sum_{x_i \in S_+} \tau \log \Big( \frac{1}{n_-}
              \sum_{x_j \in S_-} \exp\frac{\ell(h_j - h_i)}{\tau} \Big) \qquad (6.28)

    Inner value g_i = mean_j exp(l_ij / tau) over the negatives, outer function f = tau log,
    tracked as log u_i in the form of (6.14). The gradient is Algorithm 30, line 9, with weights
    exp(l_ij / tau) / u_i; the loss is the objective's value at u.

    Args:
        num_samples: n, the number of examples the index counts.
        gamma: Weight of the new mini-batch value in (0, 1]; 0.9 and 0.1 in the authors' recipes.
        tau: Temperature > 0: the smaller, the fewer negatives count; 1.0 in the recipes.
        surrogate: l, non-decreasing.
        num_labels: L for several labels at once: F is the mean over labels of (6.28).
        state_dtype: dtype of the state.

    Shapes:
        scores (B,) or (B, L), targets the same, 1 or 0 (or 1 and -1, or booleans), index (B,).

    State: one log u per sample and label, 5 bytes; positives alone use theirs.

    Departures: the first visit of a sample stores its mini-batch value and the state is a
    logarithm; the authors' library starts at 0 and overflows from tau = 0.04 down.

    Raises:
        ValueError: gamma outside (0, 1], tau <= 0, or a missing index.

    Example:
        >>> objective = OPAUCSoft(num_samples=3, tau=1.0)
        >>> scores, targets = torch.tensor([1.0, 0.0, 0.0]), torch.tensor([1, 0, 0])
        >>> objective(scores, targets, index=torch.tensor([0, 1, 2])).loss  # every l is 0
        tensor(0.)

    Relations: gamma=1 is the mini-batch loss; DisCO's L_2 is this on the answers to one question
    with l(s) = s; DFT and SogCLR keep the same log u for other scores. tau to infinity is AUC.

    Source: book section 6.4.3, Algorithm 30; Zhu et al., ICML 2022.
    """

    def __init__(
        self,
        num_samples: int,
        *,
        gamma: float | GammaSchedule = 0.9,
        tau: float = 1.0,
        surrogate: Surrogate = SQUARED_HINGE,
        num_labels: int | None = None,
        state_dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        if tau <= 0:
            raise ValueError(f"tau must be positive, got {tau}; the authors use 1.0")
        self.tau, self.surrogate = tau, surrogate
        self.num_samples, self.num_labels = num_samples, num_labels
        self.inner = InnerEstimator(
            num_samples,
            gamma,
            log=True,
            num_labels=num_labels,
            state_dtype=state_dtype,
        )

    def forward(
        self, scores: Tensor, targets: Tensor, *, index: Tensor | None = None
    ) -> ObjectiveOutput:
        """Return the objective of the joined rows; see the class."""
        scores, targets, ids = self.joined(scores, targets, index)
        pairs = Pairs(scores, targets > 0.5)
        inner, anchors = SoftMean(pairs, self.surrogate, self.tau), pairs.contrasted
        log_u = inner.tracked(self.inner(inner.log_g, pairs.keys(self.keys(ids)), where=anchors))
        loss = self.tau * pairs.mean(log_u, anchors)

        def metrics() -> dict[str, Tensor]:
            return {
                "objective": loss.detach(),
                "log_u/mean": observed_mean(log_u, anchors),
                "log_u/max": observed_max(log_u, anchors),
                "negatives/effective_fraction": observed_mean(inner.fraction(), anchors),
                "skipped": pairs.skipped(anchors),
            }

        return ObjectiveOutput(loss, later(metrics))

    def exact(self, scores: Tensor, targets: Tensor) -> Tensor:
        """(6.28) of the given rows, without state."""
        self.check_shapes(scores=scores, targets=targets)
        pairs = Pairs(widened(scores), targets > 0.5)
        inner = SoftMean(pairs, self.surrogate, self.tau)
        return self.tau * pairs.mean(inner.tracked(inner.log_g), pairs.contrasted)


class SoftMean:
    """Log of the mean over negatives of exp(l_ij / tau) of each anchor, without gradient.

    Args:
        pairs: Of all positives.
        surrogate: l.
        tau: Temperature.

    Attributes:
        log_g: (A,)
    """

    def __init__(self, pairs: Pairs, surrogate: Surrogate, tau: float) -> None:
        self._pairs, self._tau, self._count = pairs, tau, pairs.counts()
        pairwise, slope = surrogate.with_slope(pairs.gap)
        self.log_g, self._share = logmeanexp(pairwise, pairs.weight, tau, self._count)
        self._slope = self._share * slope

    def fraction(self) -> Tensor:
        """(A,) the effective number of negatives in it, as a fraction of theirs."""
        return effective_fraction(self._share, self._count)

    def tracked(self, log_u: Tensor) -> Tensor:
        """Give ``log_u`` (A,) its gradient, the mean of exp(l_ij / tau) / u_i grad l_ij / tau."""
        rate = torch.exp(self.log_g - log_u).div_(self._tau)  # of log u in log g
        return self._pairs.attach(log_u, self._slope, scale=rate)

    def weighted(self, value: Tensor, log_u: Tensor, weight: Tensor) -> Tensor:
        """Give ``value`` () the gradient of the sum of ``weight`` (A,) times ``log_u`` (A,)."""
        rows = max(len(log_u), 1)
        rate = torch.exp(self.log_g - log_u).mul_(weight).div_(self._tau)
        own = (value / rows).expand(len(log_u))
        found = self._pairs.attach(own, self._slope, scale=rate).sum()
        return found if len(log_u) else found + value
