"""The moving average of the inner value of each sample, in the linear domain."""


def track(
    u: dict[int, float], observed: list[tuple[int, float]], gamma: float, initial: float | None
) -> list[float]:
    """u_i <- (1 - gamma) u_i + gamma g_i of each observation; a sample keeps the mean of its own.

    Figure 6.21 and the text below Algorithm 34: every view of a sample computes with its own u,
    and then the u of the views are averaged.
    """
    values = []
    for sample, g in observed:
        if sample in u:
            values.append((1 - gamma) * u[sample] + gamma * g)
        elif initial is None:  # section 6.4.2: the first visit stores the mini-batch value
            values.append(g)
        else:
            values.append((1 - gamma) * initial + gamma * g)
    for sample in {sample for sample, _ in observed}:
        own = [v for v, (other, _) in zip(values, observed, strict=True) if other == sample]
        u[sample] = sum(own) / len(own)
    return values
