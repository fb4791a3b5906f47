"""One-way partial AUC with hard weights (section 6.4.3)."""

import torch
from torch import Tensor

from llm_xrisk.fcco import PerSampleDual
from llm_xrisk.fcco.keyed import Keys
from llm_xrisk.objectives.base import Objective, ObjectiveOutput, later
from llm_xrisk.objectives.pairs import Pairs
from llm_xrisk.objectives.reductions import observed_mean, widened
from llm_xrisk.objectives.surrogates import SQUARED_HINGE, Surrogate
from llm_xrisk.objectives.tails import check_share, mean_above, tail_mean


class OPAUC(Objective):
    r"""One-way partial AUC, SOPA: ranks positives above the k highest negatives.

    .. math:: F(w, \nu) = \frac{1}{n_+} \sum_{x_i \in S_+} \Big\{ \frac{k}{n_-} \nu_i
              + \frac{1}{n_-} \sum_{x_j \in S_-} (\ell(h_j - h_i) - \nu_i)_+ \Big\} \qquad (6.26)

    At the best nu_i, between its k-th and (k+1)-th largest loss, this is k / n_- times the mean
    over positives of the mean of their k largest losses, (6.24). It is no composition: with
    p_ij = 1[l_ij > nu_i] the gradient is Algorithm 29, line 9, the mean over pairs of
    p_ij grad l_ij, unbiased in w and nu. Each nu_i is a dual of its positive with a step of its
    own, line 6, taken after the loss:

    .. math:: \nu_i \leftarrow \nu_i - \eta \Big(\frac{k}{n_-}
              - \frac{1}{|B_-|} \sum_{x_j \in B_-} p_{ij}\Big)

    The loss is (6.26) of the mini-batch at the nu found; in ``eval()`` it is :meth:`exact` of it.

    Args:
        num_samples: n, the number of examples the index counts.
        max_fpr: beta = k / n_- in (0, 1], the largest false-positive rate that counts.
        nu_lr: eta > 0, in units of the losses; 0.1 in the authors' recipes. Where the losses fall
            faster than nu can, by eta beta a visit, no pair is left above it and learning halts.
        surrogate: l, non-decreasing.
        num_labels: L for several labels at once: F is the mean over labels of (6.26).
        state_dtype: dtype of nu.

    Shapes:
        scores (B,) or (B, L), targets the same, 1 or 0 (or 1 and -1, or booleans), index (B,).

    State: one nu per sample and label, 8 bytes with its direction; positives alone use theirs.

    Departures: the k of (6.23) is rounded down, here beta n_- may be any number: ``exact`` counts
    the loss on the edge by its fraction. The authors' library divides loss and step by beta. nu
    starts at 0 as in the book: all pairs with a loss count at first, and no gradient is lost.

    Raises:
        ValueError: max_fpr outside (0, 1], nu_lr <= 0, or a missing index.

    Example:
        >>> objective = OPAUC(num_samples=3, max_fpr=0.5, nu_lr=1.0)
        >>> scores, targets = torch.tensor([1.0, 0.5, 0.2]), torch.tensor([1, 0, 0])
        >>> objective(scores, targets, index=torch.arange(3)).loss    # nu is 0: (0.25 + 0.04) / 2
        tensor(0.1450)
        >>> objective(scores, targets, index=torch.arange(3)).loss    # nu is 0 - (0.5 - 1)
        tensor(0.2500)

    Relations: max_fpr=1 is :class:`PairwiseAUC` with nu_i below every loss; :class:`OPAUCSoft`
    weighs negatives by a temperature; :class:`TPAUC` selects positives too.

    Source: book section 6.4.3, Lemma 6.1, Algorithm 29; Zhu et al., ICML 2022.
    """

    def __init__(
        self,
        num_samples: int,
        *,
        max_fpr: float = 0.3,
        nu_lr: float = 0.1,
        surrogate: Surrogate = SQUARED_HINGE,
        num_labels: int | None = None,
        state_dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        check_share("max_fpr", max_fpr, "negatives")
        self.max_fpr, self.surrogate = max_fpr, surrogate
        self.num_samples, self.num_labels = num_samples, num_labels
        self.nu = PerSampleDual(
            num_samples,
            num_labels=num_labels,
            lr=nu_lr,
            state_dtype=state_dtype,
        )

    def forward(
        self, scores: Tensor, targets: Tensor, *, index: Tensor | None = None
    ) -> ObjectiveOutput:
        """Return the objective of the joined rows; see the class."""
        scores, targets, ids = self.joined(scores, targets, index)
        pairs = Pairs(scores, targets > 0.5)
        keys, anchors = pairs.keys(self.keys(ids)), pairs.contrasted
        if not self.training:  # ids of another data set; only metrics read the duals then
            keys = Keys(torch.zeros_like(keys.index))
        nu = self.nu(keys)
        excess, share = mean_above(pairs, self.surrogate, nu)
        if self.training:
            loss = pairs.mean(self.max_fpr * nu + excess, anchors)
            self.nu.step(self.max_fpr - share, keys, anchors)  # line 6
        else:
            loss = self._tail(pairs)

        def metrics() -> dict[str, Tensor]:
            return {
                "objective": loss.detach(),
                "nu/mean": observed_mean(nu, anchors),
                "negatives/selected": observed_mean(share, anchors),
                "skipped": pairs.skipped(anchors),
            }

        return ObjectiveOutput(loss, later(metrics))

    def exact(self, scores: Tensor, targets: Tensor) -> Tensor:
        """(6.26) of the given rows at their best nu, without state."""
        self.check_shapes(scores=scores, targets=targets)
        return self._tail(Pairs(widened(scores), targets > 0.5))

    def _tail(self, pairs: Pairs) -> Tensor:
        return pairs.mean(tail_mean(pairs, self.surrogate, self.max_fpr), pairs.contrasted)
