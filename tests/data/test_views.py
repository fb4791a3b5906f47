"""Views are collated by side, and what makes no batch is refused by name."""

from typing import Any

import pytest
import torch

from llm_xrisk.data.views import ViewsCollator

PAIR = {"first": [0.0, 1.0], "second": [1.0, 0.0], "index": 3}
COLLATE = ViewsCollator(input_name="pixel_values")


def test_arrays_are_stacked_by_side_and_the_index_comes_along() -> None:
    batch = COLLATE([PAIR, PAIR | {"index": 5}])
    assert batch["second"]["pixel_values"].tolist() == [[1.0, 0.0], [1.0, 0.0]]
    assert batch["index"].tolist() == [3, 5]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "got a batch of no rows"),
        ([{"text": "a"}], r"a row has \['text'\] and lacks \['first', 'second'\]"),
        ([("a", "b")], r"a row has a tuple of 2 and lacks \['first', 'second'\]"),
        ([PAIR, {"first": [0.0, 1.0], "index": 1}], r"lacks \['second'\]"),
        ([PAIR, {"first": [0.0], "second": [1.0]}], r"lacks \['index'\]; .*with_index\(dataset\)"),
        ([PAIR | {"index": "id 3"}], "index 'id 3'; it must be an integer from 0 up"),
        ([PAIR | {"index": 3.5}], "index 3.5; it must be an integer from 0 up"),
        ([PAIR, PAIR | {"first": [0.0]}], "got 'first' that make no tensor: a list of 2, a list"),
        ([PAIR | {"first": None}], "got 'first' that make no tensor: None"),
        ([PAIR, PAIR | {"first": "text"}], r"several kinds in 'first': \['array', 'text'\]"),
        (
            [PAIR | {"first": {"a": [1]}}, PAIR | {"first": {"b": [1]}}],
            r"several kinds in 'first': .*mapping of \['a'\]",
        ),
        ([PAIR | {"first": "a text"}], r"got texts \('a text'\) and no tokenizer but None"),
        ([PAIR | {"ref_scores": [1.0]}, PAIR], r"lacks \['ref_scores'\]"),
    ],
)
def test_rows_that_make_no_batch_are_refused_by_name(rows: list[Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        COLLATE(rows)


def test_the_name_of_a_tokenizer_is_refused() -> None:
    with pytest.raises(ValueError, match=r"no tokenizer but 'bert'; .*AutoTokenizer.from_pretr"):
        ViewsCollator("bert")([{"first": "a", "second": "b"}])


def test_mappings_of_tensors_are_stacked_by_name() -> None:
    view = {"input_ids": torch.tensor([1, 2]), "attention_mask": torch.ones(2)}
    batch = COLLATE([{"first": view, "second": view}] * 3)
    assert batch["first"]["input_ids"].shape == (3, 2)
