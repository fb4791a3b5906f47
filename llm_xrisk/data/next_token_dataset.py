"""Data sets of next tokens: documents, or prompts with responses, tokenised, and their batches."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from llm_xrisk.data.collators import pad_rows
from llm_xrisk.data.columns import check_counted
from llm_xrisk.data.drrho_dataset import _encode
from llm_xrisk.data.tokenize import _encode_text

IGNORED = -100
_FORMS = (
    frozenset({"prompt_ids", "completion_ids"}),
    frozenset({"prompt", "completion"}),
    frozenset({"messages"}),
    frozenset({"text"}),
)


def prepare_next_tokens(dataset: Any, *, tokenizer: Any, max_length: int) -> Any:
    """Tokenise a data set of whatever a language model predicts.

    Accepted rows: (a) ``prompt_ids`` and ``completion_ids``; (b) ``prompt`` and ``completion`` as
    text or messages; (c) ``messages``, of which the last one is the assistant's; (d) ``text``.
    Responses carry the labels in (a) to (c), and end in one end-of-sequence token unless they are
    cut at ``max_length``. A document (d) ends in one too; it is cut into pieces of ``max_length``,
    of which every token but the first has a label, and pieces of one token are left out.

    Args:
        dataset: A ``datasets.Dataset`` or any sequence of rows.
        tokenizer: Tokenizer of the model.
        max_length: Longest row in tokens, at least 2.

    Returns:
        A data set of rows (a), of the kind that was given.

    Raises:
        ValueError: other columns, a row or a data set without a labelled token, token rows longer
            than ``max_length``.
        TypeError: the rows cannot be counted, as those of a stream.
    """
    need = "give rows with text, or prompt and completion"
    check_counted(dataset, "rows are cut into pieces before training", need)
    form = next((form for form in _FORMS if form <= set(dataset[0])), None)
    if form is None:
        raise ValueError(
            f"the data set has columns {sorted(dataset[0])} and none to predict; give `text`, "
            "`prompt` and `completion` (text or messages), or `messages` that end in the "
            "assistant's"
        )
    if "text" in form:
        return _pieces(dataset, tokenizer, max_length)
    if "prompt_ids" not in form:
        dataset = _mapped(dataset, tokenizer, max_length)
    _check_rows(dataset, max_length)
    return dataset


def _mapped(dataset: Any, tokenizer: Any, max_length: int) -> Any:
    def encode(row: Mapping[str, Any], number: int) -> dict[str, Any]:
        return _encode({**row, "index": number}, tokenizer, max_length)

    if hasattr(dataset, "map"):
        return dataset.map(encode, with_indices=True)
    return [encode(row, number) for number, row in enumerate(dataset)]


def _pieces(dataset: Any, tokenizer: Any, max_length: int) -> Any:
    """Documents as rows, of which each first token is what the others are predicted from."""

    def cut(texts: Sequence[str]) -> dict[str, list[list[int]]]:
        found = [piece for text in texts for piece in _cut(tokenizer, text, max_length)]
        return {"prompt_ids": [p[:1] for p in found], "completion_ids": [p[1:] for p in found]}

    if hasattr(dataset, "map"):
        dataset = dataset.map(
            lambda rows: cut(rows["text"]), batched=True, remove_columns=dataset.column_names
        )
    else:
        columns = cut([row["text"] for row in dataset])
        dataset = [
            {"prompt_ids": prompt, "completion_ids": completion}
            for prompt, completion in zip(*columns.values(), strict=True)
        ]
    if len(dataset) == 0:
        raise ValueError(
            "no text of the data set has two tokens, so no token has a label; look at the column "
            "`text`"
        )
    return dataset


def _cut(tokenizer: Any, text: str, max_length: int) -> list[list[int]]:
    ids = _encode_text(tokenizer, text) if text else []
    if ids and tokenizer.eos_token_id is not None and ids[-1] != tokenizer.eos_token_id:
        ids.append(tokenizer.eos_token_id)
    pieces = (ids[start : start + max_length] for start in range(0, len(ids), max_length))
    return [piece for piece in pieces if len(piece) > 1]


def _check_rows(dataset: Any, max_length: int) -> None:
    for number, row in enumerate(dataset):
        sizes = len(row["prompt_ids"]), len(row["completion_ids"])
        if min(sizes) == 0:
            raise ValueError(
                f"row {number} has {sizes[0]} prompt and {sizes[1]} completion tokens, so none "
                "with a label and something to predict it from; leave such rows out"
            )
        if sum(sizes) > max_length:
            raise ValueError(
                f"row {number} has {sum(sizes)} tokens, max_length is {max_length}; raise "
                "max_length, or cut its completion_ids"
            )


@dataclass
class NextTokenCollator:
    """Pads rows into a batch: what :func:`~llm_xrisk.data.collators.pad_rows` gives.

    Attributes:
        pad_token_id: Fills the padding.
        padding_side: See :func:`~llm_xrisk.data.collators.pad_rows`.
    """

    pad_token_id: int
    padding_side: str = "left"

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Collate rows; see the class."""
        return pad_rows(
            [row["prompt_ids"] for row in rows],
            [row["completion_ids"] for row in rows],
            pad_token_id=self.pad_token_id,
            side=self.padding_side,
        )


def next_token_targets(input_ids: Tensor, completion_mask: Tensor, keep: int) -> Tensor:
    """What the logits of the last ``keep`` + 1 positions are to predict, (R, keep + 1).

    :data:`IGNORED` stands where the next token has no label, and at the last position.

    Example:
        >>> import torch
        >>> mask = torch.tensor([[False, True, True]])
        >>> next_token_targets(torch.tensor([[5, 6, 7]]), mask, keep=2)
        tensor([[   6,    7, -100]])
    """
    # what rolls over to the last position stands before all labels and has none
    return input_ids.masked_fill(~completion_mask.bool(), IGNORED)[:, -keep - 1 :].roll(-1, 1)
