"""Documents, prompts with responses and conversations as rows with labels."""

from typing import Any

import pytest
import torch
from datasets import Dataset

from llm_xrisk.data.next_token_dataset import (
    IGNORED,
    NextTokenCollator,
    next_token_targets,
    prepare_next_tokens,
)
from tests.trainers.build import tokenizer


def prepared(rows: list[dict[str, Any]], max_length: int = 64) -> list[dict[str, Any]]:
    """The same rows as a list and as a data set."""
    found = prepare_next_tokens(rows, tokenizer=tokenizer(), max_length=max_length)
    other = prepare_next_tokens(
        Dataset.from_list(rows), tokenizer=tokenizer(), max_length=max_length
    )
    for one, same in zip(found, other, strict=True):
        assert one["prompt_ids"] == same["prompt_ids"]
        assert one["completion_ids"] == same["completion_ids"]
    return found


def text_of(ids: list[int]) -> str:
    return tokenizer().decode(ids)


def test_a_document_is_cut_into_pieces_that_are_predicted_from_their_first_token():
    rows = prepared([{"text": "1+2=3"}, {"text": ""}, {"text": "7"}], max_length=4)
    whole = [row["prompt_ids"] + row["completion_ids"] for row in rows]
    assert [len(row["prompt_ids"]) for row in rows] == [1] * len(rows)
    assert [text_of(ids) for ids in whole] == ["1+2=", "3<|end|>", "7<|end|>"]


def test_a_piece_of_one_token_has_nothing_to_predict_and_is_left_out():
    rows = prepared([{"text": "1+2="}], max_length=4)  # the end-of-sequence token is left over
    assert len(rows) == 1
    with pytest.raises(ValueError, match="no text of the data set has two tokens"):
        prepared([{"text": ""}])


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "8/2=", "completion": "4"},
        {
            "messages": [
                {"role": "user", "content": "8/2="},
                {"role": "assistant", "content": "4"},
            ]
        },
    ],
    ids=["prompt and completion", "messages"],
)
def test_the_response_alone_has_labels(row):
    (found,) = prepared([row])
    assert text_of(found["completion_ids"]) == "4<|end|>"
    assert "8/2=" in text_of(found["prompt_ids"])
    (again,) = prepare_next_tokens([found], tokenizer=tokenizer(), max_length=64)
    assert again == found


def test_a_batch_predicts_the_labels_from_the_positions_before_them():
    rows = [
        {"prompt_ids": [5, 6], "completion_ids": [7, 8]},
        {"prompt_ids": [9], "completion_ids": [4]},
    ]
    for side in ("left", "right"):
        batch = NextTokenCollator(0, side)(rows)
        targets = next_token_targets(batch["input_ids"], batch["completion_mask"], batch["keep"])
        before = batch["input_ids"][:, -batch["keep"] - 1 :]
        seen = [
            (before[place].item(), targets[place].item())
            for place in map(tuple, (targets != IGNORED).nonzero())
        ]
        assert seen == [(6, 7), (7, 8), (9, 4)]
        assert targets[:, -1].eq(IGNORED).all()
        assert torch.equal(batch["input_ids"], NextTokenCollator(0, side)(rows)["input_ids"])


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "the data set has no rows"),
        ([{"answer": "4"}], r"has columns \['answer'\] and none to predict"),
        ([{"prompt_ids": [5], "completion_ids": []}], "row 0 has 1 prompt and 0 completion tokens"),
        ([{"prompt_ids": [5] * 60, "completion_ids": [5] * 5}], "row 0 has 65 tokens"),
        ([{"messages": [{"role": "user", "content": "8/2="}]}], "end in the assistant's"),
    ],
)
def test_rows_without_a_labelled_token_are_refused(rows, message):
    with pytest.raises(ValueError, match=message):
        prepare_next_tokens(rows, tokenizer=tokenizer(), max_length=64)


def test_a_stream_is_refused():
    rows = Dataset.from_list([{"text": "1+2=3"}]).to_iterable_dataset()
    with pytest.raises(TypeError, match="load the data without streaming"):
        prepare_next_tokens(rows, tokenizer=tokenizer(), max_length=64)
