"""Likelihoods under the reference policy, computed once by the initial model and kept in a file."""

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from llm_xrisk.trainers.checkpoint import save_tensors

COLUMN = "ref_log_likelihoods"
_TENSOR = "ref_log_likelihood"
Job = tuple[Sequence[int], Sequence[int]]


def reference_likelihoods(
    rows: Any,
    path: Path,
    compute: Callable[[list[Job]], Tensor],
    *,
    initial: bool,
    write: bool,
) -> list[list[float]]:
    """Log pi_ref of every negative of every row of a data set.

    Args:
        rows: Rows with ``prompt_ids`` and ``negative_ids``.
        path: The file that keeps them for a resumed run.
        compute: From (prompt, negative) pairs to one likelihood each, by the current model.
        initial: Whether the current model is the reference.
        write: Whether this process writes the file.

    Raises:
        FileNotFoundError: the model has moved on and there is no file.
        ValueError: the file belongs to other rows.
    """
    rows = [(row["prompt_ids"], row["negative_ids"]) for row in rows]
    identity = _identity(rows)
    if initial:
        values = compute([(prompt, ids) for prompt, negatives in rows for ids in negatives])
        if write:
            path.parent.mkdir(parents=True, exist_ok=True)
            save_tensors({_TENSOR: values}, path, {"rows": identity})
    else:
        values = _read(path, identity)
    sizes = [len(negatives) for _, negatives in rows]
    return [part.tolist() for part in values.split(sizes)]


def with_reference(rows: Any, values: list[list[float]]) -> Any:
    """A data set with the likelihoods as a column."""
    if hasattr(rows, "add_column"):
        if COLUMN in rows.column_names:
            rows = rows.remove_columns(COLUMN)
        return rows.add_column(COLUMN, values)
    return [dict(row) | {COLUMN: value} for row, value in zip(rows, values, strict=True)]


def _read(path: Path, identity: str) -> Tensor:
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} is missing, and the model has been trained since it was the reference; "
            "restore the file, or use a pool, whose rows have ref_log_likelihoods"
        )
    with safe_open(path, framework="pt") as file:
        found = (file.metadata() or {}).get("rows")
    if found != identity:
        raise ValueError(
            f"{path} holds reference likelihoods of other rows than this data set's; resume with "
            "the data set the run started with, or use a pool, whose rows have ref_log_likelihoods"
        )
    return load_file(path)[_TENSOR]


def _identity(rows: list[tuple[Sequence[int], Sequence[Sequence[int]]]]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for prompt, negatives in rows:
        digest.update(repr((list(prompt), [list(ids) for ids in negatives])).encode())
    return digest.hexdigest()
