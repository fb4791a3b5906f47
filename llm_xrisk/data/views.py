"""Batches of pairs: two views, two modalities, or an anchor and its match."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass
class ViewsCollator:
    """Collates rows with the columns ``first``, ``second`` and ``index``.

    A view is a text (tokenised here), an array or tensor (stacked), or a mapping of these. A data
    set may make its views anew whenever a row is read: random augmentations belong there.

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
        missing = sorted({"first", "second"} - set(rows[0]))
        if missing:
            raise ValueError(
                f"a row has {sorted(rows[0])} and lacks {missing}; give each row two views, and a "
                "number by llm_xrisk.data.with_index(dataset)"
            )
        batch: dict[str, Any] = {
            side: self._inputs([row[side] for row in rows]) for side in ("first", "second")
        }
        if "index" in rows[0]:
            batch["index"] = torch.tensor([int(row["index"]) for row in rows])
        return batch

    def _inputs(self, views: list[Any]) -> dict[str, Tensor]:
        if isinstance(views[0], Mapping):
            return {name: _stacked([view[name] for view in views]) for name in views[0]}
        if not isinstance(views[0], str):
            return {self.input_name: _stacked(views)}
        if self.processing_class is None:
            raise ValueError(
                f"got texts ({views[0][:40]!r}) and no tokenizer; pass processing_class"
            )
        limit = {"truncation": True} | ({"max_length": self.max_length} if self.max_length else {})
        return dict(self.processing_class(views, padding=True, return_tensors="pt", **limit))


def _stacked(views: list[Any]) -> Tensor:
    return torch.stack([torch.as_tensor(view) for view in views])
