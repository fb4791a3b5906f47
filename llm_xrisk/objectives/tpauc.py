"""Two-way partial AUC with hard weights (section 6.4.3)."""

import torch
from torch import Tensor

from llm_xrisk.fcco import PerSampleDual
from llm_xrisk.fcco.keyed import Keys
from llm_xrisk.objectives.base import Objective, ObjectiveOutput, later
from llm_xrisk.objectives.pairs import Pairs
from llm_xrisk.objectives.reductions import observed_mean, widened
from llm_xrisk.objectives.surrogates import SQUARED_HINGE, Surrogate
from llm_xrisk.objectives.tails import check_share, mean_above, tail_mean, top_share


class TPAUC(Objective):
    r"""Two-way partial AUC, STACO: ranks the k_1 lowest positives above the k_2 highest negatives.

    .. math:: F(w, \nu, \nu') = \frac{1}{n_+} \sum_{x_i \in S_+} [g_i]_+
              + \frac{k_1 k_2}{n_+ n_-} \nu' \qquad (6.32)
    .. math:: g_i = \frac{1}{n_-} \sum_{x_j \in S_-} (\ell(h_j - h_i) - \nu_i)_+
              + \frac{k_2}{n_-} (\nu_i - \nu')

    with k_1 = (1 - min_tpr) n_+ and k_2 = max_fpr n_-. At the best duals it is
    k_1 k_2 / (n_+ n_-) times the mean loss of the k_1 k_2 pairs. The outer function is
    [g]_+ = max y g over y in [0, 1], so each positive has two duals, y_i and nu_i, and all share
    nu'. Algorithm 31 (ALEXR) takes, with p_ij = 1[l_ij > nu_i] of the nu found:

    .. math:: y_i \leftarrow \big[ y_i + \eta_2 \hat g_i \big]_{[0, 1]}, \quad
              \nu_i \leftarrow \nu_i - \eta_1 y_i \Big(\frac{k_2}{n_-} - \hat p_i\Big), \quad
              \nu' \leftarrow \nu' - \eta_1 \Big(\frac{k_1 k_2}{n_+ n_-}
              - \frac{k_2}{n_-} \bar y\Big)

    where a hat is a mean over the batch's negatives and a bar one over its positives. The gradient
    is line 10's, the mean over pairs of y_i p_ij grad l_ij with the *new* y_i. The loss is the
    saddle function at the same y_i and the nu found, the mean of y_i g_i plus the last term of
    (6.32); in ``eval()`` it is :meth:`exact` of the mini-batch.

    Args:
        num_samples: n, the number of examples the index counts.
        min_tpr: alpha in [0, 1), the smallest true-positive rate that counts.
        max_fpr: beta in (0, 1], the largest false-positive rate that counts.
        nu_lr: eta_1 > 0, in units of the losses; 0.1 in the authors' recipes.
        y_lr: eta_2 > 0, per unit of the losses; 0.1 in the authors' recipes.
        surrogate: l, non-decreasing.
        num_labels: L for several labels at once, each with its own nu': F is the mean over labels.
        state_dtype: dtype of the duals.

    Shapes:
        scores (B,) or (B, L), targets the same, 1 or 0 (or 1 and -1, or booleans), index (B,).

    State: y and nu per sample and label, 16 bytes with their directions (positives alone use
    theirs), and one nu' per label.

    Departures: Algorithm 31 prints y_i - eta_2 g_i, which minimises where (6.32) maximises: y
    falls to 0 and with it every gradient. It leaves y_1 open, here 1, all positives; and its line
    4 has the arguments of l exchanged. k_1 and k_2 are not rounded. ALEXR's extrapolation needs
    g at the last weights and is left out, as in Algorithm 31. The authors' library divides by
    k_1 / n_+ and k_2 / n_-.

    Raises:
        ValueError: min_tpr outside [0, 1), max_fpr outside (0, 1], a step size <= 0, or a missing
            index.

    Example:
        >>> objective = TPAUC(num_samples=3, min_tpr=0.5, max_fpr=0.5)
        >>> scores, targets = torch.tensor([1.0, 0.5, 0.0]), torch.tensor([1, 0, 1])
        >>> objective(scores, targets, index=torch.arange(3)).loss  # (.25 + 2.25) / 2
        tensor(1.2500)

    Relations: min_tpr=0 is :class:`OPAUC` with y_i = 1; :class:`TPAUCSoft` weighs both classes by
    temperatures.

    Source: book section 6.4.3, Lemma 6.2, Algorithm 31; Zhou et al., 2025 (ALEXR).
    """

    def __init__(
        self,
        num_samples: int,
        *,
        min_tpr: float = 0.3,
        max_fpr: float = 0.3,
        nu_lr: float = 0.1,
        y_lr: float = 0.1,
        surrogate: Surrogate = SQUARED_HINGE,
        num_labels: int | None = None,
        state_dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        check_share("1 - min_tpr", 1 - min_tpr, "positives")
        check_share("max_fpr", max_fpr, "negatives")
        self.max_fnr, self.max_fpr, self.surrogate = 1 - min_tpr, max_fpr, surrogate
        self.num_samples, self.num_labels = num_samples, num_labels
        self.y = PerSampleDual(
            num_samples,
            num_labels=num_labels,
            lr=y_lr,
            initial=1.0,
            lower=0.0,
            upper=1.0,
            state_dtype=state_dtype,
        )
        self.nu = PerSampleDual(
            num_samples, num_labels=num_labels, lr=nu_lr, state_dtype=state_dtype
        )
        self.nu_prime = PerSampleDual(1, num_labels=num_labels, lr=nu_lr, state_dtype=state_dtype)

    def forward(
        self, scores: Tensor, targets: Tensor, *, index: Tensor | None = None
    ) -> ObjectiveOutput:
        """Return the objective of the joined rows; see the class."""
        scores, targets, ids = self.joined(scores, targets, index)
        pairs = Pairs(scores, targets > 0.5)
        keys, anchors, labels = pairs.keys(self.keys(ids)), pairs.contrasted, pairs.labels()
        if not self.training:  # ids of another data set; only metrics read the duals then
            keys = Keys(torch.zeros_like(keys.index))
        nu, nu_prime = self.nu(keys), pairs.for_anchors(self.nu_prime(labels))
        excess, share = mean_above(pairs, self.surrogate, nu)  # line 4
        g = excess + self.max_fpr * (nu - nu_prime)
        y = self.y.step(-g.detach(), keys, anchors)  # line 6, ascent
        if self.training:
            loss = pairs.mean(y * g + self.max_fnr * self.max_fpr * nu_prime, anchors)
            self.nu.step(y * (self.max_fpr - share), keys, anchors)  # line 6
            self._step_nu_prime(pairs, labels, y)  # line 9
        else:
            loss = self._tail(pairs)

        def metrics() -> dict[str, Tensor]:
            return {
                "objective": loss.detach(),
                "nu/mean": observed_mean(nu, anchors),
                "nu_prime/mean": observed_mean(nu_prime, anchors),
                "negatives/selected": observed_mean(share, anchors),
                "positives/selected": observed_mean(y, anchors),
                "skipped": pairs.skipped(anchors),
            }

        return ObjectiveOutput(loss, later(metrics))

    def exact(self, scores: Tensor, targets: Tensor) -> Tensor:
        """(6.32) of the given rows at their best duals, without state."""
        self.check_shapes(scores=scores, targets=targets)
        return self._tail(Pairs(widened(scores), targets > 0.5))

    def _step_nu_prime(self, pairs: Pairs, labels: Keys, y: Tensor) -> None:
        own = pairs.by_label(pairs.contrasted)
        if own is None and len(y) > 0:
            mean, observed = y.mean()[None], None
        else:
            own = y.new_zeros(pairs.num_labels, len(y)) if own is None else own.to(y.dtype)
            count = own.sum(-1)
            mean, observed = own @ y / count.clamp(min=1), count > 0
        self.nu_prime.step(self.max_fpr * (self.max_fnr - mean), labels, observed)

    def _tail(self, pairs: Pairs) -> Tensor:
        lowest = top_share(-pairs.scores.detach(), pairs.positive, self.max_fnr)
        own = tail_mean(pairs, self.surrogate, self.max_fpr)
        return pairs.mean(pairs.anchors_of(lowest) * own, pairs.contrasted)
