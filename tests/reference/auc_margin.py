"""Algorithm 27 (PDMA, PDAdam) without its line 6, which is the optimizer's."""

Saddle = tuple[float, float, float]


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def objective(pos: list[float], neg: list[float], saddle: Saddle, margin: float) -> float:
    """(6.21) at a, b and alpha."""
    a, b, alpha = saddle
    spread = mean([(h - a) ** 2 for h in pos]) + mean([(h - b) ** 2 for h in neg])
    return spread + alpha * (margin + mean(neg) - mean(pos)) - alpha**2 / 4


def closed_form(pos: list[float], neg: list[float], margin: float, *, hinge: bool) -> Saddle:
    """a, b and alpha at the saddle of (6.21)."""
    alpha = 2 * (margin + mean(neg) - mean(pos))
    return mean(pos), mean(neg), max(alpha, 0.0) if hinge else alpha


def step(
    scores: list[float],
    positive: list[bool],
    state: dict[int, Saddle],
    *,
    gamma: float,
    label: int = 0,
    margin: float = 1.0,
    hinge: bool = True,
) -> tuple[float, list[float], tuple[float, float]]:
    """One mini-batch of one label: loss, gradient in the scores, gradients in a and b.

    ``state`` holds (a, b, alpha) of each label; alpha is updated in place.
    """
    pos = [h for h, y in zip(scores, positive, strict=True) if y]  # line 3
    neg = [h for h, y in zip(scores, positive, strict=True) if not y]  # line 3
    if label not in state:  # line 1: the starting point, for which the book has no rule
        state[label] = closed_form(pos, neg, margin, hinge=hinge)
    a, b, alpha = state[label]
    tau = 2 * gamma
    new = (1 - tau / 2) * alpha + tau * (margin + mean(neg) - mean(pos))  # line 4
    state[label] = (a, b, max(new, 0.0) if hinge else new)  # line 4
    gradient = [
        (2 * (h - a) - alpha) / len(pos) if y else (2 * (h - b) + alpha) / len(neg)  # line 5
        for h, y in zip(scores, positive, strict=True)
    ]
    in_a, in_b = mean([2 * (a - h) for h in pos]), mean([2 * (b - h) for h in neg])  # line 5
    return objective(pos, neg, (a, b, alpha), margin), gradient, (in_a, in_b)
