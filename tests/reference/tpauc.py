"""Algorithm 31 (STACO)."""

from tests.reference.average_precision import loss_of, slope_of
from tests.reference.opauc import by_sample, mean, mean_of_tail

SHARED = -1  # the key of nu', where samples have theirs


def start(samples: list[int], duals: dict[int, tuple[float, ...]]) -> None:
    """Line 1: y and nu of each sample, and nu'; y, which the book leaves open, is 1."""
    for id in samples:
        duals.setdefault(id, (1.0, 0.0))
    duals.setdefault(SHARED, (0.0,))


def step(
    scores: list[float],
    positive: list[bool],
    sample: list[int],
    duals: dict[int, tuple[float, ...]],
    *,
    min_tpr: float,
    max_fpr: float,
    nu_lr: float,
    y_lr: float,
) -> tuple[float, list[float]]:
    """One step on a mini-batch: loss, gradient in the scores, ``duals`` updated in place."""
    rows = range(len(scores))
    anchors = [i for i in rows if positive[i]]  # line 3
    negatives = [j for j in rows if not positive[j]]  # line 3
    nu = {i: duals[sample[i]][1] for i in anchors}
    (shared,) = duals[SHARED]
    p, g = dict[tuple[int, int], float](), dict[int, float]()
    for i in anchors:
        losses = {j: loss_of(scores[j] - scores[i]) for j in negatives}
        p |= {(i, j): 1.0 if losses[j] - nu[i] > 0 else 0.0 for j in negatives}  # line 4
        excess = mean([max(losses[j] - nu[i], 0.0) for j in negatives])
        g[i] = excess + max_fpr * (nu[i] - shared)  # below (6.32)
    y = {}
    for id, value in by_sample(anchors, sample, g).items():  # line 5
        y[id] = min(max(duals[id][0] + y_lr * value, 0.0), 1.0)  # line 6, with a plus
    slack = {i: y[sample[i]] * (max_fpr - mean([p[i, j] for j in negatives])) for i in anchors}
    for id, value in by_sample(anchors, sample, slack).items():
        duals[id] = (y[id], duals[id][1] - nu_lr * value)  # line 6; line 8: others stay
    share = max_fpr * ((1 - min_tpr) - mean([y[sample[i]] for i in anchors]))
    duals[SHARED] = (shared - nu_lr * share,)  # line 9
    loss, gradient = (1 - min_tpr) * max_fpr * shared, [0.0 for _ in rows]
    for i in anchors:
        loss += y[sample[i]] * g[i] / len(anchors)  # the saddle function of (6.32)
        for j in negatives:  # line 10
            slope = y[sample[i]] * p[i, j] * slope_of(scores[j] - scores[i])
            gradient[j] += slope / (len(anchors) * len(negatives))
            gradient[i] -= slope / (len(anchors) * len(negatives))
    return loss, gradient


def mean_of_corner(
    scores: list[float], positive: list[bool], min_tpr: float, max_fpr: float
) -> float:
    """(6.29): mean loss of the lowest positives and the highest negatives."""
    pos = [s for s, y in zip(scores, positive, strict=True) if y]
    neg = [s for s, y in zip(scores, positive, strict=True) if not y]
    own = [mean_of_tail([loss_of(t - s) for t in neg], max_fpr) for s in pos]  # (6.30)
    return mean_of_tail(own, 1 - min_tpr)  # (6.31)
