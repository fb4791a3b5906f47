"""Algorithm 26 (SCENT) and the methods it is compared with (SOX, BSGD, ASGD, U-max)."""

import math


def inner_value(row: list[float], own: int, weight: list[float], num_classes: int) -> float:
    """Estimate of (1/K) sum_k exp(s_k - s_own) from the sampled classes."""
    total = 1 / num_classes  # the own class: exp(0), once in K
    for j, score in enumerate(row):
        if j != own:
            total += weight[j] * math.exp(score - row[own])
    return total


def next_nu(method: str, nu: float, g: float, options: dict[str, float]) -> float:
    """Line 6 of Algorithm 26, or what takes its place."""
    if method == "scent":  # closed form of line 6, as in the text, with nu left as it is
        alpha = math.exp(options["log_alpha"])
        return nu + math.log(1 + alpha * g) - math.log(1 + alpha * math.exp(nu))
    if method == "sox":
        return math.log((1 - options["gamma"]) * math.exp(nu) + options["gamma"] * g)
    if method == "bsgd":
        return math.log(g)
    return nu - math.exp(options["log_alpha"]) * (1 - g * math.exp(-nu))  # "asgd", "umax"


def step(
    scores: list[list[float]],
    own: list[int],
    sample: list[int],
    weight: list[list[float]],
    nu: dict[int, float],
    *,
    method: str,
    num_classes: int,
    **options: float,
) -> tuple[float, list[list[float]]]:
    """One step on a mini-batch: loss, gradient in the scores, ``nu`` updated in place."""
    size = len(scores)
    loss, gradient = 0.0, [[0.0 for _ in row] for row in scores]
    values = [
        inner_value(row, y, w, num_classes) for row, y, w in zip(scores, own, weight, strict=True)
    ]
    written: dict[int, list[float]] = {}
    for i, row in enumerate(scores):  # line 5
        g, seen = values[i], sample[i] in nu
        alike = [value for value, key in zip(values, sample, strict=True) if key == sample[i]]
        mean = sum(alike) / len(alike)
        if method in ("asgd", "umax"):
            used = nu[sample[i]] if seen else math.log(g)  # the old one
            start = nu[sample[i]] if seen else math.log(mean)
            if method == "umax" and used < math.log(g) - options["delta"]:
                used = math.log(g)
            if method == "umax" and start < math.log(mean) - options["delta"]:
                start = math.log(mean)
            kept = next_nu(method, start, mean, options)  # rows of one sample step by their mean
        else:  # the first visit stores the mini-batch value
            used = kept = next_nu(method, nu[sample[i]], g, options) if seen else math.log(g)
        written.setdefault(sample[i], []).append(kept)
        loss += used / size
        for j, score in enumerate(row):  # line 8
            if j != own[i]:
                p = weight[i][j] * math.exp(score - row[own[i]] - used)
                gradient[i][j] += p / size
                gradient[i][own[i]] -= p / size
    if method != "bsgd":
        for key, kept_by in written.items():  # rows of one sample keep the mean of their u
            nu[key] = math.log(sum(math.exp(v) for v in kept_by) / len(kept_by))
    return loss, gradient
