"""Rows of prompts and completions, padded into the batches that trainers score."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


def pad_rows(
    prompts: Sequence[Sequence[int]],
    completions: Sequence[Sequence[int]],
    *,
    pad_token_id: int,
    side: str = "left",
) -> dict[str, Any]:
    """Pad prompt + completion rows into one batch.

    Args:
        prompts: Token ids of each row's prompt.
        completions: Token ids of each row's completion, none empty.
        pad_token_id: What fills the padding; it is masked, so any id does.
        side: "left" aligns the starts of the completions (prompts padded left, completions
            right), so that logits are computed for few prompt positions; "right" pads whole rows.

    Returns:
        input_ids, attention_mask, completion_mask, each (R, T), and ``keep``, the number of
        trailing positions that hold all completions.

    Raises:
        ValueError: an empty prompt or completion, with its row.

    Example:
        >>> batch = pad_rows([[5], [6, 7]], [[8, 9], [9]], pad_token_id=0)
        >>> batch["input_ids"].tolist(), batch["keep"]
        ([[0, 5, 8, 9], [6, 7, 9, 0]], 2)
    """
    for name, rows in (("prompt", prompts), ("completion", completions)):
        empty = [number for number, row in enumerate(rows) if len(row) == 0]
        if empty:
            raise ValueError(
                f"got an empty {name} in row {empty[0]} of the batch ({len(empty)} in all); each "
                f"row needs at least one {name} token: filter such rows out of the dataset"
            )
    widest = max(map(len, prompts)) if side == "left" else 0
    length = max(max(widest, len(p)) + len(c) for p, c in zip(prompts, completions, strict=True))
    shape = (len(prompts), length)
    input_ids = torch.full(shape, pad_token_id, dtype=torch.long)
    attention_mask = torch.zeros(shape, dtype=torch.long)
    completion_mask = torch.zeros(shape, dtype=torch.bool)
    first = length
    for row, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        start = widest - len(prompt) if side == "left" else 0
        middle, end = start + len(prompt), start + len(prompt) + len(completion)
        input_ids[row, start:middle] = torch.as_tensor(prompt)
        input_ids[row, middle:end] = torch.as_tensor(completion)
        attention_mask[row, start:end] = 1
        completion_mask[row, middle:end] = True
        first = min(first, middle)
    return {
        "input_ids": input_ids,
        "attention_mask": attention_mask,
        "completion_mask": completion_mask,
        "keep": length - first,
    }


@dataclass
class DFTCollator:
    """Turns prompts with a gold answer and a pool of negatives into rows.

    Each prompt gives one gold row (target 1) and ``num_negatives`` rows (target 0) drawn without
    replacement from its pool; epochs go through the whole pool, turn after turn in a new order,
    before any negative returns. The draw depends on seed, index and epoch alone.

    Rows of the dataset need ``index``, ``prompt_ids``, ``completion_ids``, ``negative_ids`` and,
    for importance weights, ``ref_log_likelihoods``.

    Attributes:
        pad_token_id: Fills the padding.
        num_negatives: m, negatives per prompt and visit; prompts with fewer give what they have.
        seed: Of the draw.
        epoch: Set by the trainer at the start of each epoch.
        padding_side: See :func:`pad_rows`.
        reference: log pi_ref of every negative by index, where the rows do not have them.
    """

    pad_token_id: int
    num_negatives: int
    seed: int = 0
    epoch: int = 0
    padding_side: str = "left"
    reference: Sequence[Sequence[float]] | None = None

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Collate prompts into rows; see the class.

        Raises:
            ValueError: a missing column or an empty completion.
        """
        columns: dict[str, list[Any]] = {"prompt": [], "completion": [], "index": [], "target": []}
        reference: list[float] = []
        for row in rows:
            self._require(row)
            chosen = self.draw(int(row["index"]), len(row["negative_ids"]))
            completions = [row["completion_ids"], *(row["negative_ids"][j] for j in chosen)]
            columns["prompt"] += [row["prompt_ids"]] * len(completions)
            columns["completion"] += completions
            columns["index"] += [int(row["index"])] * len(completions)
            columns["target"] += [1.0, *(0.0 for _ in chosen)]
            known = row.get("ref_log_likelihoods")
            if known is None and self.reference is not None:
                known = self.reference[int(row["index"])]
            # not "or not chosen": whether a pass for likelihoods is due must not differ by batch,
            # for it is collective where parameters are sharded
            if known is not None or self.num_negatives == 0:
                known = known or ()
                reference += [0.0, *(known[j] for j in chosen)]
        batch = pad_rows(
            columns["prompt"],
            columns["completion"],
            pad_token_id=self.pad_token_id,
            side=self.padding_side,
        )
        batch["index"] = torch.tensor(columns["index"])
        batch["targets"] = torch.tensor(columns["target"])
        if len(reference) == len(columns["index"]):
            batch["ref_log_likelihood"] = torch.tensor(reference)
        return batch

    def draw(self, index: int, available: int) -> list[int]:
        """Which negatives of a pool of ``available`` the prompt sees in this epoch.

        Example:
            >>> collator = DFTCollator(pad_token_id=0, num_negatives=2)
            >>> first = collator.draw(index=3, available=4)
            >>> collator.epoch = 1
            >>> sorted(first + collator.draw(index=3, available=4))
            [0, 1, 2, 3]
        """
        m = min(self.num_negatives, available)
        if m == 0:
            return []
        start, turn, sequence = self.epoch * m, 0, list[int]()
        while len(sequence) < start + m:
            order = self._order(index, turn, available)
            # the visit that ends one turn and begins the next must not see a negative twice
            ending = sequence[len(sequence) - len(sequence) % m :]
            sequence += [j for j in order if j not in ending] + [j for j in order if j in ending]
            turn += 1
        return sequence[start : start + m]

    def _order(self, index: int, turn: int, available: int) -> list[int]:
        def key(j: int) -> bytes:
            return hashlib.blake2b(
                f"{self.seed}/{index}/{turn}/{j}".encode(), digest_size=8
            ).digest()

        return sorted(range(available), key=key)

    def _require(self, row: Mapping[str, Any]) -> None:
        needed = ("index", "prompt_ids", "completion_ids", "negative_ids")
        missing = [name for name in needed if row.get(name) is None]
        if missing:
            raise ValueError(
                f"the dataset row has columns {sorted(row)} and lacks {missing}; number the rows "
                "with llm_xrisk.data.with_index(dataset), and give each prompt its gold answer "
                "and negatives (llm_xrisk.data.load_pool(path).to_dataset())"
            )


def select_rows(batch: Mapping[str, Any], rows: Tensor) -> dict[str, Any]:
    """Keep the given rows of every tensor in a batch."""
    return {
        name: select_rows(value, rows)
        if isinstance(value, Mapping)
        else value[rows]
        if isinstance(value, Tensor)
        else value
        for name, value in batch.items()
    }
