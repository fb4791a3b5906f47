"""Negatives from the shipped model: what counts as one, their likelihoods, and crashes half-way."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from llm_xrisk.data.fingerprint import Identity, model_fingerprint
from llm_xrisk.data.gsm8k_steps import load_steps
from llm_xrisk.data.pool import load_pool
from llm_xrisk.data.tokenize import encode_prompt
from llm_xrisk.rollout import SamplingConfig, TransformersEngine
from llm_xrisk.rollout.negative_sampler import Sample, select_negatives
from llm_xrisk.rollout.negatives import build_pool, draw_negatives
from reward import arithmetic_reward

ROWS = [{**step, "completion": step["answer"]} for step in load_steps("train")[:12]]
TALKS = [
    {
        "index": row["id"],
        "prompt": [{"role": "user", "content": row["prompt"]}],
        "completion": [{"role": "assistant", "content": row["answer"]}],
        "answer": row["answer"],
    }
    for row in ROWS
]
SAMPLING = SamplingConfig(max_new_tokens=6, seed=3)
EOS = 1


@pytest.fixture(scope="module")
def model(tiny_model_path):
    return AutoModelForCausalLM.from_pretrained(tiny_model_path)


@pytest.fixture(scope="module")
def tokenizer(tiny_model_path):
    return AutoTokenizer.from_pretrained(tiny_model_path)


@pytest.fixture
def engine(model, tokenizer):
    return TransformersEngine(model, tokenizer, batch_size=64)


@pytest.fixture
def build(engine, tokenizer, tmp_path):
    def run(name="pool", rows=ROWS, **changes):
        settings = {"sampling": SAMPLING, "num_negatives": 3, "num_generations": 6} | changes
        return build_pool(engine, tokenizer, rows, tmp_path / name, **settings)

    return run


def likelihood_one_token_at_a_time(model, prompt_ids, ids):
    total = 0.0
    with torch.no_grad():
        for place, token in enumerate(ids):
            context = torch.tensor([[*prompt_ids, *ids[:place]]])
            total += model(input_ids=context).logits[0, -1].double().log_softmax(-1)[token].item()
    return total


def drawn(pool):
    return {row.prompt_id: [negative.ids for negative in row.negatives] for row in pool.rows}


def test_negatives_are_distinct_and_wrong_and_every_sample_is_accounted_for(build):
    pool = build(verify=arithmetic_reward)
    for row in pool.rows:
        texts = [negative.text for negative in row.negatives]
        assert len(set(texts)) == len(texts) <= 3
        assert row.completion not in texts
        assert arithmetic_reward(texts, texts, answer=[row.completion] * len(texts)) == [0.0] * len(
            texts
        )
    counts = pool.counts
    fates = ("equal_to_gold", "verified_right", "duplicates", "surplus", "kept")
    assert counts["generated"] == 6 * len(ROWS) == sum(counts[fate] for fate in fates)
    assert all(counts[fate] > 0 for fate in ("equal_to_gold", "duplicates", "kept"))
    assert counts["kept"] == sum(len(row.negatives) for row in pool.rows)


def test_negatives_end_once_unless_truncated(build, tokenizer):
    pool = build(sampling=SamplingConfig(max_new_tokens=2))
    negatives = [negative for row in pool.rows for negative in row.negatives]
    assert {negative.truncated for negative in negatives} == {True, False}
    for negative in negatives:
        assert negative.ids.count(EOS) == (0 if negative.truncated else 1)
        assert tokenizer.decode(negative.ids, skip_special_tokens=True) == negative.text


def test_likelihood_is_of_the_plain_prompt_at_temperature_one(build, model):
    pool = build(system_prompt="1+1=3", sampling=SamplingConfig(max_new_tokens=4, temperature=2.0))
    for row in pool.rows[:4]:
        for negative in row.negatives:
            expected = likelihood_one_token_at_a_time(model, row.prompt_ids, negative.ids)
            assert negative.ref_log_likelihood == pytest.approx(expected, abs=1e-4)


def test_system_prompt_is_sampled_under_and_recorded(build, engine, tokenizer, tmp_path):
    pool = build(system_prompt="9*9=7")
    assert pool.settings.sampler["system_prompt"] == "9*9=7"
    assert load_pool(tmp_path / "pool").settings.sampler["system_prompt"] == "9*9=7"
    assert all(row.prompt_ids == encode_prompt(tokenizer, row.prompt) for row in pool.rows)
    assert drawn(pool) != drawn(build("plain"))
    under = encode_prompt(tokenizer, ROWS[0]["prompt"], "9*9=7")
    samples = engine.generate([under], SAMPLING, sample_ids=[0], num_generations=6).completion_ids
    assert all(ids in samples for ids in drawn(pool)[0])


def test_reference_engine_gives_the_likelihoods(build, model, tokenizer):
    other = AutoModelForCausalLM.from_config(model.config)
    pool = build(ref_engine=TransformersEngine(other, tokenizer))
    assert pool.settings.reference.fingerprint == model_fingerprint(other.eval())
    row = pool.rows[0]
    expected = likelihood_one_token_at_a_time(other, row.prompt_ids, row.negatives[0].ids)
    assert row.negatives[0].ref_log_likelihood == pytest.approx(expected, abs=1e-4)
    assert drawn(pool) == drawn(build("own"))


def test_pool_does_not_depend_on_batches_or_order(build):
    whole = build("whole")
    for name, rows, batch_prompts in (("ones", ROWS, 1), ("backwards", ROWS[::-1], 5)):
        pool = build(name, rows, batch_prompts=batch_prompts)
        assert drawn(pool) == drawn(whole)
        found = {row.prompt_id: row for row in pool.rows}
        for row in whole.rows:
            for one, other in zip(row.negatives, found[row.prompt_id].negatives, strict=True):
                assert one.ref_log_likelihood == pytest.approx(other.ref_log_likelihood, abs=1e-4)


def test_conversations_go_through_the_template(build, model):
    pool = build(rows=TALKS, verify=arithmetic_reward)
    row = pool.rows[0]
    assert row.prompt == TALKS[0]["prompt"]
    assert row.completion_ids[-1] == EOS
    expected = likelihood_one_token_at_a_time(model, row.prompt_ids, row.negatives[0].ids)
    assert row.negatives[0].ref_log_likelihood == pytest.approx(expected, abs=1e-4)
    assert pool.to_dataset()[0]["prompt"] == TALKS[0]["prompt"]


def test_answer_begins_where_prompt_and_gold_answer_part(build, tokenizer, model):
    """A generation prompt that the rendered answer lacks belongs to the negative's sequence."""
    kept = tokenizer.chat_template
    thinking = "{{- '<|assistant|>hm' -}}"
    try:
        tokenizer.chat_template = kept.replace("{{- '<|assistant|>' -}}", thinking)
        row = build(rows=TALKS).rows[0]
    finally:
        tokenizer.chat_template = kept
    assert tokenizer.decode(row.prompt_ids).endswith("<|assistant|>")
    assert tokenizer.decode(row.negatives[0].ids) == f"hm{row.negatives[0].text}<|end|>"
    expected = likelihood_one_token_at_a_time(model, row.prompt_ids, row.negatives[0].ids)
    assert row.negatives[0].ref_log_likelihood == pytest.approx(expected, abs=1e-4)


def test_sample_that_the_verifier_pays_is_no_negative(build):
    def pays_even(prompts, completions, completion_ids=None, **columns):
        assert set(columns) == {"answer"} and len(columns["answer"]) == len(completions)
        return [None if text == "7" else float(text[-1:] in "02468") for text in completions]

    pool = build(verify=pays_even)
    texts = [negative.text for row in pool.rows for negative in row.negatives]
    assert texts and all(text and text[-1] not in "02468" for text in texts)
    assert pool.counts["verified_right"] > 0


def test_truncated_beginning_of_the_gold_answer_is_no_negative():
    samples = [Sample(0, [7], "2", True, False), Sample(1, [7, 1], "2", False, False)]
    kept, counts = select_negatives(samples, gold="24", num_negatives=2)
    assert [sample.generation for sample in kept] == [1]
    assert counts["equal_to_gold"] == 1


def test_finished_pool_is_loaded_and_not_made_again(build, engine):
    first = build()
    engine.generate = None  # a second run must not sample
    assert build() == first


def test_finished_pool_of_other_settings_is_refused(build):
    build()
    with pytest.raises(ValueError, match=r"pool in .* num_generations is 6, not 8.*another path"):
        build(num_generations=8)
    with pytest.raises(ValueError, match=r"hash of prompts and gold answers is '\w+', not '\w+'"):
        build(rows=ROWS[:3])


def build_and_die_behind(prompts: int, path: str, model_path: str) -> None:
    """Build a pool; the process is killed once so many prompts are done and more are sampled."""
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    engine = TransformersEngine(AutoModelForCausalLM.from_pretrained(model_path), tokenizer)
    left = [prompts]

    def pays_nothing(completions, **_):
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return [0.0] * len(completions)

    def count(amount):
        left[0] -= amount

    pays_nothing.__module__ = "tests"
    build_pool(
        engine,
        tokenizer,
        ROWS,
        path,
        sampling=SAMPLING,
        num_negatives=2,
        batch_prompts=2,
        verify=pays_nothing,
        on_progress=count,
    )


def test_killed_run_resumes_to_the_same_file(tmp_path, tiny_model_path):
    """SIGKILL after sampling and before writing, then a torn line and an unfinished batch."""
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    build_and_die_behind(1000, whole, tiny_model_path)
    code = "import sys; from tests.rollout.test_negatives import build_and_die_behind as build; "
    command = [sys.executable, "-c", code + "build(6, *sys.argv[1:])", str(killed), tiny_model_path]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    child = subprocess.run(command, env=environment, check=False)
    assert child.returncode == -signal.SIGKILL
    assert not (killed / "pool.json").exists()
    partial = killed / "pool.partial.jsonl"
    lines = partial.read_text().splitlines(keepends=True)
    assert len(lines) == 1 + 6
    expected = (whole / "pool.jsonl").read_text().splitlines(keepends=True)
    # as if the process had died while it wrote the second row of the fourth batch
    partial.write_text("".join(lines) + expected[6] + expected[7][:20])
    build_and_die_behind(1000, killed, tiny_model_path)
    assert (killed / "pool.jsonl").read_bytes() == (whole / "pool.jsonl").read_bytes()
    assert (killed / "pool.json").read_bytes() == (whole / "pool.json").read_bytes()
    assert not partial.exists()


def test_progress_counts_prompts(build):
    seen = []
    build(batch_prompts=5, on_progress=seen.append)
    assert seen == [0, 5, 5, 2]


def test_fresh_negatives_are_the_pools_until_the_policy_moves(build, engine, tokenizer, model):
    pool = build()
    rows = list(pool.to_dataset(with_empty=True))
    ask = {"tokenizer": tokenizer, "sampling": SAMPLING, "num_negatives": 3, "num_generations": 6}
    fresh = draw_negatives(engine, rows, **ask)
    assert [row["negative_ids"] for row in fresh] == [row["negative_ids"] for row in rows]
    assert fresh[0]["ref_log_likelihoods"] == pytest.approx(
        rows[0]["ref_log_likelihoods"], abs=1e-4
    )
    assert len(fresh[0]["negative_truncated"]) == len(fresh[0]["negative_ids"])
    engine.sync(model, version=7)
    moved = draw_negatives(engine, rows, **ask)
    assert [row["negative_ids"] for row in moved] != [row["negative_ids"] for row in rows]


def test_fresh_negatives_need_no_text(build, engine, tokenizer):
    pool = build()
    bare = [
        {"index": row.prompt_id, "prompt_ids": row.prompt_ids, "completion_ids": row.completion_ids}
        for row in pool.rows
    ]
    ask = {"tokenizer": tokenizer, "sampling": SAMPLING, "num_negatives": 3, "num_generations": 6}
    fresh = draw_negatives(engine, bare, **ask)
    assert [row["negative_ids"] for row in fresh] == list(drawn(pool).values())


def test_pool_without_usable_negative_raises(build):
    with pytest.raises(ValueError, match=r"no usable negative.*verified_right.*raise the temper"):
        build(verify=lambda completions, **_: [1.0] * len(completions))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"id": 4, "prompt": "1+1="}, r"question with id 4 .* no completion; give .* leave such"),
        ({"id": 4, "prompt": "1+1=", "completion": ""}, r"question with id 4 .* no completion"),
        ({"prompt": "1+1=", "completion": "2"}, r"columns \['completion', 'prompt'\] and no id"),
        ({**ROWS[0]}, r"id 0 stands on two rows.*with_index"),
    ],
)
def test_unusable_row_is_refused_before_anything_is_drawn(build, tmp_path, row, message):
    with pytest.raises(ValueError, match=message):
        build(rows=[*ROWS, row])
    assert not (tmp_path / "pool").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_negatives": 0}, r"num_negatives must be at least 1, got 0"),
        ({"num_generations": 2}, r"num_generations=2 samples cannot give num_negatives=3; draw"),
        ({"batch_prompts": 0}, r"batch_prompts must be at least 1, got 0"),
        ({"verify": lambda **_: [0.0]}, r"verify returned 1 rewards for 72 completions"),
    ],
)
def test_unusable_setting_is_refused(build, changes, message):
    with pytest.raises(ValueError, match=message):
        build(**changes)


def test_engine_that_hides_its_weights_needs_a_named_reference(build, engine, model, tokenizer):
    class Sealed(TransformersEngine):
        model = None

        def log_probs(self, prompts, completions, *, temperature=1.0):
            return engine.log_probs(prompts, completions, temperature=temperature)

    sealed = Sealed.__new__(Sealed)
    with pytest.raises(ValueError, match=r"weights out of a Sealed; say who it is: reference="):
        build(ref_engine=sealed)
    pool = build(ref_engine=sealed, reference=Identity("sealed", "eeee"))
    assert pool.settings.reference == Identity("sealed", "eeee")


def test_metadata_names_sampler_tokenizer_and_reference(build, tmp_path, model, tokenizer):
    pool = build(verify=arithmetic_reward)
    metadata = json.loads((tmp_path / "pool" / "pool.json").read_text())
    assert metadata["counts"] == pool.counts
    settings = metadata["settings"]
    assert settings["verify"] == "reward.arithmetic.arithmetic_reward"
    assert settings["reference"]["fingerprint"] == model_fingerprint(model)
    assert settings["sampler"] == {
        "max_new_tokens": 6,
        "temperature": 1.0,
        "top_p": 1.0,
        "top_k": 0,
        "seed": 3,
        "system_prompt": None,
        "num_negatives": 3,
        "num_generations": 6,
        "policy_version": 0,
    }
    load_pool(tmp_path / "pool", tokenizer=tokenizer)
