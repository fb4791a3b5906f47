"""Data sets of DRRHO: prompts and responses, tokenised and checked, and what collates them."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from llm_xrisk.data.collators import pad_rows
from llm_xrisk.data.columns import check_counted
from llm_xrisk.data.tokenize import encode_prompt_completion


def prepare_drrho_dataset(dataset: Any, *, tokenizer: Any, max_length: int) -> Any:
    """Tokenise a data set of responses where it is text, and check it.

    Accepted rows: ``index``, the example's id, with (a) ``prompt_ids`` and ``completion_ids``;
    (b) ``prompt`` and ``completion`` as text or messages; (c) ``messages``, of which the last one,
    the assistant's, is the response. Responses end in one end-of-sequence token unless they are
    cut at ``max_length``.

    Args:
        dataset: A ``datasets.Dataset`` or any sequence of rows.
        tokenizer: Tokenizer of the model.
        max_length: Longest prompt + response in tokens.

    Returns:
        A data set of rows (a), of the kind that was given.

    Raises:
        ValueError: a missing index, prompt or response, a prompt that leaves no room, or token
            rows longer than ``max_length``.
        IndexError: an index that is negative or stands in several rows.
        TypeError: the rows cannot be counted, as those of a stream.
    """
    check_counted(
        dataset, "DRRHO keeps a reference loss for each row", "DRRHO needs prompts with responses"
    )
    _check_columns(dataset[0])
    if "prompt_ids" not in dataset[0]:

        def encode(row: Mapping[str, Any]) -> dict[str, Any]:
            return _encode(row, tokenizer, max_length)

        dataset = dataset.map(encode) if hasattr(dataset, "map") else [encode(r) for r in dataset]
    _check_rows(dataset, max_length)
    return dataset


def _check_columns(row: Mapping[str, Any]) -> None:
    if "index" not in row:
        raise ValueError(
            f"the data set has columns {sorted(row)} and no `index`, by which DRRHO keeps the "
            "reference's losses; number the rows: dataset = llm_xrisk.data.with_index(dataset)"
        )
    known = ({"prompt_ids", "completion_ids"}, {"prompt", "completion"}, {"messages"})
    if not any(columns <= set(row) for columns in known):
        raise ValueError(
            f"the data set has columns {sorted(row)} and no response to take the loss of; give "
            "`prompt` and `completion` (text or messages) or `messages` that end in the "
            "assistant's (`text` alone does not say where the response begins)"
        )


def _encode(row: Mapping[str, Any], tokenizer: Any, max_length: int) -> dict[str, Any]:
    prompt, completion = row.get("prompt"), row.get("completion")
    if prompt is None or completion is None:
        messages = row.get("messages") or [{"role": "nobody"}]
        prompt, completion = list(messages[:-1]), list(messages[-1:])
        if not prompt or completion[0]["role"] != "assistant":
            raise ValueError(
                f"the example with index {row['index']} has messages by "
                f"{[message['role'] for message in messages]}; they must end in the assistant's "
                "response to something: leave others out"
            )
    prompt_ids, completion_ids = encode_prompt_completion(tokenizer, prompt, completion)
    room = max_length - len(prompt_ids)
    if room < 1:
        raise ValueError(
            f"the prompt with index {row['index']} has {len(prompt_ids)} tokens, max_length is "
            f"{max_length}; raise max_length or leave long prompts out"
        )
    return {
        "index": int(row["index"]),
        "prompt_ids": prompt_ids,
        "completion_ids": completion_ids[:room],
    }


def _check_rows(dataset: Any, max_length: int) -> None:
    seen = Counter[int]()
    for row in dataset:
        index, sizes = int(row["index"]), (len(row["prompt_ids"]), len(row["completion_ids"]))
        seen[index] += 1
        if min(sizes) == 0:
            raise ValueError(
                f"the example with index {index} has an empty prompt or response; each needs at "
                "least one token: leave such examples out"
            )
        if sum(sizes) > max_length:
            raise ValueError(
                f"the example with index {index} has {sum(sizes)} tokens, max_length is "
                f"{max_length}; raise max_length, or cut its completion_ids"
            )
    index, times = seen.most_common(1)[0]
    if times > 1 or min(seen) < 0:
        raise IndexError(
            f"got index {index if times > 1 else min(seen)} in {times} rows; reference losses are "
            "kept by index, one for each example from 0 up: number the rows with "
            "llm_xrisk.data.with_index"
        )


@dataclass
class DRRHOCollator:
    """Pads prompts with responses into a batch.

    Beside what :func:`~llm_xrisk.data.collators.pad_rows` gives: ``index`` and ``length`` (tokens
    of the response), each (R,), ``width``, the longest of these, and, where the reference's losses
    are known, ``targets`` (R, 1) or (R, width).

    Attributes:
        pad_token_id: Fills the padding.
        padding_side: See :func:`~llm_xrisk.data.collators.pad_rows`.
        reference: The reference's losses of an example by its index, or None.
    """

    pad_token_id: int
    padding_side: str = "left"
    reference: Any = None

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Collate rows; see the class."""
        completions = [row["completion_ids"] for row in rows]
        batch = pad_rows(
            [row["prompt_ids"] for row in rows],
            completions,
            pad_token_id=self.pad_token_id,
            side=self.padding_side,
        )
        index, lengths = [int(row["index"]) for row in rows], list(map(len, completions))
        batch |= {"index": torch.tensor(index), "length": torch.tensor(lengths)}
        if self.reference is not None:
            known = [self.reference[k] for k in index]
            batch["targets"] = pad_sequence(known, batch_first=True)
        return batch | {"width": max(lengths)}
