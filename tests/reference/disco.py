"""The discriminative objectives (6.81) and (6.82) and the penalty of (6.85)."""

import math
from collections.abc import Callable

Function = Callable[[float], float]


def discriminative(
    scores: list[float],
    rewards: list[float],
    group: list[int],
    *,
    tau: float | None,
    surrogate: Function = lambda s: s,
    slope: Function = lambda s: 1.0,
    normalizer: str = "valid",
) -> tuple[float, list[float]]:
    """L_1 (``tau`` None) or L_2 of the rows, and its gradient in the scores."""
    rows = range(len(scores))
    loss, gradient, valid = 0.0, [0.0 for _ in rows], 0
    for question in set(group):  # E_x
        right = [i for i in rows if group[i] == question and rewards[i] == 1]
        wrong = [j for j in rows if group[j] == question and rewards[j] == 0]
        if not right or not wrong:
            continue
        valid += 1
        for i in right:  # E over pi_old^+
            losses = [surrogate(scores[j] - scores[i]) for j in wrong]
            if tau is None:
                inner = sum(losses) / len(wrong)  # (6.81)
                weights = [1 / len(wrong) for _ in wrong]
            else:
                total = sum(math.exp(value / tau) for value in losses)
                inner = tau * math.log(total / len(wrong))  # (6.82)
                weights = [math.exp(value / tau) / total for value in losses]
            loss += inner / len(right)
            for j, weight in zip(wrong, weights, strict=True):
                push = weight * slope(scores[j] - scores[i]) / len(right)
                gradient[j] += push
                gradient[i] -= push
    divisor = max(valid if normalizer == "valid" else len(set(group)), 1)
    return loss / divisor, [g / divisor for g in gradient]


def penalty(
    kl: list[float], length: list[float], *, delta: float, beta: float
) -> tuple[float, list[float]]:
    """beta [KL - delta]_+^2 with the mean over tokens, and its gradient in the sums ``kl``."""
    tokens = sum(length)
    excess = max(sum(kl) / tokens - delta, 0.0)  # the hinge of (6.85)
    return beta * excess**2, [2 * beta * excess / tokens for _ in kl]
