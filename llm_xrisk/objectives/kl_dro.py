"""KL-regularised distributionally robust optimization (section 6.2.1)."""

from functools import partial

import torch
from torch import Tensor

from llm_xrisk.fcco import InnerEstimator, scent
from llm_xrisk.fcco.rules import Rule
from llm_xrisk.fcco.schedules import GammaSchedule
from llm_xrisk.objectives.robust import RobustObjective, only_key


class KLDRO(RobustObjective):
    r"""KL-regularised robust loss, ABSGD (AB-Momentum, AB-AdamW): weighs rows of high loss up.

    .. math:: F(w) = \tau \log \Big( \frac1n \sum_{i=1}^n \exp\frac{\ell_i(w)}{\tau} \Big)
              \qquad (6.11), (6.118)

    One inner value g = mean_i exp(l_i / tau), outer function f = tau log, tracked as log u in the
    form of (6.14). The gradient is Algorithm 24, line 5, the mean of exp(l_i / tau) / u grad l_i;
    the loss is the objective's value at u. A regulariser r(w) is the optimizer's weight decay.

    Args:
        gamma: Weight of the new mini-batch value in (0, 1]; 0.1 to 0.9 in the authors' recipes.
        tau: Temperature, not 0: large is the mean loss, small the largest loss; 0.5 in the
            authors' library. Below 0 rows of high loss weigh less, for noisy labels.
        log_alpha: Logarithm of SCENT's step size; with it Algorithm 26's rule replaces gamma by
            sigmoid(log_alpha + multiplier log u). About -log u makes that 1/2.
        multiplier: SCENT's exponent; 1 is SCENT, 0 is a constant gamma.
        state_dtype: dtype of the state.

    Shapes:
        scores (B,) the losses l_i of the rows; targets (B,) losses of a reference model, which
        are subtracted and carry no gradient, or None.

    State: log u, whether there is one, and the tau it belongs to: 9 bytes. A resumed run goes on
    with the tau it had; :meth:`set_tau` changes it and forgets u.

    Departures: the first mini-batch stores its value, as the text below (6.14) has it; the
    authors' library starts at u = 0 and weighs it 1 / gamma too high. With SCENT no weight
    exceeds e^60 times the batch's own.

    Raises:
        ValueError: gamma outside (0, 1], tau = 0.

    Example:
        >>> objective = KLDRO(tau=1.0)
        >>> objective(torch.tensor([0.0, 1.0])).loss            # log((1 + e) / 2)
        tensor(0.6201)

    Relations: gamma=1 is the softmax-weighted mini-batch; with targets this is DRRHO; with one
    u for each positive instead of one for all it is OPAUCSoft; KLConstrainedDRO learns tau.

    Source: book section 6.2.1, Algorithm 24, and section 6.9; Qi et al., TMLR 2023.
    """

    tau: Tensor

    def __init__(
        self,
        *,
        gamma: float | GammaSchedule = 0.9,
        tau: float = 0.5,
        log_alpha: float | None = None,
        multiplier: float = 1.0,
        state_dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.inner = InnerEstimator(
            1, gamma, log=True, rule=rule_of(log_alpha, multiplier), state_dtype=state_dtype
        )
        self.register_buffer("tau", torch.ones(1, dtype=state_dtype))
        self.set_tau(tau)

    def set_tau(self, tau: float) -> None:
        """Go on with another temperature, as in the two stages of the authors: 200, then 5/3.

        log u of the old temperature is no estimate at the new one: kept, weights would start
        u_new / u_old too large or small. So it is forgotten, and the next mini-batch stores its
        value. ``log_alpha`` stays as it was.

        Raises:
            ValueError: tau = 0.
        """
        if tau == 0:
            raise ValueError("tau must not be 0; take 0.5, or below 0 for noisy labels")
        self.tau.fill_(tau)
        self.inner.visited.fill_(False)

    def estimate(self, losses: Tensor) -> tuple[Tensor, Tensor]:
        """(6.11) at u, and the weights exp(l_i / tau) / u of Algorithm 24, line 5."""
        log_g, log_share = tilted(losses, self.tau[0])
        log_u = self.inner(log_g.reshape(1), only_key(losses))[0]
        return self.tau[0] * log_u, (log_share + (log_g - log_u)).exp()

    def worst_case(self, losses: Tensor) -> tuple[Tensor, Tensor]:
        """(6.11) and the weights of its gradient."""
        log_g, log_share = tilted(losses, self.tau[0])
        return self.tau[0] * log_g, log_share.exp()

    def state_metrics(self) -> dict[str, Tensor]:
        """Log u and tau."""
        log_u = torch.where(self.inner.visited, self.inner.u, float("nan"))[0]
        return {"log_u": log_u, "tau": self.tau[0].clone()}


def tilted(losses: Tensor, tau: Tensor) -> tuple[Tensor, Tensor]:
    """Log of g, the mean of exp(l / tau), (), and of the weights exp(l_i / tau) / g, (B,).

    Example:
        >>> tilted(torch.tensor([2.0, 2.0]), torch.tensor(0.5))
        (tensor(4.), tensor([0., 0.]))
    """
    # the difference is taken before the division: l / tau of 1e4 is exact to 5e-4 alone
    top = tau.sign() * (tau.sign() * losses).amax()
    exponent = (losses - top) / tau
    log_mean = exponent.exp().mean().log()
    return top / tau + log_mean, exponent - log_mean


def rule_of(log_alpha: float | None, multiplier: float) -> Rule | None:
    """SCENT where it has a step size, else None for the moving average."""
    if log_alpha is None:
        return None
    return partial(scent, log_alpha=log_alpha, multiplier=multiplier)
