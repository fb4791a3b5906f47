"""Conditional value at risk: the mean of the largest losses (sections 2.2 and 6.9)."""

import math

import torch
from torch import Tensor

from llm_xrisk.objectives.robust import GlobalDual, RobustObjective

RARE = 1e-3


class CVaRDRO(RobustObjective):
    r"""Mean of the k largest losses, by SGD on a threshold nu: trains on the hardest rows.

    .. math:: F(w) = \frac1k \sum_{i=1}^k \ell_{[i]}(w) = \min_\nu \frac1k \sum_{i=1}^n
              [\ell_i(w) - \nu]_+ + \nu \qquad (6.116), (6.117)

    With k = alpha n this is the mean of [l_i - nu]_+ / alpha plus nu, linear in the expectation:
    no inner function is tracked. The gradient in w is the mean of p_i grad l_i with p_i =
    1[l_i > nu] / alpha; that in nu is z = 1 - mean p_i. The loss is the value at the nu it found;
    then nu takes its own step.

    Args:
        alpha: Share k / n of the rows that count, in (0, 1]; 1 is the mean loss.
        nu_lr: Step size of nu, in units of the losses.
        nu_beta: Weight of the new gradient of nu in (0, 1]; 1 is plain SGD.
        eps: Smoothing >= 0: the hinge is replaced by its Moreau envelope, and weights rise from
            0 to 1 / alpha over eps above nu. F is at most eps / (2 alpha) too small then.
        state_dtype: dtype of the state.

    Shapes:
        scores (B,) the losses l_i of the rows; targets (B,) losses of a reference model, which
        are subtracted and carry no gradient, or None.

    State: nu, its momentum and whether there is one: 9 bytes.

    Departures: the book's phi is 1 where it must be 0, below (6.116). nu starts at its best value
    for the first mini-batch, the (1 - alpha) quantile, instead of at 0.
    Rows at l_i = nu, where any weight up to 1 / alpha is a subgradient, get the one that makes
    the mean weight 1 if it exists, so that the first step is that of the batch's own top rows.
    Losses that fall faster than nu_lr would leave every row without a weight, and training would
    stand still until nu has followed. So nu begins anew where no row of a batch exceeds it though
    at its best value that happens to less than one batch in 1,000; with alpha = 1 it is never
    above the smallest loss.

    Raises:
        ValueError: alpha or nu_beta outside (0, 1], nu_lr <= 0, eps < 0.

    Example:
        >>> objective = CVaRDRO(alpha=0.5)
        >>> objective(torch.tensor([0.0, 1.0, 2.0, 4.0])).loss  # (2 + 4) / 2
        tensor(3.)

    Relations: with targets this is DRRHO; with a nu for each positive it is OPAUC by CVaR; KLDRO
    and Chi2DRO weigh smoothly instead of selecting.

    Source: book section 6.9, (6.116) and (6.117), and (2.15); Rockafellar and Uryasev, 2000.
    """

    def __init__(
        self,
        *,
        alpha: float = 0.1,
        nu_lr: float = 0.01,
        nu_beta: float = 1.0,
        eps: float = 0.0,
        state_dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        if not 0 < alpha <= 1:
            raise ValueError(f"alpha must be in (0, 1], got {alpha}; it is the share of rows, k/n")
        if eps < 0:
            raise ValueError(f"eps must not be negative, got {eps}; 0 is the hinge")
        self.alpha, self.eps = alpha, eps
        self.nu = GlobalDual(lr=nu_lr, beta=nu_beta, state_dtype=state_dtype)

    def estimate(self, losses: Tensor) -> tuple[Tensor, Tensor]:
        """(6.117) at nu, and the weights 1[l_i > nu] / alpha."""
        nu = self.nu.begun_at(self._best_nu, losses)
        if (1 - self.alpha) ** losses.numel() < RARE:  # a size, known without looking
            nu = self.nu.restarted(self._left_behind(nu, losses), self._best_nu, losses)
        value, weights = self._at(nu, losses)
        self.nu.descend(1 - weights.mean())
        return value, weights

    def worst_case(self, losses: Tensor) -> tuple[Tensor, Tensor]:
        """(6.116), or (6.117) with the smoothed hinge, and the weights of its gradient."""
        return self._at(self._best_nu(losses), losses)

    def state_metrics(self) -> dict[str, Tensor]:
        """The threshold."""
        return {"nu": self.nu.current()}

    def _left_behind(self, nu: Tensor, losses: Tensor) -> Tensor:
        """Whether rows that count are below the threshold as no chance would have it, ()."""
        if self.alpha == 1:
            return self._best_nu(losses) < nu
        return ~(losses > nu).any()

    def _at(self, nu: Tensor, losses: Tensor) -> tuple[Tensor, Tensor]:
        """Value and weights at a threshold."""
        gap = losses - nu
        if self.eps > 0:
            weights = (gap / self.eps).clamp(0, 1)
            hinge = weights * (gap - self.eps * weights / 2)
            return hinge.mean() / self.alpha + nu, weights / self.alpha
        above, ties = (gap > 0).to(gap.dtype), (gap == 0).to(gap.dtype)
        open_places = self.alpha * gap.numel() - above.sum()
        share = (open_places / ties.sum().clamp(min=1)).clamp(0, 1)
        return gap.relu().mean() / self.alpha + nu, (above + share * ties) / self.alpha

    def _best_nu(self, losses: Tensor) -> Tensor:
        """A minimiser of (6.117): where the mean weight is 1."""
        places = self.alpha * losses.numel()
        if self.eps == 0:
            last = max(math.ceil(places - 1e-6), 1)
            return torch.sort(losses, descending=True).values[last - 1]
        # as nu falls, row i gains weight from l_i down to l_i - eps: linear between these knots
        knots, order = torch.sort(torch.cat([losses, losses - self.eps]), descending=True)
        rising = torch.where(order < losses.numel(), 1.0, -1.0).to(losses.dtype).cumsum(0)
        gained = (rising[:-1] * -knots.diff() / self.eps).cumsum(0)
        before = (gained < places).sum().reshape(1)  # the knot above nu
        gained, rising = torch.cat([gained.new_zeros(1), gained]), rising.clamp(min=1.0)
        missing = places - gained.gather(0, before)
        return (knots.gather(0, before) - self.eps * missing / rising.gather(0, before))[0]
