"""The moving average of the inner value of each sample, in the linear domain."""


def track(
    u: dict[int, float], observed: list[tuple[int, float]], gamma: float, initial: float | None
) -> None:
    """u_i <- (1 - gamma) u_i + gamma g_i, with the mean of the observations of one sample."""
    for sample in {sample for sample, _ in observed}:
        values = [g for other, g in observed if other == sample]
        g = sum(values) / len(values)
        if sample in u:
            u[sample] = (1 - gamma) * u[sample] + gamma * g
        elif initial is None:  # section 6.4.2: the first visit stores the mini-batch value
            u[sample] = g
        else:
            u[sample] = (1 - gamma) * initial + gamma * g
