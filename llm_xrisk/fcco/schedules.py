"""Schedules of gamma: functions from an epoch (a float, 0 at the start) to the weight."""

import math
from collections.abc import Callable
from functools import partial

GammaSchedule = Callable[[float], float]


def constant(gamma: float) -> GammaSchedule:
    """The same gamma in every epoch.

    Example:
        >>> constant(0.9)(3.0)
        0.9
    """
    return partial(_constant, gamma=gamma)


def cosine(gamma_min: float, epochs: float) -> GammaSchedule:
    r"""FastCLIP's schedule: from 1 down to ``gamma_min`` over ``epochs``, then constant.

    .. math:: \gamma(e) = \tfrac12\big(1 + \cos(\pi e / E)\big)(1 - \gamma_{min}) + \gamma_{min}

    The authors use E of about half the training epochs.

    Example:
        >>> schedule = cosine(gamma_min=0.2, epochs=10)
        >>> [round(schedule(e), 3) for e in (0, 5, 10, 20)]
        [1.0, 0.6, 0.2, 0.2]
    """
    if not 0 < gamma_min <= 1:
        raise ValueError(f"gamma_min must be in (0, 1], got {gamma_min}")
    if epochs <= 0:
        raise ValueError(f"epochs must be positive, got {epochs}")
    return partial(_cosine, gamma_min=gamma_min, epochs=epochs)


def _constant(epoch: float, *, gamma: float) -> float:
    return gamma


def _cosine(epoch: float, *, gamma_min: float, epochs: float) -> float:
    progress = min(max(epoch / epochs, 0.0), 1.0)
    return 0.5 * (1 + math.cos(math.pi * progress)) * (1 - gamma_min) + gamma_min
