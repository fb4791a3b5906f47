"""Pairwise surrogates l(s) of 1[s >= 0], s the score of a negative minus that of a positive.

Each is non-decreasing in ``s``, acts elementwise and knows its slope, so that an objective of all
pairs needs one matrix for its gradient instead of one for every operation of l.
"""

import math
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor

from llm_xrisk.fcco.arguments import fits, shown


@runtime_checkable
class Surrogate(Protocol):
    """A function l and its derivative."""

    def __call__(self, s: Tensor) -> Tensor:
        """Return l(s)."""
        ...

    def with_slope(self, s: Tensor) -> tuple[Tensor, Tensor]:
        """Return l(s) and l'(s), which may be one number where it is constant."""
        ...


def _check_number(name: str, value: float, above: float = -math.inf) -> None:
    if not (fits(value, float) and above < value < math.inf):
        need = "a finite number" if above < 0 else "a positive number"
        raise ValueError(f"{name} must be {need}, got {shown(value)}; 1.0 is the default")


@dataclass(frozen=True)
class Identity:
    """l(s) = s: what the authors of DisCO use."""

    def __call__(self, s: Tensor) -> Tensor:
        """Return s."""
        return s

    def with_slope(self, s: Tensor) -> tuple[Tensor, Tensor]:
        """Return s and 1."""
        return s, s.new_ones(())


IDENTITY = Identity()


@dataclass(frozen=True)
class Hinge:
    """l(s) = [margin + s]_+."""

    margin: float = 1.0

    def __post_init__(self) -> None:
        _check_number("margin", self.margin)

    def __call__(self, s: Tensor) -> Tensor:
        """Return [margin + s]_+."""
        return F.relu(s + self.margin)

    def with_slope(self, s: Tensor) -> tuple[Tensor, Tensor]:
        """Return l(s), and 1 where s > -margin, else 0."""
        value = self(s)
        return value, value.sign()


@dataclass(frozen=True)
class SquaredHinge:
    """l(s) = [margin + s]_+^2.

    Example:
        >>> l = SquaredHinge(margin=0.5)
        >>> l.with_slope(torch.tensor(1.0))
        (tensor(2.2500), tensor(3.))
    """

    margin: float = 1.0

    def __post_init__(self) -> None:
        _check_number("margin", self.margin)

    def __call__(self, s: Tensor) -> Tensor:
        """Return [margin + s]_+^2."""
        return F.relu(s + self.margin).square()

    def with_slope(self, s: Tensor) -> tuple[Tensor, Tensor]:
        """Return l(s) and 2 [margin + s]_+."""
        rise = (s + self.margin).relu_()
        return rise.square(), rise.mul_(2)


SQUARED_HINGE = SquaredHinge()


@dataclass(frozen=True)
class Squared:
    """l(s) = (margin + s)^2; non-decreasing only for s >= -margin."""

    margin: float = 1.0

    def __post_init__(self) -> None:
        _check_number("margin", self.margin)

    def __call__(self, s: Tensor) -> Tensor:
        """Return (margin + s)^2."""
        return (s + self.margin).square()

    def with_slope(self, s: Tensor) -> tuple[Tensor, Tensor]:
        """Return l(s) and 2 (margin + s)."""
        rise = s + self.margin
        return rise.square(), rise.mul_(2)


@dataclass(frozen=True)
class Logistic:
    """l(s) = log(1 + exp(s / scale)), without overflow."""

    scale: float = 1.0

    def __post_init__(self) -> None:
        _check_number("scale", self.scale, above=0.0)

    def __call__(self, s: Tensor) -> Tensor:
        """Return log(1 + exp(s / scale))."""
        return F.softplus(s / self.scale)

    def with_slope(self, s: Tensor) -> tuple[Tensor, Tensor]:
        """Return l(s) and sigmoid(s / scale) / scale."""
        return self(s), torch.sigmoid(s / self.scale) / self.scale
