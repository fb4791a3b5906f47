"""KL-constrained distributionally robust optimization (section 6.2.1)."""

import torch
from torch import Tensor

from llm_xrisk.fcco import InnerEstimator
from llm_xrisk.fcco.schedules import GammaSchedule
from llm_xrisk.objectives.kl_dro import rule_of, tilted
from llm_xrisk.objectives.robust import GlobalDual, RobustObjective, only_key

BISECTIONS = 60


class KLConstrainedDRO(RobustObjective):
    r"""KL-constrained robust loss, ABSGD with a learned temperature: worst case within a radius.

    .. math:: F(w) = \min_{\tau \ge \tau_0} \tau \log \Big( \frac1n \sum_{i=1}^n
              \exp\frac{\ell_i(w)}{\tau} \Big) + \tau \rho \qquad (6.16), (6.120)

    Algorithm 24 over (w, tau): one inner value g = mean_i exp(l_i / tau), outer function
    f = tau log, tracked as log u in the form of (6.14). The gradient in w is line 5's, the mean
    of p_i grad l_i with p_i = exp(l_i / tau) / u; that in tau is z = rho - mean p_i log p_i, rho
    less the divergence of p from uniform. The loss is the value at the tau it found; then tau
    takes its own projected step with momentum.

    Args:
        gamma: Weight of the new mini-batch value in (0, 1].
        rho: Radius > 0 of the weights' divergence from uniform; below log n it binds. 0.3 in the
            authors' iSogCLR; (6.120) writes rho / n for it.
        tau: First temperature.
        tau_0: Smallest temperature > 0.
        tau_lr: Step size of tau.
        tau_beta: Weight of the new gradient of tau in (0, 1]; 1 is plain SGD.
        tau_clip: Largest size of a gradient of tau; 5 in the authors' code for CLIP. Rows whose
            weight exceeds it often, as in small batches of rare large losses, ask for more.
        log_alpha: Logarithm of SCENT's step size, which replaces gamma; see KLDRO.
        multiplier: SCENT's exponent; see KLDRO.
        state_dtype: dtype of the state.

    Shapes:
        scores (B,) the losses l_i of the rows; targets (B,) losses of a reference model, which
        are subtracted and carry no gradient, or None.

    State: log u, whether there is one, tau and its momentum: 14 bytes.

    Departures: the book's z_tau, log u + rho - mean p_i l_i / tau, is ours plus (1 - mean p_i)
    log u. That term is 0 on average and at gamma=1; else it grows with the mean of the losses
    and, with z clipped, takes tau to tau_0: of 400 exponential losses plus 5 in batches of 16,
    with gamma=0.1, the book's tau ends at 0.05 and ours at 2.04, where 2.08 is right. When tau
    moves, tau log u stays, where the book keeps log u: so a shift of all losses changes no weight,
    and losses of several hundred do no harm. The book says that (6.16) equals (6.15); it is larger
    by the constant tau_0 rho. exact() is at the best tau, which need not be the tracked one.

    Raises:
        ValueError: gamma or tau_beta outside (0, 1], tau < tau_0; rho, tau_0, tau_lr or
            tau_clip <= 0.

    Example:
        >>> objective = KLConstrainedDRO(tau=1.0, rho=0.3)
        >>> objective(torch.tensor([0.0, 1.0])).loss            # log((1 + e) / 2) + 0.3
        tensor(0.9201)

    Relations: at a fixed tau this is KLDRO plus tau rho; with targets it is DRRHO; iSogCLR has
    a tau for each anchor.

    Source: book section 6.2.1, Algorithm 24 with z_tau below (6.16); Qi et al., TMLR 2023.
    """

    def __init__(
        self,
        *,
        gamma: float | GammaSchedule = 0.9,
        rho: float = 0.3,
        tau: float = 1.0,
        tau_0: float = 0.05,
        tau_lr: float = 0.01,
        tau_beta: float = 0.9,
        tau_clip: float = 5.0,
        log_alpha: float | None = None,
        multiplier: float = 1.0,
        state_dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        if rho <= 0 or tau_clip <= 0:
            raise ValueError(f"rho and tau_clip must be positive, got {rho} and {tau_clip}")
        if not 0 < tau_0 <= tau:
            raise ValueError(f"need 0 < tau_0 <= tau, got tau_0={tau_0} and tau={tau}")
        self.rho, self.tau_0, self.tau_clip = rho, tau_0, tau_clip
        self.inner = InnerEstimator(
            1, gamma, log=True, rule=rule_of(log_alpha, multiplier), state_dtype=state_dtype
        )
        self.tau = GlobalDual(
            lr=tau_lr, initial=tau, beta=tau_beta, lower=tau_0, state_dtype=state_dtype
        )

    def estimate(self, losses: Tensor) -> tuple[Tensor, Tensor]:
        """(6.16) at u and tau, and the weights exp(l_i / tau) / u."""
        tau = self.tau.current()
        log_g, log_share = tilted(losses, tau)
        log_u = self.inner(log_g.reshape(1), only_key(losses))[0]
        log_weights = log_share + (log_g - log_u)
        weights = log_weights.exp()
        z = self.rho - (weights * log_weights).mean()
        self.tau.descend(z.clamp(-self.tau_clip, self.tau_clip))
        if self.training:
            self.inner.u.mul_(tau / self.tau.current())  # tau log u is what stays
        return tau * (log_u + self.rho), weights

    def worst_case(self, losses: Tensor) -> tuple[Tensor, Tensor]:
        """(6.16) and the weights of its gradient, at the tau whose weights have the radius."""
        tau = self.best_tau(losses)
        log_g, log_share = tilted(losses, tau)
        return tau * (log_g + self.rho), log_share.exp()

    def best_tau(self, losses: Tensor) -> Tensor:
        """The minimiser () of (6.16) over tau: the divergence is rho there, or less at tau_0."""
        low = losses.new_full((), self.tau_0)
        # the divergence is at most (max - min)^2 / (8 tau^2)
        high = torch.maximum(low, (losses.amax() - losses.amin()) / (8 * self.rho) ** 0.5)
        for _ in range(BISECTIONS):
            tau = (low * high).sqrt()
            log_share = tilted(losses, tau)[1]
            divergence = (log_share.exp() * log_share).mean()
            low = torch.where(divergence > self.rho, tau, low)
            high = torch.where(divergence > self.rho, high, tau)
        return low

    def state_metrics(self) -> dict[str, Tensor]:
        """Log u and tau."""
        log_u = torch.where(self.inner.visited, self.inner.u, float("nan"))[0]
        return {"log_u": log_u, "tau": self.tau.current()}
