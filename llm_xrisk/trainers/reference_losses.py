"""Losses of a reference model, computed once and kept in a file by example and tokenisation."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from llm_xrisk.trainers.checkpoint import save_tensors


@dataclass(frozen=True)
class Provenance:
    """Whose losses a file holds.

    Attributes:
        level: "sequence" for the sum over each response, "token" for its tokens one by one.
        name: Of the reference model; "" is the model that training started from.
        fingerprint: Of its weights; None where they are not at hand, and not compared.
    """

    level: str
    name: str = ""
    fingerprint: str | None = None


class ReferenceLosses(Mapping[int, Tensor]):
    """The reference's losses by an example's index: (1,) its sum, or (length,) its tokens'.

    Args:
        index: Of the examples.
        sizes: How many losses each has.
        losses: All of them, one example after the other.

    Example:
        >>> known = ReferenceLosses([7, 4], [1, 2], torch.tensor([0.5, 1.0, 2.0]))
        >>> known[4]
        tensor([1., 2.])
    """

    def __init__(self, index: Sequence[int], sizes: Sequence[int], losses: Tensor) -> None:
        self._places: dict[int, slice] = {}
        end = 0
        for number, size in zip(index, sizes, strict=True):
            self._places[number] = slice(end, end := end + size)
        self.losses = losses

    def __getitem__(self, index: int) -> Tensor:
        return self.losses[self._places[index]]

    def __iter__(self) -> Any:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


def write_losses(path: Path, rows: Any, losses: Tensor, provenance: Provenance) -> None:
    """Write the losses of a data set, whole or not at all.

    Args:
        path: The file.
        rows: Rows with ``index``, ``prompt_ids`` and ``completion_ids``.
        losses: Theirs, one row after the other.
        provenance: Whose they are.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {
        "index": torch.tensor([int(row["index"]) for row in rows]),
        "tokenisation": torch.tensor([_digest(row) for row in rows]),
        "sizes": torch.tensor(sizes_of(rows, provenance.level)),
        "losses": losses,
    }
    about = {"level": provenance.level, "name": provenance.name}
    save_tensors(tensors, path, about | {"fingerprint": provenance.fingerprint or ""})


def read_losses(path: Path, rows: Any, provenance: Provenance) -> ReferenceLosses:
    """Read what :func:`write_losses` wrote, of these rows or of more.

    Raises:
        ValueError: the file is stale: it holds another model's losses or those of another level,
            lacks an example, or has one that was tokenised differently.
    """
    _check_provenance(path, provenance)
    tensors = load_file(path)
    index, found = tensors["index"].tolist(), tensors["tokenisation"].tolist()
    known = dict(zip(index, found, strict=True))
    wanted = {int(row["index"]): _digest(row) for row in rows}
    missing = [number for number in wanted if number not in known]
    changed = [n for n, digest in wanted.items() if n in known and known[n] != digest]
    if missing or changed:
        what = f"lacks example {missing[0]}" if missing else f"has example {changed[0]} as others"
        raise _stale(
            path,
            f"it {what} ({len(missing)} of {len(wanted)} examples are not there, {len(changed)} "
            "have other tokens: another data set, tokenizer, template or max_length)",
        )
    return ReferenceLosses(index, tensors["sizes"].tolist(), tensors["losses"])


def sizes_of(rows: Any, level: str) -> list[int]:
    """How many losses each row has."""
    return [1 if level == "sequence" else len(row["completion_ids"]) for row in rows]


def _check_provenance(path: Path, wanted: Provenance) -> None:
    with safe_open(path, framework="pt") as file:
        about = file.metadata() or {}
    if "level" not in about:
        raise _stale(path, "it is no file of reference losses")
    if about["level"] != wanted.level:
        raise _stale(path, f"it holds {about['level']} losses, level is {wanted.level!r}")
    found, name = about["name"] or "the initial model", wanted.name or "the initial model"
    other = wanted.fingerprint is not None and about["fingerprint"] != wanted.fingerprint
    if about["name"] != wanted.name or other:
        raise _stale(
            path,
            f"it holds losses of {found} ({about['fingerprint']}), the reference is {name} "
            f"({wanted.fingerprint or 'as the run began'})",
        )


def _stale(path: Path, why: str) -> ValueError:
    return ValueError(
        f"the reference cache {path} is stale: {why}. Resume with the settings the run started "
        "with; for a new run delete the file, or name another one by reference_cache"
    )


def _digest(row: Mapping[str, Any]) -> int:
    """64 bits of a row's token ids and of where the response starts."""
    text = repr((list(map(int, row["prompt_ids"])), list(map(int, row["completion_ids"]))))
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big", signed=True)
