"""Batches of pairs: two views, two modalities, or an anchor and its match."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from llm_xrisk.fcco.arguments import shown


@dataclass
class ViewsCollator:
    """Collates rows with the columns ``first``, ``second`` and ``index``.

    A view is a text (tokenised here), an array or tensor (stacked), or a mapping of these. A data
    set may make its views anew whenever a row is read: random augmentations belong there. Where
    rows have a reference model's features, ``ref_scores`` and ``ref_targets``, these are stacked.

    Args:
        processing_class: Tokenizer, for texts.
        input_name: What the model calls an array: its ``main_input_name``.
        max_length: Longest text in tokens, for the tokenizer; None is its own limit.

    Raises:
        ValueError: a row without a view, or texts without a tokenizer.

    Example:
        >>> rows = [{"first": [0.0, 1.0], "second": [1.0, 0.0], "index": 3}]
        >>> batch = ViewsCollator(input_name="pixel_values")(rows)
        >>> batch["first"]["pixel_values"].shape, batch["index"]
        (torch.Size([1, 2]), tensor([3]))
    """

    processing_class: Any = None
    input_name: str = "input_ids"
    max_length: int | None = None

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Return ``first`` and ``second``, each the inputs of a model, and ``index`` (B,)."""
        if not rows:
            raise ValueError("got a batch of no rows; give the loader a batch size of at least 1")
        columns = {"first", "second"} | ({"index", "ref_scores", "ref_targets"} & set(rows[0]))
        for row in rows:
            _require(row, columns)
        batch: dict[str, Any] = {
            side: self._inputs([row[side] for row in rows], side) for side in ("first", "second")
        }
        if "index" in columns:
            batch["index"] = torch.tensor([int(row["index"]) for row in rows])
        for name in sorted(columns & {"ref_scores", "ref_targets"}):
            batch[name] = _stacked([row[name] for row in rows], name)
        return batch

    def _inputs(self, views: list[Any], side: str) -> dict[str, Tensor]:
        kinds = {_kind(view) for view in views}
        if len(kinds) > 1:
            raise ValueError(
                f"got views of several kinds in {side!r}: {sorted(kinds)}; make all texts, all "
                "arrays of one shape, or all mappings of the same inputs"
            )
        if isinstance(views[0], Mapping):
            return {name: _stacked([view[name] for view in views], side) for name in views[0]}
        if not isinstance(views[0], str):
            return {self.input_name: _stacked(views, side)}
        tokenizer = self.processing_class
        if tokenizer is None or isinstance(tokenizer, str):
            raise ValueError(
                f"got texts ({views[0][:40]!r}) and no tokenizer but {tokenizer!r}; pass "
                "processing_class=AutoTokenizer.from_pretrained(...)"
            )
        limit = {"truncation": True} | ({"max_length": self.max_length} if self.max_length else {})
        return dict(tokenizer(views, padding=True, return_tensors="pt", **limit))


def _require(row: Any, columns: set[str]) -> None:
    """Refuse a row that lacks one of the columns, or whose index is no number."""
    missing = sorted(columns - set(row)) if isinstance(row, Mapping) else sorted(columns)
    if missing:
        held = sorted(row) if isinstance(row, Mapping) else shown(row)
        raise ValueError(
            f"a row has {held} and lacks {missing}; give each row two views, and a number by "
            "llm_xrisk.data.with_index(dataset)"
        )
    if "index" in columns and not hasattr(row["index"], "__index__"):
        raise ValueError(
            f"a row has the index {shown(row['index'])}; it must be an integer from 0 up: number "
            "the rows by llm_xrisk.data.with_index(dataset)"
        )


def _kind(view: Any) -> str:
    """What a view is, in words."""
    if isinstance(view, Mapping):
        return f"mapping of {sorted(view)}"
    return "text" if isinstance(view, str) else "array"


def _stacked(views: list[Any], side: str) -> Tensor:
    try:
        return torch.stack([torch.as_tensor(view) for view in views])
    except (RuntimeError, TypeError, ValueError) as error:
        got = ", ".join(dict.fromkeys(map(shown, views)))
        raise ValueError(
            f"got {side!r} that make no tensor: {got[:200]}; they must be arrays of one shape (or "
            "texts): transform images in the data set, or pass a data_collator"
        ) from error
