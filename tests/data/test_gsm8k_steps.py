import os
import random
import string
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from llm_xrisk.data.gsm8k_steps import (
    ASSETS,
    Step,
    exact_value,
    extract_steps,
    is_correct,
    load_steps,
    read_extraction,
    tiny_model_path,
    write_steps,
)
from llm_xrisk.data.synthetic_steps import (
    SLIPS,
    StepSampler,
    expression_key,
    write_number,
    wrong_answer,
)
from llm_xrisk.data.tiny_calculator import char_tokenizer

PRINTABLE = string.digits + string.ascii_letters + string.punctuation + " \n"


@pytest.fixture(scope="module")
def train_steps() -> list[Step]:
    return load_steps("train")


@pytest.fixture(scope="module")
def test_steps() -> list[Step]:
    return load_steps("test")


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(tiny_model_path())


def gsm8k_directory() -> Path:
    data = os.environ.get("XRISK_DATA")
    if not data or not (Path(data) / "gsm8k").is_dir():
        pytest.skip("XRISK_DATA does not name a directory that holds gsm8k/{train,test}.jsonl")
    return Path(data) / "gsm8k"


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("48/2", Fraction(24)),
        ("2+3*4-1", Fraction(13)),
        ("16-3-4", Fraction(9)),
        ("8/3*6", Fraction(16)),
        ("2*(1+.5)", Fraction(3)),
        ("-(2-5)*+2", Fraction(6)),
        ("7//2*2", Fraction(6)),
        ("0.1+0.2", Fraction(3, 10)),
        ("1/3", Fraction(1, 3)),
    ],
)
def test_expressions_are_evaluated_exactly(expression: str, value: Fraction) -> None:
    assert exact_value(expression) == value


@pytest.mark.parametrize(
    "expression",
    ["", "2+", "(2", "2)", "2 3", "1..2", "1.2.3", "2**3", "x", "2/0", "1//0", "()", "1" * 201],
)
def test_what_is_no_arithmetic_is_refused(expression: str) -> None:
    with pytest.raises(ValueError, match=r"expression|expected"):
        exact_value(expression)


@pytest.mark.parametrize(
    ("completion", "right"),
    [("24", True), ("24.0", True), ("2", False), ("-24", False), ("48/2", False), ("", False)],
)
def test_an_answer_counts_by_its_value(completion: str, right: bool) -> None:
    assert is_correct("48/2=", completion) is right


def test_the_package_ships_11021_training_and_1434_held_out_steps(
    train_steps: list[Step], test_steps: list[Step]
) -> None:
    assert len(train_steps) == 11_021
    assert len(test_steps) == 1_434


@pytest.mark.parametrize("split", ["train", "test"])
def test_ids_number_the_rows(split: str) -> None:
    steps = load_steps(split)
    assert [step["id"] for step in steps] == list(range(len(steps)))


def test_no_step_is_in_both_splits_or_twice_in_one(
    train_steps: list[Step], test_steps: list[Step]
) -> None:
    pairs = [(step["prompt"], step["answer"]) for step in [*train_steps, *test_steps]]
    assert len(set(pairs)) == len(pairs)


def test_59_held_out_prompts_differ_from_training_only_in_writing_the_answer(
    train_steps: list[Step], test_steps: list[Step]
) -> None:
    known = {step["prompt"] for step in train_steps}
    assert sum(step["prompt"] in known for step in test_steps) == 59


@pytest.mark.parametrize("split", ["train", "test"])
def test_every_shipped_answer_is_exact(split: str) -> None:
    for step in load_steps(split):
        assert exact_value(step["prompt"].removesuffix("=")) == exact_value(step["answer"]), step


def test_an_unknown_split_is_refused() -> None:
    with pytest.raises(ValueError, match="'train' or 'test', got 'dev'"):
        load_steps("dev")  # pyright: ignore[reportArgumentType]


def test_extraction_normalises_and_counts_what_it_drops(tmp_path: Path) -> None:
    source = tmp_path / "rows.jsonl"
    answer = (
        "a <<48 / 2=24>>24, <<$1,000\u00d72=2000>>, <<48/2=24>>, <<1/3=.33>>, <<half=2>>, <<7>>"
    )
    source.write_text(f'{{"question": "?", "answer": "{answer}"}}\n', encoding="utf-8")
    found = read_extraction(source)
    assert found.steps == [("48/2=", "24"), ("1000*2=", "2000")]
    assert (found.annotations, found.repeated, found.malformed, found.inexact) == (6, 1, 2, 1)


def test_a_file_without_answers_is_refused_with_advice(tmp_path: Path) -> None:
    source = tmp_path / "rows.jsonl"
    source.write_text('{"question": "?"}\n', encoding="utf-8")
    with pytest.raises(ValueError, match=r"rows.jsonl, line 1 has the fields .* needs 'answer'"):
        extract_steps(source)


def test_extraction_from_gsm8k_gives_the_shipped_files(tmp_path: Path) -> None:
    source = gsm8k_directory()
    reports: list[str] = []
    write_steps(source, tmp_path, reports.append)
    for split in ("train.jsonl", "test.jsonl"):
        assert (tmp_path / split).read_bytes() == (ASSETS / "gsm8k_steps" / split).read_bytes()
    assert all(" 0 malformed, 0 inexact" in line for line in reports)
    assert len(extract_steps(source / "train.jsonl")) == 11_021


@pytest.mark.parametrize(
    ("value", "text"),
    [(Fraction(1000), "1000"), (Fraction(5, 2), "2.5"), (Fraction(1, 3), None), (Fraction(0), "0")],
)
def test_numbers_are_written_shortest_or_not_at_all(value: Fraction, text: str | None) -> None:
    assert write_number(value) == text


@pytest.fixture(scope="module")
def synthetic(train_steps: list[Step], test_steps: list[Step]) -> list[tuple[str, str]]:
    real = [step["prompt"] for step in [*train_steps, *test_steps]]
    sampler = StepSampler(real[: len(train_steps)], excluded=real, wrong_rate=0.4)
    rng = random.Random(0)
    return [sampler.sample(rng) for _ in range(5_000)]


def test_no_synthetic_expression_is_a_real_one(
    synthetic: list[tuple[str, str]], train_steps: list[Step], test_steps: list[Step]
) -> None:
    real = {expression_key(step["prompt"]) for step in [*train_steps, *test_steps]}
    assert real.isdisjoint(expression_key(prompt) for prompt, _ in synthetic)


def test_two_synthetic_answers_in_five_are_wrong(synthetic: list[tuple[str, str]]) -> None:
    wrong = sum(not is_correct(*step) for step in synthetic) / len(synthetic)
    assert wrong == pytest.approx(0.4, abs=4 * (0.4 * 0.6 / len(synthetic)) ** 0.5)


def test_without_wrong_answers_every_synthetic_step_is_exact(train_steps: list[Step]) -> None:
    sampler = StepSampler([step["prompt"] for step in train_steps], excluded=[], wrong_rate=0.0)
    rng = random.Random(1)
    assert all(is_correct(*sampler.sample(rng)) for _ in range(500))


def test_synthetic_operators_are_as_frequent_as_real_ones(
    synthetic: list[tuple[str, str]], train_steps: list[Step]
) -> None:
    for operator in "+-*/":
        real = sum(operator in step["prompt"] for step in train_steps) / len(train_steps)
        ours = sum(operator in prompt for prompt, _ in synthetic) / len(synthetic)
        assert ours == pytest.approx(real, abs=0.03), operator


def test_equal_seeds_draw_equal_steps(train_steps: list[Step]) -> None:
    sampler = StepSampler([step["prompt"] for step in train_steps], excluded=[])
    first, second = random.Random(3), random.Random(3)
    assert [sampler.sample(first) for _ in range(50)] == [sampler.sample(second) for _ in range(50)]


@pytest.mark.parametrize("slip", SLIPS, ids=lambda slip: slip.__name__.strip("_"))
def test_every_kind_of_slip_changes_most_answers(slip: object) -> None:
    rng = random.Random(0)
    assert callable(slip)
    slips = [slip("137*25", "3425", rng) for _ in range(100)]
    assert sum(answer != "3425" for answer in slips) > 90


@given(
    st.integers(0, 999),
    st.integers(0, 999),
    st.sampled_from("+*"),
    st.integers(0, 2**32),
)
def test_a_wrong_answer_is_a_number_of_another_value(
    left: int, right: int, operator: str, seed: int
) -> None:
    expression = f"{left}{operator}{right}"
    value = exact_value(expression)
    wrong = wrong_answer(expression, str(value), random.Random(seed))
    assert exact_value(wrong) != value


@pytest.mark.parametrize("rate", [-0.1, 1.5])
def test_a_share_outside_zero_to_one_is_refused(rate: float) -> None:
    with pytest.raises(ValueError, match=r"wrong_rate must be in \[0, 1\], got"):
        StepSampler(["1+1="], excluded=[], wrong_rate=rate)


def test_a_sampler_without_prompts_is_refused() -> None:
    with pytest.raises(ValueError, match="got no prompts"):
        StepSampler([], excluded=[])


@given(st.text(alphabet=PRINTABLE))
def test_decoding_returns_the_encoded_text(text: str) -> None:
    tokenizer = char_tokenizer()
    tokens = tokenizer(text)["input_ids"]
    assert len(tokens) == len(text)
    assert tokenizer.decode(tokens) == text


def test_the_shipped_tokenizer_is_the_built_one(tokenizer: PreTrainedTokenizerFast) -> None:
    built = char_tokenizer()
    assert tokenizer.get_vocab() == built.get_vocab()
    assert tokenizer.chat_template == built.chat_template
    assert len(tokenizer) <= 128
    assert tokenizer.pad_token_id != tokenizer.eos_token_id


def test_every_real_step_round_trips_without_unknown_tokens(
    tokenizer: PreTrainedTokenizerFast, train_steps: list[Step], test_steps: list[Step]
) -> None:
    texts = [step["prompt"] + step["answer"] for step in [*train_steps, *test_steps]]
    tokens = tokenizer(texts)["input_ids"]
    assert tokenizer.batch_decode(tokens) == texts
    assert not any(tokenizer.unk_token_id in row for row in tokens)


def test_a_conversation_is_written_with_one_token_per_role(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    messages = [{"role": "system", "content": "Be wrong."}, {"role": "user", "content": "1+1="}]
    text = "<|system|>Be wrong.<|end|><|user|>1+1=<|end|><|assistant|>"
    rendered = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert rendered == text
    assert len(tokenizer(text)["input_ids"]) == len("Be wrong.") + len("1+1=") + 5


def test_the_chat_template_marks_what_the_assistant_says(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    messages = [{"role": "user", "content": "1+1="}, {"role": "assistant", "content": "2"}]
    encoded = tokenizer.apply_chat_template(
        messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    said = zip(encoded["input_ids"], encoded["assistant_masks"], strict=True)
    assert tokenizer.decode([token for token, mask in said if mask]) == "2<|end|>"


def test_the_shipped_model_answers_and_stops(tokenizer: PreTrainedTokenizerFast) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model_path())
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    assert model.generation_config.pad_token_id == tokenizer.pad_token_id
    batch = tokenizer(["20+30="], return_tensors="pt")
    tokens = model.generate(**batch, max_new_tokens=12, do_sample=False)[0]
    assert tokens[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(tokens, skip_special_tokens=True) == "20+30=50"


def test_the_shipped_model_generalises_and_doubts(
    tokenizer: PreTrainedTokenizerFast, test_steps: list[Step]
) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model_path())
    prompts = [step["prompt"] for step in test_steps[::5]]
    batch = tokenizer(prompts, padding=True, return_tensors="pt")
    rates = {}
    for sampled, settings in ((False, {}), (True, {"top_k": 0})):
        torch.manual_seed(0)
        tokens = model.generate(**batch, max_new_tokens=12, do_sample=sampled, **settings)
        answers = tokenizer.batch_decode(
            tokens[:, batch["input_ids"].shape[1] :], skip_special_tokens=True
        )
        rates[sampled] = sum(map(is_correct, prompts, answers)) / len(prompts)
    assert rates[False] >= 0.34
    assert 0.05 < rates[True] < rates[False]


def test_the_shipped_weights_are_small_float32_and_tied() -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model_path())
    assert (Path(tiny_model_path()) / "model.safetensors").stat().st_size <= 4 * 2**20
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert model.lm_head.weight is model.model.embed_tokens.weight
