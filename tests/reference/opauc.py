"""Algorithm 29 (SOPA)."""

from tests.reference.average_precision import loss_of, slope_of


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def by_sample(rows: list[int], sample: list[int], values: dict[int, float]) -> dict[int, float]:
    """Mean of the values of the rows of each sample: several rows of one take one step."""
    ids = {sample[i] for i in rows}
    return {id: mean([values[i] for i in rows if sample[i] == id]) for id in ids}


def step(
    scores: list[float],
    positive: list[bool],
    sample: list[int],
    nu: dict[int, float],
    *,
    max_fpr: float,
    nu_lr: float,
) -> tuple[float, list[float]]:
    """One step on a mini-batch: loss, gradient in the scores, ``nu`` updated in place."""
    rows = range(len(scores))
    anchors = [i for i in rows if positive[i]]  # line 3
    negatives = [j for j in rows if not positive[j]]  # line 3
    loss, gradient, slack = 0.0, [0.0 for _ in rows], dict[int, float]()
    for i in anchors:
        own = nu[sample[i]]
        losses = {j: loss_of(scores[j] - scores[i]) for j in negatives}
        p = {j: 1.0 if losses[j] - own > 0 else 0.0 for j in negatives}  # line 4
        slack[i] = max_fpr - mean(list(p.values()))  # line 6
        excess = mean([max(losses[j] - own, 0.0) for j in negatives])
        loss += (max_fpr * own + excess) / len(anchors)  # (6.26)
        for j in negatives:  # line 9
            push = p[j] * slope_of(scores[j] - scores[i]) / (len(anchors) * len(negatives))
            gradient[j] += push
            gradient[i] -= push
    for id, value in by_sample(anchors, sample, slack).items():  # line 5; line 8: others stay
        nu[id] -= nu_lr * value  # line 6
    return loss, gradient


def mean_of_tail(losses: list[float], share: float) -> float:
    """Mean of the largest ``share`` of the losses, (6.24); the number of them is an integer."""
    k = round(share * len(losses))
    return mean(sorted(losses, reverse=True)[:k])
