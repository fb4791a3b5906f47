"""Rows that do not belong together, and labels that are none: what an error says of them."""

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor

from llm_xrisk.fcco.groups import readable


def check_binary(objective: str, targets: Tensor) -> None:
    """Refuse targets other than 0 and 1, -1 and 1, or booleans; reads them on the host.

    Raises:
        ValueError: with the values that came.
    """
    if targets.dtype == torch.bool or targets.numel() == 0:
        return
    if not targets.is_floating_point():
        low, high = torch.aminmax(targets)
        if low.item() >= 0 and high.item() <= 1:
            return
    zero, signed = targets == 0, targets == -1
    known = zero | signed | (targets == 1)
    if not bool(known.all()) or (bool(zero.any()) and bool(signed.any())):
        listed = cast(list[float], targets.flatten().tolist())  # pyright: ignore[reportUnknownMemberType]
        raise ValueError(
            f"{objective} needs targets 0 or 1 (or -1 and 1, or booleans), got "
            f"{sorted({float(v) for v in listed})[:8]}; threshold them first, for example "
            "(targets >= 0.5)"
        )


def check_grades(objective: str, targets: Tensor) -> None:
    """Refuse grades of relevance that are none; on a CPU, where reading them costs no wait.

    Raises:
        ValueError: a grade below 0 or NaN.
    """
    if readable(targets) and targets.numel() and not bool((targets >= 0).all()):
        raise ValueError(
            f"{objective} needs grades of relevance >= 0 as targets, got one below 0 or NaN; "
            "0 is irrelevant"
        )


def wrong_shapes(
    objective: Any, given: Mapping[str, Tensor], need: Mapping[str, tuple[Any, ...]]
) -> ValueError:
    """The error for rows that do not fit: what came, what is needed, what to do."""
    got = ", ".join(f"{name} {tuple(t.shape)}" for name, t in given.items())
    wanted = ", ".join(f"{name} ({', '.join(map(str, s))})" for name, s in need.items())
    return ValueError(
        f"{type(objective).__name__} got {got} and needs {wanted}; {_reshaped(objective, given)}"
    )


def _reshaped(objective: Any, given: Mapping[str, Tensor]) -> str:
    """What to do about rows of other shapes, by what they look like."""
    scores, targets = given["scores"], given.get("targets")
    if len({t.shape[:1] for t in given.values()}) > 1:
        return "give each row one entry in each of them"
    if "query" in given:
        return (
            "rows of all queries stand one below the other: flatten (queries, items), with "
            "query=torch.arange(queries).repeat_interleave(items)"
        )
    if not objective.binary_targets:
        return objective.row_advice
    if scores.shape[1:] == (1,):
        return "drop the last dimension: scores.squeeze(-1), and that of targets likewise"
    if objective.num_labels is None and scores.dim() == 2 and scores.shape[1] == 2:
        return "of two logits a row's score is logits[:, 1] - logits[:, 0], and its target (rows)"
    if scores.dim() == 2 and targets is not None and targets.shape == scores.shape:
        return f"for {scores.shape[1]} labels at once build it with num_labels={scores.shape[1]}"
    return "give each row one entry: logits.squeeze(-1) are scores of one label"
