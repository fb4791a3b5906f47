"""Evaluation of the shipped model by the real engine, and the counts behind its numbers."""

import json
import logging
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from llm_xrisk.data.gsm8k_steps import load_steps
from llm_xrisk.evaluation.pass_at_k import Evaluation, evaluate
from llm_xrisk.rollout import SamplingConfig, TransformersEngine
from reward import arithmetic_reward
from tests.evaluation.conftest import make_run

SAMPLING = SamplingConfig(max_new_tokens=8, seed=3)
ROWS = load_steps("test")[:12]


@pytest.fixture(scope="module")
def tokenizer(tiny_model_path: str) -> Any:
    return AutoTokenizer.from_pretrained(tiny_model_path)


@pytest.fixture(scope="module")
def engine(tiny_model_path: str, tokenizer: Any) -> Iterator[TransformersEngine]:
    engine = TransformersEngine(AutoModelForCausalLM.from_pretrained(tiny_model_path), tokenizer)
    yield engine
    engine.close()


def run(engine: TransformersEngine, tokenizer: Any, rows: Any = ROWS, **options: Any) -> Evaluation:
    options = {"sampling": SAMPLING, "num_generations": 4, "ks": (1, 4)} | options
    reward_fn = options.pop("reward_fn", arithmetic_reward)
    return evaluate(engine, rows, tokenizer, reward_fn, **options)


def test_pass_at_k_of_known_counts() -> None:
    run = make_run("base", [0, 1, 2, 4], greedy=[0, 0, 1, 1])
    np.testing.assert_allclose(run.values("pass@1"), [0, 1 / 4, 2 / 4, 1])
    # of the 6 pairs of 4 samples, 3 hold the one right sample; 5 hold at least one of two
    np.testing.assert_allclose(run.values("pass@2"), [0, 3 / 6, 5 / 6, 1])
    assert run.mean("greedy") == 0.5
    assert run.mean("mean_length") == (2 + 3 + 4 + 5) / 4
    assert run.mean("truncation_rate") == (1 / 4) / 4
    assert run.metrics == ["pass@1", "greedy", "pass@2", "mean_length", "truncation_rate"]


def test_every_metric_has_an_interval_around_it() -> None:
    run = make_run("base", [0, 1, 2, 4], greedy=[0, 0, 1, 1])
    for metric, interval in run.summary().items():
        assert interval.lower <= interval.estimate <= interval.upper, metric
        assert interval.estimate == pytest.approx(run.mean(metric))


def test_an_evaluation_survives_the_disk(
    engine: TransformersEngine, tokenizer: Any, tmp_path: Path
) -> None:
    found = run(engine, tokenizer)
    found.save(tmp_path / "deep" / "run.json")
    assert Evaluation.load(tmp_path / "deep" / "run.json") == found
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["run.json"]


def test_a_file_of_another_format_is_refused(tmp_path: Path) -> None:
    (tmp_path / "other.json").write_text(json.dumps({"format": 99}))
    with pytest.raises(ValueError, match=r"has format 99, need 1; write it with Evaluation\.save"):
        Evaluation.load(tmp_path / "other.json")


def test_counts_are_those_of_the_engine_graded_by_hand(
    engine: TransformersEngine, tokenizer: Any
) -> None:
    found = run(engine, tokenizer, keep_generations=4)
    prompts = [tokenizer(row["prompt"])["input_ids"] for row in ROWS]
    ids = [row["id"] for row in ROWS]
    batch = engine.generate(prompts, SAMPLING, sample_ids=ids, num_generations=4)
    texts = tokenizer.batch_decode(batch.completion_ids, skip_special_tokens=True)
    sampled = [sample for sample in found.samples if not sample.greedy]
    assert [sample.text for sample in sampled] == texts
    assert [sample.sample_id for sample in sampled] == batch.sample_ids
    for number, row in enumerate(ROWS):
        rows = range(4 * number, 4 * number + 4)
        right = [
            texts[i] == row["answer"] and batch.finish_reasons[i] == "stop" for i in rows
        ]  # an equal number written otherwise is right too
        assert found.correct[number] >= sum(right)
        assert found.mean_lengths[number] == np.mean([len(batch.completion_ids[i]) for i in rows])
        assert found.truncated[number] == sum(batch.finish_reasons[i] == "length" for i in rows)
    assert sum(found.correct) == sum(sample.correct for sample in sampled)


def test_greedy_is_the_likeliest_token_at_every_step(
    engine: TransformersEngine, tokenizer: Any
) -> None:
    found = run(engine, tokenizer)
    greedy = [sample for sample in found.samples if sample.greedy]
    prompts = [tokenizer(row["prompt"])["input_ids"] for row in ROWS]
    ids = [row["id"] for row in ROWS]
    batch = engine.generate(prompts, replace(SAMPLING, temperature=0.0), sample_ids=ids)
    texts = tokenizer.batch_decode(batch.completion_ids, skip_special_tokens=True)
    assert [sample.text for sample in greedy] == texts
    assert found.greedy_correct == [int(sample.correct) for sample in greedy]
    assert run(engine, tokenizer, greedy=False).greedy_correct is None


def test_a_conversation_goes_through_the_chat_template(
    engine: TransformersEngine, tokenizer: Any
) -> None:
    seen: list[Any] = []

    def reward(prompts: Any, completions: Any, **columns: Any) -> list[float | None]:
        seen.extend(completions)
        return [1.0] * len(completions)

    rows = [{**row, "prompt": [{"role": "user", "content": row["prompt"]}]} for row in ROWS]
    found = run(engine, tokenizer, rows, reward_fn=reward)
    assert all(len(chat) == 1 and chat[0]["role"] == "assistant" for chat in seen)
    assert found.samples[0].prompt == f"user: {ROWS[0]['prompt']}"
    assert [sample.text for sample in found.samples] != [
        sample.text for sample in run(engine, tokenizer).samples
    ]


def test_the_reward_function_sees_columns_repeated_and_finish_reasons(
    engine: TransformersEngine, tokenizer: Any
) -> None:
    calls: list[dict[str, Any]] = []

    def reward(**columns: Any) -> list[float | None]:
        calls.append(columns)
        return [0.0] * len(columns["completions"])

    run(engine, tokenizer, ROWS[:2], reward_fn=reward, num_generations=2, ks=(1,), greedy=False)
    first, second = ROWS[:2]
    assert calls[0]["answer"] == [first["answer"]] * 2 + [second["answer"]] * 2
    assert calls[0]["prompts"] == [first["prompt"]] * 2 + [second["prompt"]] * 2
    assert set(calls[0]["finish_reasons"]) <= {"stop", "length"}
    assert len(calls[0]["completion_ids"]) == len(calls[0]["finish_reasons"]) == 4


def test_progress_adds_up_to_all_completions(engine: TransformersEngine, tokenizer: Any) -> None:
    done: list[int] = []
    run(engine, tokenizer, on_progress=done.append)
    assert sum(done) == len(ROWS) * (4 + 1)


def test_ungradable_prompts_are_left_out_and_counted(
    engine: TransformersEngine, tokenizer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [{**row, "answer": "?"} if number < 3 else row for number, row in enumerate(ROWS)]
    with caplog.at_level(logging.WARNING, logger="llm_xrisk"):
        found = run(engine, tokenizer, rows)
    assert found.ungradable == 3
    assert found.sample_ids == [row["id"] for row in ROWS[3:]]
    assert found.correct == run(engine, tokenizer).correct[3:]
    assert "3 of 12 prompts ungradable" in caplog.text
    with pytest.raises(ValueError, match="none of the 12 prompts could be graded"):
        run(engine, tokenizer, [{**row, "answer": "?"} for row in ROWS])


def test_kept_completions_are_spread_over_the_prompts(
    engine: TransformersEngine, tokenizer: Any
) -> None:
    found = run(engine, tokenizer, keep_prompts=4, keep_generations=1)
    kept = [ROWS[place]["id"] for place in (0, 4, 7, 11)]
    assert [sample.sample_id for sample in found.samples] == [i for i in kept for _ in range(2)]
    assert [sample.greedy for sample in found.samples] == [True, False] * 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ks": (8,)}, r"got ks=\[8\] with num_generations=4; .* raise num_generations"),
        ({"ks": ()}, r"got ks=\[\]"),
        ({"rows": [{"question": "1+1="}]}, r"got \['question'\]; need rows with a column 'prompt'"),
        ({"rows": []}, "got no rows"),
        ({"rows": [ROWS[0], ROWS[0]]}, "got 2 rows with 1 distinct values of 'id'"),
        (
            {"reward_fn": lambda completions, **_: [0.5] * len(completions)},
            r"needs binary rewards, got values \[0.5\]; threshold them",
        ),
        ({"reward_fn": lambda **_: [1.0]}, "gave 1 rewards for 48 completions"),
    ],
)
def test_bad_input_is_refused_with_what_to_do(
    engine: TransformersEngine, tokenizer: Any, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        run(engine, tokenizer, **options)
