"""Global contrastive learning of two views with a temperature for each sample (section 6.5.3)."""

from typing import ClassVar

import torch

from llm_xrisk.fcco.schedules import GammaSchedule
from llm_xrisk.objectives.contrastive import GlobalContrastive
from llm_xrisk.objectives.temperatures import IndividualTemperature, Temperature


class RobustGlobalContrastive(GlobalContrastive):
    r"""Robust global contrastive loss, iSogCLR: a temperature for each sample, learned.

    .. math:: F(w) = \frac1n \sum_i \min_{\tau_0 \le \tau_i \le \tau_{max}} \Big\{ \tau_i \log \Big(
              \frac{1}{|S_i^-|} \sum_{x_j \in S_i^-} \exp\frac{\ell_i(w; x_j)}{\tau_i} \Big)
              + \tau_i \rho \Big\} \qquad (6.47)

    with l_i(w; x_j) = h_i^T h_j - h_i^T h_i^+: a sample with many similar ones, whose negatives
    are false, gets a large tau_i, one with few a small tau_i. Both views of a sample are anchors
    and share u_i and tau_i. Inner value g_i = mean_j exp(l_ij / tau_i), outer function
    f = tau_i log(eps + .) + tau_i rho, tracked as log u_i in the form of (6.14). The gradient in w
    is Algorithm 35, line 9; tau_i takes a projected momentum step along line 7,
    z_i = log(eps + u_i) + rho - mean_j p_ij l_ij / tau_i, which is rho - KL(p_i, uniform) at the
    exact u_i. The loss is the objective's value at u and tau.

    Args:
        num_samples: n, the number of samples.
        gamma: Weight of the new mini-batch value in (0, 1]; 0.9 in the authors' recipe.
        tau: First temperature; 0.1 in the authors' recipe.
        rho: Bound on KL(p_i, uniform), less than the log of the number of negatives; 0.3.
        lower: tau_0; 0.05.
        upper: tau_max; 0.7.
        lr: Step size of tau_i; 0.01.
        beta: Weight of the new gradient in the momentum of tau_i, in (0, 1]; 0.9.
        eps: Added to u inside the logarithm, Algorithm 35's epsilon >= 0.
        temperature: Module that takes the place of the temperatures above, for example a
            :class:`GlobalTemperature` or a network.
        state_dtype: dtype of the state.

    Shapes:
        scores (B, d) features of the first views, targets (B, d) of the second, index (B,).
        Features are scaled to length 1 here.

    State: log u, tau and its momentum, 13 bytes per sample.

    Departures: the book prints tau without index in line 9 and no projection in line 10; here
    they are tau_i and the clip to [tau_0, tau_max]. Line 7 has eps in the weights alone, here it
    is in the logarithm too, as the objective has it. u keeps the scale of the tau it was
    averaged at. Rows of one sample are never each other's negatives.

    Raises:
        ValueError: gamma outside (0, 1], eps < 0, unless 0 < lower <= tau <= upper, rho < 0,
            lr <= 0, beta outside (0, 1], or a missing index.

    Example:
        >>> objective = RobustGlobalContrastive(num_samples=2, tau=0.5, rho=0.3)
        >>> first = second = torch.eye(2)                   # every l is -1
        >>> objective(first, second, index=torch.tensor([0, 1])).loss  # 0.5 log exp(-2) + 0.15
        tensor(-0.8500)

    Relations: rho=0 and tau fixed is :class:`GlobalContrastive` with u relative to the positive;
    :class:`GlobalCLIP` is the same for images and texts.

    Source: book section 6.5.3, Algorithm 35; Qiu et al., ICML 2023.
    """

    relative: ClassVar[bool] = True

    def __init__(
        self,
        num_samples: int,
        gamma: float | GammaSchedule = 0.9,
        tau: float = 0.1,
        rho: float = 0.3,
        *,
        lower: float = 0.05,
        upper: float = 0.7,
        lr: float = 0.01,
        beta: float = 0.9,
        eps: float = 0.0,
        temperature: Temperature | None = None,
        state_dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(num_samples, gamma, tau, eps=eps, state_dtype=state_dtype)
        self.temperature = temperature or IndividualTemperature(
            num_samples,
            tau,
            rho,
            lower=lower,
            upper=upper,
            lr=lr,
            beta=beta,
            state_dtype=state_dtype,
        )
