"""Average precision (section 6.4.2)."""

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor

from llm_xrisk.fcco import InnerEstimator
from llm_xrisk.fcco.schedules import GammaSchedule
from llm_xrisk.objectives.base import Objective, ObjectiveOutput, later
from llm_xrisk.objectives.pairs import Pairs
from llm_xrisk.objectives.reductions import observed_mean, widened
from llm_xrisk.objectives.surrogates import SQUARED_HINGE, Surrogate


class AveragePrecision(Objective):
    r"""Average precision, SOAP: ranks positives above negatives, the top of the list first.

    .. math:: F(w) = \frac{1}{n_+} \sum_{x_i \in S_+} -\frac{g_1(w; x_i)}{g_2(w; x_i)}
              \qquad (6.22)
    .. math:: g_1 = \frac{1}{|S|} \sum_{j: y_j = 1} \ell(h_j - h_i), \qquad
              g_2 = \frac{1}{|S|} \sum_{j} \ell(h_j - h_i)

    Both inner values of a positive are tracked by the moving average of Algorithm 28, line 5; the
    outer function is f(g) = -g_1 / g_2. The gradient is line 8's, weights
    (u_1 - u_2 1[y_j = 1]) / u_2^2; the loss is the objective's value at u, in [-1, 0].

    Args:
        num_samples: n, the number of examples the index counts.
        gamma: Weight of the new mini-batch value in (0, 1); the book tunes it there, the authors'
            recipes use 0.1.
        surrogate: l, non-decreasing and positive at 0.
        prior: n_+ / n of the data (a number, or one for each label), where batches hold another
            share of positives (a sampler that oversamples them). The two means then weigh by it;
            by default every row of the batch weighs the same, which optimises the AP at the
            sampler's prior.
        num_labels: L for several labels at once: F is the mean over labels of (6.22).
        state_dtype: dtype of the state.

    Shapes:
        scores (B,) or (B, L), targets the same, 1 or 0 (or 1 and -1, or booleans), index (B,).

    State: two numbers per sample and label, 9 bytes with the visit; positives alone use theirs.

    Departures: the first visit of a sample stores its mini-batch value, as the book has it and
    the authors' library has not (its first gradients are 1 / gamma times too large). ``prior``
    is ours. The pair j = i is in both means, as in the book; in a batch with few positives it
    weighs more than in the data (4 of 40: F off by 4 %).

    Raises:
        ValueError: gamma outside (0, 1], prior outside (0, 1), a surrogate that is not positive
            at 0, or a missing index.

    Example:
        >>> objective = AveragePrecision(num_samples=4)
        >>> scores, targets = torch.tensor([2.0, 1.0, 0.0]), torch.tensor([1, 0, 1])
        >>> objective(scores, targets, index=torch.tensor([0, 1, 2])).loss  # -(1/1 + 10/14) / 2
        tensor(-0.8571)

    Relations: gamma=1 is the mini-batch surrogate; :class:`OPAUCSoft` weighs the top of the list
    by a temperature instead.

    Source: book section 6.4.2, Algorithm 28; Qi et al., NeurIPS 2021.
    """

    prior: Tensor | None

    def __init__(
        self,
        num_samples: int,
        *,
        gamma: float | GammaSchedule = 0.1,
        surrogate: Surrogate = SQUARED_HINGE,
        prior: float | Sequence[float] | Tensor | None = None,
        num_labels: int | None = None,
        state_dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        if float(surrogate(torch.zeros(()))) <= 0:  # else u_2 of the first positive may be 0
            raise ValueError(
                f"the surrogate must be positive at 0, got {surrogate}; SquaredHinge(1.0) is"
            )
        given = numbers(prior)
        if not all(0 < p < 1 for p in given):
            raise ValueError(
                f"prior must be in (0, 1), got {prior}; pass (targets == 1).float().mean()"
            )
        if len(given) not in (0, 1, num_labels):
            raise ValueError(
                f"got {len(given)} priors for num_labels={num_labels}; pass one, or one for each "
                "label: (targets == 1).float().mean(0)"
            )
        self.surrogate = surrogate
        self.num_samples, self.num_labels = num_samples, num_labels
        self.register_buffer(
            "prior", torch.tensor(given, dtype=state_dtype) if given else None, persistent=False
        )
        self.inner = InnerEstimator(
            num_samples,
            gamma,
            shape=(2,),
            num_labels=num_labels,
            state_dtype=state_dtype,
        )

    def forward(
        self, scores: Tensor, targets: Tensor, *, index: Tensor | None = None
    ) -> ObjectiveOutput:
        """Return the objective of the joined rows; see the class."""
        scores, targets, ids = self.joined(scores, targets, index)
        pairs = Pairs(scores, targets > 0.5, whole=True)
        g, slope, columns = self._inner_values(pairs)
        u = self.inner(g, pairs.keys(self.keys(ids)), where=pairs.anchors)
        first, second = pairs.attach(u, slope, columns).unbind(-1)
        loss = -pairs.mean(first / second, pairs.anchors)

        def metrics() -> dict[str, Tensor]:
            return {
                "objective": loss.detach(),
                "u/mean": observed_mean(second, pairs.anchors),
                "positives": pairs.share(),
                "skipped": pairs.skipped(pairs.anchors),
            }

        return ObjectiveOutput(loss, later(metrics))

    def exact(self, scores: Tensor, targets: Tensor) -> Tensor:
        """(6.22) of the given rows, without state."""
        self.check_shapes(scores=scores, targets=targets)
        pairs = Pairs(widened(scores), targets > 0.5, whole=True)
        first, second = pairs.attach(*self._inner_values(pairs)).unbind(-1)
        return -pairs.mean(first / second, pairs.anchors)

    def _inner_values(self, pairs: Pairs) -> tuple[Tensor, Tensor, Tensor]:
        """g_1 and g_2 of each anchor, (A, 2), and slope and columns of their gradient."""
        first = pairs.columns_of(pairs.positive.to(pairs.gap.dtype))
        weight = torch.full_like(first, 1 / max(len(pairs.scores), 1))
        if self.prior is not None:
            prior, second = self.prior.to(first.dtype), 1 - first
            if pairs.label is not None:
                prior = prior.expand(pairs.num_labels)[pairs.label, None]
            share = prior / first.sum(-1, keepdim=True).clamp(min=1)
            other = (1 - prior) / second.sum(-1, keepdim=True).clamp(min=1)
            weight = first * share + second * other
        pairwise, slope = self.surrogate.with_slope(pairs.gap)
        columns = torch.stack([weight * first, weight])
        return pairs.sums(pairwise, columns), slope, columns


def numbers(given: float | Sequence[float] | Tensor | None) -> list[float]:
    """A number, several, or none, as a list.

    Example:
        >>> numbers(0.25), numbers(torch.tensor([0.5, 0.25])), numbers(None)
        ([0.25], [0.5, 0.25], [])
    """
    if given is None:
        return []
    flat = torch.as_tensor(given, dtype=torch.float64).flatten()
    return cast(list[float], flat.tolist())  # pyright: ignore[reportUnknownMemberType]
