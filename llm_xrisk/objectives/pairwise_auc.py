"""AUC over pairs (section 6.4.1)."""

from torch import Tensor

from llm_xrisk.objectives.base import Objective, ObjectiveOutput, later
from llm_xrisk.objectives.pairs import Pairs
from llm_xrisk.objectives.reductions import widened
from llm_xrisk.objectives.surrogates import SQUARED_HINGE, Surrogate
from llm_xrisk.objectives.tails import tail_mean


class PairwiseAUC(Objective):
    r"""AUC, SGD on pairs: ranks positives above negatives, every pair with the same weight.

    .. math:: F(w) = \frac{1}{n_+} \sum_{x_i \in S_+} \frac{1}{n_-} \sum_{x_j \in S_-}
              \ell(h_j - h_i) \qquad (2.31)

    A mean of losses of pairs: there is no outer function, so the mini-batch's mean over its own
    positives and negatives is an unbiased estimate and its gradient is one of F. Nothing is
    tracked, and no index is needed.

    Args:
        surrogate: l; ``SquaredHinge`` or ``Logistic``, or any other of
            :mod:`llm_xrisk.objectives.surrogates`.
        num_labels: L for several labels at once: F is the mean over labels of the above.

    Shapes:
        scores (B,) or (B, L), targets the same, 1 or 0 (or 1 and -1, or booleans); no index.

    State: none.

    Departures: a label without both classes in the batch is left out.

    Raises:
        ValueError: num_labels < 1, or shapes and labels that do not fit.

    Example:
        >>> import torch
        >>> objective = PairwiseAUC()
        >>> scores, targets = torch.tensor([1.0, 0.5, 0.0]), torch.tensor([1, 0, 0])
        >>> objective(scores, targets).loss          # ([1 + 0.5 - 1]^2 + [1 + 0 - 1]^2) / 2
        tensor(0.1250)

    Relations: with ``Squared`` this is :class:`AUCMargin` at its saddle, which needs no pairs;
    :class:`OPAUC` with max_fpr = 1 and :class:`OPAUCSoft` with tau to infinity are this.

    Source: book sections 2.3.2 and 6.4.1.
    """

    def __init__(
        self, *, surrogate: Surrogate = SQUARED_HINGE, num_labels: int | None = None
    ) -> None:
        super().__init__()
        if num_labels is not None and num_labels < 1:
            raise ValueError(f"num_labels must be at least 1, got {num_labels}: targets' columns")
        self.surrogate, self.num_labels = surrogate, num_labels

    def forward(
        self, scores: Tensor, targets: Tensor, *, index: Tensor | None = None
    ) -> ObjectiveOutput:
        """Return the objective of the joined rows; see the class."""
        scores, targets, _ = self.joined(scores, targets)
        pairs = Pairs(scores, targets > 0.5)
        own = tail_mean(pairs, self.surrogate)
        loss = pairs.mean(own, pairs.contrasted)

        def metrics() -> dict[str, Tensor]:
            return {
                "objective": loss.detach(),
                "positives": pairs.share(),
                "skipped": pairs.skipped(pairs.contrasted),
            }

        return ObjectiveOutput(loss, later(metrics))

    def exact(self, scores: Tensor, targets: Tensor) -> Tensor:
        """(2.31) of the given rows."""
        self.check_shapes(scores=scores, targets=targets)
        pairs = Pairs(widened(scores), targets > 0.5)
        return pairs.mean(tail_mean(pairs, self.surrogate), pairs.contrasted)
