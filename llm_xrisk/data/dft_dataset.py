"""Data sets of DFT: accepted formats, tokenised and checked before training starts."""

from collections.abc import Iterable, Mapping
from itertools import pairwise
from typing import Any

from llm_xrisk.data.columns import check_counted
from llm_xrisk.data.tokenize import encode_prompt_completion

_GOLD = ("completion", "chosen")


def prepare_dft_dataset(
    dataset: Any, *, tokenizer: Any, max_length: int, needs_negatives: bool
) -> Any:
    """Tokenise a data set for DFT where it is text, and check it.

    Accepted rows: ``index`` with (a) ``prompt_ids``, ``completion_ids``, ``negative_ids`` and
    optionally ``ref_log_likelihoods``, as a pool gives them; (b) ``prompt``, ``completion`` and
    ``negatives``, a list, as text or messages; (c) TRL's preference rows ``prompt``, ``chosen``,
    ``rejected``. Completions end in one end-of-sequence token unless they are cut at
    ``max_length``.

    Args:
        dataset: A ``datasets.Dataset`` or any sequence of rows.
        tokenizer: Tokenizer of the model.
        max_length: Longest prompt + completion in tokens.
        needs_negatives: Whether rows without negatives make no sense.

    Returns:
        A data set of rows (a), of the kind that was given.

    Raises:
        ValueError: no index column, a question without a gold answer, no usable negative in the
            whole data set, likelihoods that do not match the negatives, or token rows longer than
            ``max_length``.
        IndexError: index values other than 0..n-1, each once.
        TypeError: the rows cannot be counted, as those of a stream.
    """
    check_counted(dataset, "DFT keeps a value for each row", "DFT needs prompts with gold answers")
    _check_columns(dataset[0])
    if "prompt_ids" not in dataset[0]:

        def encode(row: Mapping[str, Any]) -> dict[str, Any]:
            return _encode(row, tokenizer, max_length)

        dataset = dataset.map(encode) if hasattr(dataset, "map") else [encode(r) for r in dataset]
    _check_index(_column(dataset, "index"), len(dataset))
    _check_rows(dataset, max_length, needs_negatives)
    return dataset


def _check_columns(row: Mapping[str, Any]) -> None:
    if "index" not in row:
        raise ValueError(
            f"the data set has columns {sorted(row)} and no `index`, by which DFT keeps a value "
            "for each prompt; number the rows: dataset = llm_xrisk.data.with_index(dataset)"
        )
    if "prompt_ids" not in row and "prompt" not in row:
        raise ValueError(
            f"the data set has columns {sorted(row)} and no prompt; give `prompt`, `completion` "
            "and `negatives` (text or messages), or a pool's token ids; "
            "dataset.map(trl.extract_prompt) takes it out of `chosen` and `rejected`"
        )


def _encode(row: Mapping[str, Any], tokenizer: Any, max_length: int) -> dict[str, Any]:
    gold = next((row[name] for name in _GOLD if row.get(name)), None)
    if gold is None:
        raise ValueError(
            f"the question with index {row['index']} has no gold answer (columns {sorted(row)}); "
            "give `completion`, or leave such questions out"
        )
    rejected = row.get("rejected")
    negatives = row.get("negatives") or ([rejected] if rejected else [])
    prompt_ids, completion_ids = encode_prompt_completion(tokenizer, row["prompt"], gold)
    room = max_length - len(prompt_ids)
    if room < 1:
        raise ValueError(
            f"the prompt with index {row['index']} has {len(prompt_ids)} tokens, max_length is "
            f"{max_length}; raise max_length or leave long prompts out"
        )
    encoded = [encode_prompt_completion(tokenizer, row["prompt"], text)[1] for text in negatives]
    return {
        "index": int(row["index"]),
        "prompt_ids": prompt_ids,
        "completion_ids": completion_ids[:room],
        "negative_ids": [ids[:room] for ids in encoded],
    }


def _check_index(index: Iterable[int], rows: int) -> None:
    values = sorted(int(i) for i in index)
    if values[0] < 0 or values[-1] >= rows:
        raise IndexError(
            f"the index column runs from {values[0]} to {values[-1]}, out of range for "
            f"num_samples={rows}; number the rows 0..{rows - 1} with llm_xrisk.data.with_index"
        )
    if values != list(range(rows)):
        twice = next(a for a, b in pairwise(values) if a == b)
        raise IndexError(
            f"index {twice} stands in several rows, so prompts would share a tracked value; "
            "number the rows 0..n-1 with llm_xrisk.data.with_index"
        )


def _check_rows(dataset: Any, max_length: int, needs_negatives: bool) -> None:
    usable = 0
    with_reference = dataset[0].get("ref_log_likelihoods") is not None
    for row in dataset:
        negatives = row.get("negative_ids") or []
        usable += len(negatives)
        if not row.get("completion_ids"):
            raise ValueError(
                f"the question with index {row['index']} has no gold answer: its completion is "
                "empty; leave such questions out"
            )
        if any(len(ids) == 0 for ids in negatives):
            raise ValueError(
                f"the question with index {row['index']} has an empty negative; an answer needs "
                "at least one token: leave it out"
            )
        _check_reference(row, len(negatives), with_reference)
        longest = max(len(ids) for ids in (row["completion_ids"], *negatives))
        if len(row["prompt_ids"]) + longest > max_length:
            raise ValueError(
                f"the question with index {row['index']} needs "
                f"{len(row['prompt_ids']) + longest} tokens, max_length is {max_length}; raise "
                "max_length, or build the pool with a smaller max_new_tokens"
            )
    if needs_negatives and usable == 0:
        raise ValueError(
            f"none of the {len(dataset)} prompts has a usable negative, so DFT would be SFT; "
            "build a pool (llm-xrisk pool), sample at a higher temperature, or set "
            "num_negatives=0 if SFT is what you want"
        )


def _check_reference(row: Mapping[str, Any], negatives: int, expected: bool) -> None:
    reference = row.get("ref_log_likelihoods")
    if expected != (reference is not None):
        raise ValueError(
            f"the question with index {row['index']} has {'no' if expected else 'some'} "
            "ref_log_likelihoods, unlike the first one; give them for all negatives of the data "
            "set, or drop the column to have them computed"
        )
    if reference is not None and len(reference) != negatives:
        raise ValueError(
            f"the question with index {row['index']} has {len(reference)} ref_log_likelihoods for "
            f"{negatives} negatives, and each needs its own; build the pool again"
        )


def _column(dataset: Any, name: str) -> list[int]:
    if hasattr(dataset, "column_names"):
        return list(dataset[name])
    return [int(row[name]) for row in dataset]
