"""The objectives of GRPO, Dr. GRPO and DAPO, token by token."""

import math


def token_term(ratio: float, advantage: float, low: float, high: float) -> float:
    """f of (6.64): min(r A, clip(r) A)."""
    clipped = min(max(ratio, 1 - low), 1 + high)
    return min(ratio * advantage, clipped * advantage)


def advantages(rewards: list[float], group: list[int], std: str | None) -> list[float]:
    """(6.66) of each answer; ``std`` None leaves out the denominator."""
    result = []
    for reward, question in zip(rewards, group, strict=True):
        mates = [r for r, g in zip(rewards, group, strict=True) if g == question]
        mean = sum(mates) / len(mates)
        spread = sum((r - mean) ** 2 for r in mates)
        if spread == 0:
            result.append(0.0)
        elif std is None:
            result.append(reward - mean)
        else:
            count = len(mates) if std == "population" else len(mates) - 1
            result.append((reward - mean) / math.sqrt(spread / count))
    return result


def row_weights(
    rewards: list[float], group: list[int], length: list[float], kind: str, valid_only: bool
) -> list[float]:
    """Weight of the sum over tokens of each answer in the mean that ``kind`` takes."""
    mixed = {
        question
        for question in group
        if len({r for r, g in zip(rewards, group, strict=True) if g == question}) == 2
    }
    counted = mixed if valid_only else set(group)
    tokens = sum(n for n, g in zip(length, group, strict=True) if g in counted)
    result = []
    for question, size in zip(group, length, strict=True):
        if question not in counted:
            result.append(0.0)
        elif kind == "dapo":
            result.append(1 / tokens)  # one mean over all tokens
        else:
            share = 1 / (len(counted) * group.count(question))  # 1/m sum_i 1/K sum_j of (6.64)
            result.append(share / (size if kind == "grpo" else 10))  # 1/|y|, or 1/L with L = 10
    return result
