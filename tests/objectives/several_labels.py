"""Batches of three labels, and the loops of one label applied to each."""

from collections.abc import Callable
from typing import Any

import torch

from tests.contract import Batch

F64 = torch.float64
LABELS = 3
OneLabel = Callable[[int, list[float], list[bool], dict[int, Any]], tuple[float, list[float]]]


def three_labels(generator: torch.Generator) -> Batch:
    """Nine rows of seven samples; every label has both classes but the last, which may lack one."""
    samples = torch.randperm(12, generator=generator)[:7]
    index = samples[torch.tensor([0, 1, 2, 0, 3, 4, 5, 6, 6])]
    targets = torch.zeros(9, LABELS, dtype=torch.long)
    targets[:4, 0], targets[2:8, 1] = 1, 1
    targets[:, 2] = int(torch.randint(2, (), generator=generator))
    scores = torch.randn(9, LABELS, generator=generator, dtype=F64)
    order = torch.randperm(9, generator=generator)
    return Batch(scores, targets, {"index": index}).rows(order)


def each_label(
    batch: Batch, u: dict[int, Any], one: OneLabel, usable: Callable[[list[bool]], bool]
) -> tuple[float, dict[str, Any]]:
    """Mean over usable labels of ``one(label, scores, positive, u)``; keys: sample L + label."""
    columns = [batch.targets[:, k].bool().tolist() for k in range(LABELS)]
    used = [k for k in range(LABELS) if usable(columns[k])]
    loss, gradient = 0.0, [[0.0] * LABELS for _ in batch.scores]
    for k in used:
        own = {key // LABELS: value for key, value in u.items() if key % LABELS == k}
        value, slope = one(k, batch.scores[:, k].tolist(), columns[k], own)
        u.update({sample * LABELS + k: v for sample, v in own.items()})
        loss += value / len(used)
        for row, s in enumerate(slope):
            gradient[row][k] = s / len(used)
    return loss, {"scores": gradient}
