"""Distributionally robust optimization with the chi-square divergence (sections 2.2 and 6.9)."""

import torch
from torch import Tensor

from llm_xrisk.fcco import InnerEstimator
from llm_xrisk.fcco.schedules import GammaSchedule
from llm_xrisk.objectives.robust import GlobalDual, RobustObjective, only_key

SMALLEST = 1e-30  # under the root of u; above the squares that float32 loses
MARGIN = 1e-4  # between equal losses and eta, relative to them


class Chi2DRO(RobustObjective):
    r"""Chi-square-penalised robust loss, by SGD on eta: weights linear in the loss.

    .. math:: F(w) = \max_{p \in \Delta_n} \sum_i p_i \ell_i(w) - \frac{\lambda}{2n} \sum_i
              (n p_i - 1)^2 = \min_\eta \eta + \frac{\lambda}{2} \Big( \frac1n \sum_i
              \Big[ \frac{\ell_i(w) - \eta}{\lambda} + 1 \Big]_+^2 - 1 \Big) \qquad (2.12)

    The dual is linear in the expectation: no inner function is tracked. The gradient in w is the
    mean of p_i grad l_i with p_i = [(l_i - eta) / lam + 1]_+; that in eta is z = 1 - mean p_i.
    The loss is the value at the eta it found; then eta takes its own step.

    Args:
        lam: lambda > 0, in units of the losses; large is the mean loss.
        eta_lr: Step size of eta, below 2 lam.
        eta_beta: Weight of the new gradient of eta in (0, 1]; 1 is plain SGD.
        state_dtype: dtype of the state.

    Shapes:
        scores (B,) the losses l_i of the rows; targets (B,) losses of a reference model, which
        are subtracted and carry no gradient, or None.

    State: eta, its momentum and whether there is one: 9 bytes.

    Departures: the book gives the divergence, and no algorithm; eta starts at its best value for
    the first mini-batch.

    Raises:
        ValueError: lam or eta_lr <= 0, eta_beta outside (0, 1].

    Example:
        >>> objective = Chi2DRO(lam=2.0)
        >>> objective(torch.tensor([0.0, 2.0])).loss            # mean 1 + variance 1 / (2 lam)
        tensor(1.2500)

    Relations: where no weight is 0, F is the mean plus variance / (2 lam); Chi2ConstrainedDRO
    has a radius instead; with targets this is DRRHO.

    Source: book section 6.9, the divergence below (6.114); Namkoong and Duchi, NeurIPS 2017.
    """

    def __init__(
        self,
        *,
        lam: float = 1.0,
        eta_lr: float = 0.01,
        eta_beta: float = 1.0,
        state_dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        if lam <= 0:
            raise ValueError(f"lam must be positive, got {lam}; large is the mean loss")
        self.lam = lam
        self.eta = GlobalDual(lr=eta_lr, beta=eta_beta, state_dtype=state_dtype)

    def estimate(self, losses: Tensor) -> tuple[Tensor, Tensor]:
        """The dual at eta, and the weights [(l_i - eta) / lam + 1]_+."""
        eta = self.eta.begun_at(self._best_eta, losses)
        value, weights = self._at(eta, losses)
        self.eta.descend(1 - weights.mean())
        return value, weights

    def worst_case(self, losses: Tensor) -> tuple[Tensor, Tensor]:
        """The largest penalised mean and its weights n p."""
        return self._at(self._best_eta(losses), losses)

    def state_metrics(self) -> dict[str, Tensor]:
        """The dual."""
        return {"eta": self.eta.current()}

    def _at(self, eta: Tensor, losses: Tensor) -> tuple[Tensor, Tensor]:
        """Value and weights at eta."""
        rise = ((losses - eta) / self.lam).clamp(min=-1)
        # p^2 - 1 as (p - 1)(p + 1): p is 1 to the last digit where lam is large
        return eta + self.lam / 2 * (rise * (rise + 2)).mean(), rise + 1

    def _best_eta(self, losses: Tensor) -> Tensor:
        """The eta at which the weights have mean 1: a projection on the simplex."""
        ordered = torch.sort(losses, descending=True).values
        count = torch.arange(1, losses.numel() + 1, device=losses.device, dtype=losses.dtype)
        mean = ordered.cumsum(0) / count  # of the largest 1, 2, .. losses, if these have a weight
        weighted = (ordered - mean + self.lam * losses.numel() / count > 0).sum()
        eta = mean + self.lam * (1 - losses.numel() / count)
        return eta.gather(0, weighted.reshape(1) - 1)[0]


class Chi2ConstrainedDRO(RobustObjective):
    r"""Chi-square-constrained robust loss, SCMA with a dual eta: mean plus spread of the losses.

    .. math:: F(w) = \max_{p \in \Delta_n,\; \frac{1}{2n} \sum_i (n p_i - 1)^2 \le \rho}
              \sum_i p_i \ell_i(w) = \min_\eta \sqrt{1 + 2\rho}\, \Big( \frac1n \sum_i
              [\ell_i(w) - \eta]_+^2 \Big)^{1/2} + \eta \qquad (6.114)

    One inner value g = mean_i [l_i - eta]_+^2, outer function f = c sqrt with c = sqrt(1 + 2 rho),
    tracked as u. The gradient in w is the mean of p_i grad l_i with p_i = c [l_i - eta]_+ /
    sqrt(u); that in eta is z = 1 - mean p_i. The loss is the value at u and the eta it found;
    then eta takes its own step.

    Args:
        gamma: Weight of the new mini-batch value in (0, 1].
        rho: Radius > 0; (6.114) writes rho / n for it.
        eta_lr: Step size of eta, in units of the losses.
        eta_beta: Weight of the new gradient of eta in (0, 1]; 1 is plain SGD.
        state_dtype: dtype of the state.

    Shapes:
        scores (B,) the losses l_i of the rows; targets (B,) losses of a reference model, which
        are subtracted and carry no gradient, or None.

    State: u, eta, its momentum and whether there are any: 14 bytes.

    Departures: the book gives the objective and refers to Algorithm 24's scheme; the dual form is
    ours to apply it to. eta starts at its best value for the first mini-batch, below equal
    losses by a ten thousandth, since their weights at eta = l would all be 0 / 0.

    Raises:
        ValueError: gamma or eta_beta outside (0, 1], rho or eta_lr <= 0.

    Example:
        >>> objective = Chi2ConstrainedDRO(rho=0.125)
        >>> objective(torch.tensor([0.0, 2.0])).loss            # mean 1 + sqrt(2 rho variance)
        tensor(1.5000)

    Relations: where no weight is 0, F is the mean plus sqrt(2 rho variance), which is (6.115);
    Chi2DRO has a penalty instead; with targets this is DRRHO.

    Source: book section 6.9, (6.114); Namkoong and Duchi, NeurIPS 2017; Wei et al., 2025.
    """

    def __init__(
        self,
        *,
        gamma: float | GammaSchedule = 0.9,
        rho: float = 0.5,
        eta_lr: float = 0.01,
        eta_beta: float = 1.0,
        state_dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        if rho <= 0:
            raise ValueError(f"rho must be positive, got {rho}; 0 is the mean loss")
        self.rho, self.scale = rho, (1 + 2 * rho) ** 0.5
        self.inner = InnerEstimator(1, gamma, state_dtype=state_dtype)
        self.eta = GlobalDual(lr=eta_lr, beta=eta_beta, state_dtype=state_dtype)

    def estimate(self, losses: Tensor) -> tuple[Tensor, Tensor]:
        """The dual at u and eta, and the weights c [l_i - eta]_+ / sqrt(u)."""
        eta = self.eta.begun_at(self._best_eta, losses)
        excess = (losses - eta).relu()
        u = self.inner(excess.square().mean().reshape(1), only_key(losses))[0]
        root = u.clamp(min=SMALLEST).sqrt()
        weights = self.scale * excess / root
        self.eta.descend(1 - weights.mean())
        return self.scale * root + eta, weights

    def worst_case(self, losses: Tensor) -> tuple[Tensor, Tensor]:
        """The largest mean within the radius and its weights n p."""
        excess = (losses - self._best_eta(losses)).relu()
        weights = excess / excess.mean()  # c / sqrt(u) is that at the best eta, if there is one
        return (weights * losses).mean(), weights

    def state_metrics(self) -> dict[str, Tensor]:
        """The tracked value and the dual."""
        u = torch.where(self.inner.visited, self.inner.u, float("nan"))[0]
        return {"u": u, "eta": self.eta.current()}

    def _best_eta(self, losses: Tensor) -> Tensor:
        """The eta at which the weights have mean 1, a little below losses that leave no room."""
        ordered, n = torch.sort(losses, descending=True).values, losses.numel()
        count = torch.arange(1, n + 1, device=losses.device, dtype=losses.dtype)
        centred = ordered - ordered[0]
        sums = centred.cumsum(0) - count * centred  # at eta = l_(j), of the losses above it
        squares = centred.square().cumsum(0) - 2 * centred * centred.cumsum(0)
        squares = squares + count * centred.square()
        # the dual is convex: its slope at l_(j) is positive for those j whose weight is
        active = (self.scale * sums <= (n * squares.clamp(min=0)).sqrt()).to(count.dtype)
        size = active.sum()
        mean = (active * centred).sum() / size
        variance = (active * (centred - mean).square()).sum() / size
        room = 2 * self.rho - self.scale**2 * (1 - size / n)  # c^2 size / n - 1, to all digits
        room = room.clamp(min=torch.finfo(room.dtype).eps)
        distance = torch.maximum((variance / room).sqrt(), MARGIN * ordered[0].abs().clamp(min=1))
        return ordered[0] + (mean - distance)
