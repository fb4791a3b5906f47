"""Padding, the draw of negatives, and the rows that DFT trains on."""

import pytest
import torch

from llm_xrisk.data.collators import DFTCollator, pad_rows, select_rows
from llm_xrisk.data.dft_dataset import prepare_dft_dataset
from llm_xrisk.data.with_index import with_index
from tests.trainers.build import pairs, tokenizer

PROMPTS = [[5], [6, 7, 8], [5, 6]]
COMPLETIONS = [[9, 9, 9], [4], [3, 1]]


def row(index: int = 0, negatives: int = 3, **changes: object) -> dict[str, object]:
    ids = [[20 + j, 1] for j in range(negatives)]
    return {
        "index": index,
        "prompt_ids": [5, 6],
        "completion_ids": [9, 1],
        "negative_ids": ids,
        "ref_log_likelihoods": [-1.0 - j for j in range(negatives)],
    } | changes


def prepared(rows: list[dict[str, object]], **changes: object) -> list[dict[str, object]]:
    settings = {"tokenizer": tokenizer(), "max_length": 64, "needs_negatives": True} | changes
    return prepare_dft_dataset(rows, **settings)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_rows_hold_their_tokens_and_nothing_else(side):
    batch = pad_rows(PROMPTS, COMPLETIONS, pad_token_id=0, side=side)
    for k, (prompt, completion) in enumerate(zip(PROMPTS, COMPLETIONS, strict=True)):
        real = batch["input_ids"][k][batch["attention_mask"][k].bool()].tolist()
        assert real == [*prompt, *completion]
        assert batch["input_ids"][k][batch["completion_mask"][k]].tolist() == completion
    assert not batch["completion_mask"][:, : -batch["keep"]].any()


def test_left_padding_aligns_the_completions_and_keeps_few_positions():
    left = pad_rows(PROMPTS, COMPLETIONS, pad_token_id=0, side="left")
    right = pad_rows(PROMPTS, COMPLETIONS, pad_token_id=0, side="right")
    assert left["input_ids"].tolist() == [
        [0, 0, 5, 9, 9, 9],
        [6, 7, 8, 4, 0, 0],
        [0, 5, 6, 3, 1, 0],
    ]
    assert left["keep"] == 3
    assert right["input_ids"].tolist() == [[5, 9, 9, 9], [6, 7, 8, 4], [5, 6, 3, 1]]
    assert right["keep"] == 3


@pytest.mark.parametrize(
    ("name", "prompts", "completions"),
    [
        ("prompt", [[1], []], [[1], [1]]),
        ("completion", [[1], [1]], [[1], []]),
    ],
)
def test_an_empty_side_is_refused_with_its_row(name, prompts, completions):
    with pytest.raises(ValueError) as caught:
        pad_rows(prompts, completions, pad_token_id=0)
    message = str(caught.value)
    assert f"empty {name} in row 1" in message  # got
    assert f"needs at least one {name} token" in message  # need
    assert "filter such rows out" in message  # do


def test_a_collated_prompt_is_its_gold_answer_and_some_negatives():
    batch = DFTCollator(pad_token_id=0, num_negatives=2)([row(4), row(7, negatives=1)])
    assert batch["index"].tolist() == [4, 4, 4, 7, 7]
    assert batch["targets"].tolist() == [1, 0, 0, 1, 0]
    texts = [
        ids[mask].tolist()
        for ids, mask in zip(batch["input_ids"], batch["completion_mask"], strict=True)
    ]
    assert texts[0] == texts[3] == [9, 1]
    for text, likelihood in zip(texts[1:3], batch["ref_log_likelihood"][1:3].tolist(), strict=True):
        assert likelihood == -1.0 - (text[0] - 20)  # each keeps its own likelihood


@pytest.mark.parametrize("available", range(1, 8))
@pytest.mark.parametrize("m", range(1, 5))
def test_every_negative_is_seen_once_before_any_returns(available, m):
    collator = DFTCollator(pad_token_id=0, num_negatives=m, seed=3)
    seen: list[int] = []
    for epoch in range(4 * available):
        collator.epoch = epoch
        drawn = collator.draw(index=11, available=available)
        assert len(set(drawn)) == len(drawn) == min(m, available)
        seen += drawn
    for start in range(0, len(seen), available):
        assert sorted(seen[start : start + available]) == list(range(available))


def test_the_draw_depends_on_seed_index_and_epoch_alone():
    def draws(seed: int = 0, index: int = 0) -> list[list[int]]:
        collator = DFTCollator(pad_token_id=0, num_negatives=4, seed=seed)
        collator.draw(99, 5)  # company changes nothing
        return [collator.draw(index, 20)]

    assert draws() == draws()
    assert draws() != draws(seed=1)
    assert draws() != draws(index=1)


def test_no_negatives_need_no_likelihoods():
    batch = DFTCollator(pad_token_id=0, num_negatives=0)([row(ref_log_likelihoods=None)])
    assert batch["ref_log_likelihood"].tolist() == [0.0]


def test_whether_likelihoods_are_known_does_not_depend_on_the_batch():
    """Else one process would compute them, collectively under ZeRO-3, and another would not."""
    collator = DFTCollator(pad_token_id=0, num_negatives=2)
    for negatives in (0, 1, 3):
        unknown = collator([row(negatives=negatives, ref_log_likelihoods=None)])
        assert "ref_log_likelihood" not in unknown
        assert "ref_log_likelihood" in collator([row(negatives=negatives)])


def test_a_row_without_an_index_is_refused():
    with pytest.raises(ValueError) as caught:
        DFTCollator(pad_token_id=0, num_negatives=1)([row(index=None)])
    message = str(caught.value)
    assert "lacks ['index']" in message
    assert "number the rows with llm_xrisk.data.with_index(dataset)" in message


def test_selected_rows_are_selected_in_every_tensor():
    batch = {"a": torch.arange(3), "nested": {"b": torch.arange(6).view(3, 2)}, "keep": 5}
    chosen = select_rows(batch, torch.tensor([2, 0]))
    assert chosen["a"].tolist() == [2, 0]
    assert chosen["nested"]["b"].tolist() == [[4, 5], [0, 1]]
    assert chosen["keep"] == 5


# -- the data set ------------------------------------------------------------------------------


def test_text_answers_end_in_exactly_one_end_of_sequence_token():
    rows = prepared(pairs(5))
    eos = tokenizer().eos_token_id
    for found, given in zip(rows, pairs(5), strict=True):
        assert tokenizer().decode(found["completion_ids"][:-1]) == given["completion"]
        for ids in (found["completion_ids"], *found["negative_ids"]):
            assert ids.count(eos) == 1
            assert ids[-1] == eos


def test_conversations_leave_the_template_out_of_the_answer():
    messages = [{"role": "user", "content": "48/2="}]
    answer = [{"role": "assistant", "content": "24"}]
    given = {"index": 0, "prompt": messages, "completion": answer, "negatives": [answer]}
    (found,) = prepared([given])
    assert tokenizer().decode(found["completion_ids"]) == "24<|end|>"
    assert tokenizer().decode(found["prompt_ids"]) == "<|user|>48/2=<|end|><|assistant|>"


def test_truncated_answers_have_no_end_of_sequence_token():
    (found,) = prepared(
        [{"index": 0, "prompt": "1+1=", "completion": "2", "negatives": ["12345678"]}], max_length=8
    )
    assert found["completion_ids"].count(tokenizer().eos_token_id) == 1
    assert len(found["negative_ids"][0]) == 4
    assert tokenizer().eos_token_id not in found["negative_ids"][0]


def test_preference_rows_are_the_case_of_one_negative():
    (found,) = prepared([{"index": 0, "prompt": "1+1=", "chosen": "2", "rejected": "3"}])
    assert tokenizer().decode(found["completion_ids"]) == "2<|end|>"
    assert [tokenizer().decode(ids) for ids in found["negative_ids"]] == ["3<|end|>"]


def test_token_rows_may_be_numbered_by_with_index():
    unnumbered = [{k: v for k, v in row().items() if k != "index"} for _ in range(3)]
    rows = prepared(with_index(unnumbered))
    assert [rows[k]["index"] for k in range(3)] == [0, 1, 2]


REFUSED = {
    "no index column": (
        [{"prompt": "1+1=", "completion": "2", "negatives": ["3"]}],
        ValueError,
        ["columns ['completion', 'negatives', 'prompt']", "no `index`", "with_index(dataset)"],
    ),
    "an index out of range": (
        [row(0), row(20480)],
        IndexError,
        ["0 to 20480", "out of range for num_samples=2", "number the rows 0..1"],
    ),
    "a negative index": (
        [row(0), row(-1)],
        IndexError,
        ["-1 to 0", "out of range for num_samples=2", "number the rows 0..1"],
    ),
    "an index twice": (
        [row(0), row(0)],
        IndexError,
        ["index 0 stands in several rows", "share a tracked value", "number the rows 0..n-1"],
    ),
    "an empty gold answer": (
        [row(0), row(1, completion_ids=[])],
        ValueError,
        ["question with index 1", "no gold answer", "leave such questions out"],
    ),
    "no gold answer": (
        [{"index": 0, "prompt": "1+1=", "completion": "", "negatives": ["3"]}],
        ValueError,
        ["question with index 0 has no gold answer", "give `completion`", "leave such questions"],
    ),
    "an empty negative": (
        [{"index": 0, "prompt": "1+1=", "completion": "2", "negatives": [""]}],
        ValueError,
        ["empty completion ''", "needs at least one token", "filter such rows out"],
    ),
    "an empty negative of tokens": (
        [row(0, negative_ids=[[3], []], ref_log_likelihoods=[-1.0, -1.0])],
        ValueError,
        ["question with index 0", "empty negative", "at least one token", "leave it out"],
    ),
    "no usable negative at all": (
        [row(0, negatives=0), row(1, negatives=0)],
        ValueError,
        ["none of the 2 prompts has a usable negative", "DFT would be SFT", "build a pool"],
    ),
    "too long a row": (
        [row(0, completion_ids=[9] * 100)],
        ValueError,
        ["needs 102 tokens", "max_length is 64", "raise max_length"],
    ),
    "likelihoods of other negatives": (
        [row(0), row(1, ref_log_likelihoods=[-1.0])],
        ValueError,
        ["question with index 1", "1 ref_log_likelihoods for 3 negatives", "build the pool again"],
    ),
    "likelihoods of some rows only": (
        [row(0), row(1, ref_log_likelihoods=None)],
        ValueError,
        ["question with index 1", "no ref_log_likelihoods", "drop the column"],
    ),
    "no rows": ([], ValueError, ["no rows", "needs prompts with gold answers"]),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_rows_are_refused_with_got_need_and_do(case):
    rows, error, parts = REFUSED[case]
    with pytest.raises(error) as caught:
        prepared(rows)
    for part in parts:
        assert part in str(caught.value)


def test_rows_without_negatives_pass_where_none_are_needed():
    assert len(prepared([row(0, negatives=0)], needs_negatives=False)) == 1
