"""Temperatures of contrastive objectives: constant, learned for all, learned for each sample.

Each is a module that maps the anchors' features and sample ids to one tau a row. A network that
predicts tau (:mod:`~llm_xrisk.objectives.temperature_network`) is another: its ``forward`` takes
the same features, which carry no gradient, and returns (R,) with the gradient of its weights.
``rho`` is the bound on KL(p, uniform) of (6.45) that a learned tau is the multiplier of.
"""

import math

import torch
from torch import Tensor

from llm_xrisk.fcco import PerSampleDual
from llm_xrisk.fcco.keyed import KeepsDtype


class Temperature(KeepsDtype):
    """One tau for each anchor.

    Args:
        rho: Bound on KL(p, uniform) >= 0; the objective adds tau rho.

    Attributes:
        learned: Whether tau moves, so that the objective has to work out its gradient.
        keyed: Whether it moves by :meth:`step`, for the samples of the batch.

    Raises:
        ValueError: rho < 0.
    """

    learned: bool = True
    keyed: bool = False

    def __init__(self, rho: float = 0.0) -> None:
        super().__init__()
        if not 0 <= rho < math.inf:
            raise ValueError(f"rho must be >= 0, got {rho}; it bounds a KL divergence")
        self.rho = rho

    def forward(self, features: Tensor, index: Tensor | None) -> Tensor:
        """Return tau (R,) of the anchors with ``features`` (R, d), detached, and ids ``index``."""
        raise TypeError(f"{type(self).__name__} does not define forward")

    def begin(self, partners: Tensor, index: Tensor) -> None:
        """See what the anchors are contrasted with (R, d), once before a training step's tau."""

    def step(self, z: Tensor, index: Tensor, where: Tensor) -> None:
        """Move the taus kept here against their gradient ``z`` (R,) on the rows ``where``."""


class ConstantTemperature(Temperature):
    """The same tau > 0 for every anchor, always.

    Example:
        >>> ConstantTemperature(0.5)(torch.zeros(2, 3), None)
        tensor([0.5000, 0.5000])
    """

    learned = False

    def __init__(self, tau: float, rho: float = 0.0) -> None:
        super().__init__(rho)
        if not 0 < tau < math.inf:
            raise ValueError(f"tau must be positive, got {tau}; recipes use 0.01 to 0.5")
        self.tau = tau

    def forward(self, features: Tensor, index: Tensor | None) -> Tensor:
        """Return tau for each row."""
        return features.new_full((features.shape[0],), self.tau)


class GlobalTemperature(Temperature):
    r"""One learned tau for all anchors, a parameter for any optimizer (6.49).

    The parameter is log(1/tau), CLIP's ``logit_scale``. It is put back into its bounds before
    every use in training, which is the projection of the step the optimizer took; at a bound
    it keeps its gradient. The objective's ``parameters()`` hold it: give them to the optimizer,
    without weight decay.

    Args:
        tau: First value.
        rho: Bound on KL(p, uniform), less than the log of the number of negatives: beyond it tau
            goes to ``lower``. 6.5 to 16 in the authors' recipes for batches of 1k to 5k.
        lower: tau_0; 0.01 is CLIP's bound of 100 on the scale.
        upper: Largest tau.
        state_dtype: dtype of the parameter, whatever ``.to()`` says.

    Example:
        >>> tau = GlobalTemperature(0.5)
        >>> tau(torch.zeros(2, 3), None)
        tensor([0.5000, 0.5000], grad_fn=<ExpandBackward0>)
    """

    def __init__(
        self,
        tau: float = 0.07,
        rho: float = 6.5,
        *,
        lower: float = 0.01,
        upper: float = 1.0,
        state_dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(rho)
        check_bounds(tau, lower, upper)
        self.smallest, self.largest = -math.log(upper), -math.log(lower)
        self.logit_scale = torch.nn.Parameter(torch.full((1,), -math.log(tau), dtype=state_dtype))

    def forward(self, features: Tensor, index: Tensor | None) -> Tensor:
        """Return tau for each row, with its gradient."""
        with torch.no_grad():
            inside = self.logit_scale.clamp(self.smallest, self.largest)
            if self.training:
                self.logit_scale.copy_(inside)
        scale = self.logit_scale if self.training else inside
        return torch.exp(-scale).to(features.dtype).expand(features.shape[0])


class IndividualTemperature(Temperature):
    """A learned tau for each sample, stepped by the objective itself (Algorithm 35, line 10).

    A sample's views share its tau, which moves by the mean of their gradients. In ``eval()``,
    where rows have other ids, every row has the first tau.

    Args:
        num_samples: n, the number of samples.
        tau: First value.
        rho: Bound on KL(p, uniform), less than the log of the number of negatives: beyond it tau
            goes to ``lower``. 0.3 in the authors' recipe for views, 6 to 8 for images and texts.
        lower: tau_0.
        upper: Largest tau. [0.05, 0.7] in the authors' recipe for views, [0.005, 0.05] for images
            and texts.
        lr: Step size; 0.01, and 0.03 for images and texts.
        beta: Weight of the new gradient in the momentum, in (0, 1]; 0.9, and 0.5.
        clip: Largest size of a gradient; 5 for images and texts.
        state_dtype: dtype of the state, whatever ``.to()`` says.

    State: tau and its momentum, 8 bytes per sample.

    Example:
        >>> tau = IndividualTemperature(num_samples=3, tau=0.5, lr=0.1, beta=1.0)
        >>> tau.step(torch.tensor([1.0]), torch.tensor([2]), torch.tensor([True]))
        >>> tau(torch.zeros(3, 4), torch.arange(3))
        tensor([0.5000, 0.5000, 0.4000])
    """

    keyed = True

    def __init__(
        self,
        num_samples: int,
        tau: float = 0.1,
        rho: float = 0.3,
        *,
        lower: float = 0.05,
        upper: float = 0.7,
        lr: float = 0.01,
        beta: float = 0.9,
        clip: float | None = None,
        state_dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(rho)
        check_bounds(tau, lower, upper)
        if clip is not None and clip <= 0:
            raise ValueError(f"clip must be positive, got {clip}; None does not clip")
        self.tau, self.clip = tau, clip
        self.dual = PerSampleDual(
            num_samples,
            initial=tau,
            lr=lr,
            beta=beta,
            lower=lower,
            upper=upper,
            state_dtype=state_dtype,
        )

    def forward(self, features: Tensor, index: Tensor | None) -> Tensor:
        """Return the present tau of each row's sample, without gradient."""
        if not self.training or index is None:
            return features.new_full((features.shape[0],), self.tau)
        return self.dual(index).to(features.dtype)

    def step(self, z: Tensor, index: Tensor, where: Tensor) -> None:
        """Take one projected step with momentum."""
        if not self.training:  # ids of another data set
            return
        self.dual.step(z if self.clip is None else z.clamp(-self.clip, self.clip), index, where)


def as_temperature(tau: float | Temperature) -> Temperature:
    """A number as the constant temperature it is.

    Raises:
        ValueError: a parameter, which would not be learned.

    Example:
        >>> as_temperature(0.1).learned
        False
    """
    if isinstance(tau, Tensor) and tau.requires_grad:
        raise ValueError("got tau as a tensor that learns; pass GlobalTemperature(tau)")
    return tau if isinstance(tau, Temperature) else ConstantTemperature(float(tau))


def check_bounds(tau: float, lower: float, upper: float) -> None:
    """Refuse a first value outside its bounds, and bounds that hold no temperature.

    Raises:
        ValueError: unless 0 < lower <= tau <= upper < infinity.
    """
    if not 0 < lower <= tau <= upper < math.inf:
        raise ValueError(
            f"need 0 < lower <= tau <= upper, got lower={lower}, tau={tau}, upper={upper}"
        )
