"""Algorithm 28 (SOAP)."""

from tests.reference.tracking import track


def loss_of(s: float, margin: float = 1.0) -> float:
    """The squared hinge."""
    return max(s + margin, 0.0) ** 2


def slope_of(s: float, margin: float = 1.0) -> float:
    """Its derivative."""
    return 2 * max(s + margin, 0.0)


def step(
    scores: list[float],
    positive: list[bool],
    sample: list[int],
    u: dict[int, tuple[float, float]],
    *,
    gamma: float,
    prior: float | None = None,
) -> tuple[float, list[float]]:
    """One step on a mini-batch: loss, gradient in the scores, ``u`` updated in place."""
    rows = range(len(scores))
    anchors = [i for i in rows if positive[i]]  # line 3
    weight = {j: 1 / len(scores) for j in rows}  # 1 / (B_1 + B_2)
    if prior is not None:  # not in the book: each class weighs its share of the data
        for j in rows:
            mates = sum(positive[k] == positive[j] for k in rows)
            weight[j] = (prior if positive[j] else 1 - prior) / mates
    first = {sample: values[0] for sample, values in u.items()}
    second = {sample: values[1] for sample, values in u.items()}
    observed_first, observed_second = [], []
    for i in anchors:  # line 4
        g1 = sum(weight[j] * loss_of(scores[j] - scores[i]) for j in rows if positive[j])
        g2 = sum(weight[j] * loss_of(scores[j] - scores[i]) for j in rows)
        observed_first.append((sample[i], g1))  # line 5
        observed_second.append((sample[i], g2))  # line 5
    own_first = track(first, observed_first, gamma, None)  # line 5; lines 6, 7: others stay
    own_second = track(second, observed_second, gamma, None)
    u.update({sample: (first[sample], second[sample]) for sample in first})
    loss, gradient = 0.0, [0.0 for _ in rows]
    for i, u1, u2 in zip(anchors, own_first, own_second, strict=True):
        loss -= u1 / u2 / len(anchors)  # f of (6.22)
        for j in rows:
            p = (u1 - (u2 if positive[j] else 0.0)) / u2**2  # line 8
            push = weight[j] * p * slope_of(scores[j] - scores[i]) / len(anchors)  # line 8
            gradient[j] += push
            gradient[i] -= push
    return loss, gradient
