"""DisCOTrainer: rollouts, grading, skipped work, memory of what was asked."""

import math
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, PreTrainedModel

from llm_xrisk.trainers import DisCOTrainer, RolloutConfig, mixin
from llm_xrisk.trainers.questions import Grader
from reward.math import math_reward
from tests.trainers.build import (
    LORA,
    disco_config,
    disco_trainer,
    even_code,
    logged,
    losses,
    tiny_model,
    weights,
)

STRONG = {"learning_rate": 3e-3}  # far enough for the hinge to act


def trained(folder, **changes):
    trainer = disco_trainer(folder, **changes)
    trainer.train()
    return trainer


def assert_same_run(one, other, *, exact: bool = True) -> None:
    if exact:
        assert losses(one) == losses(other)
        assert torch.equal(weights(one.model), weights(other.model))
    else:
        assert losses(one) == pytest.approx(losses(other), rel=1e-4, abs=1e-6)
        torch.testing.assert_close(weights(one.model), weights(other.model), rtol=1e-4, atol=1e-6)


# -- work that may be skipped ----------------------------------------------------------------------


def test_dropping_rows_with_zero_coefficients_changes_nothing(tmp_path, monkeypatch):
    settings = {"kl_penalty": 0.0, "per_device_train_batch_size": 4}
    settings |= {"gradient_accumulation_steps": 4, "max_steps": 4}
    kept: list[int] = []
    drop = mixin._without_inert_rows

    def watch(batch):
        left = drop(batch)
        kept.append(len(left["targets"]))
        return left

    monkeypatch.setattr(mixin, "_without_inert_rows", watch)
    dropped = trained(tmp_path / "a", **settings)
    monkeypatch.setattr(mixin, "_without_inert_rows", lambda batch: batch)
    whole = trained(tmp_path / "b", **settings)
    assert min(kept) < 4  # something was dropped
    assert_same_run(dropped, whole, exact=False)


def test_the_scores_of_a_fresh_rollout_need_no_pass(tmp_path, monkeypatch):
    settings = STRONG | {"max_steps": 4}
    skipping = trained(tmp_path / "a", **settings)
    scored = disco_trainer(tmp_path / "b", **settings)
    fetch = scored.mini_batch
    passes: list[bool] = []

    def without_known_scores(batches):
        made = fetch(batches)
        passes.append("row_scores" in made[0])
        return [{k: v for k, v in b.items() if k != "row_scores"} for b in made]

    monkeypatch.setattr(scored, "mini_batch", without_known_scores)
    scored.train()
    assert passes == [True, False, True, False]
    assert_same_run(skipping, scored)


@pytest.mark.parametrize("score", ["log_likelihood", "likelihood_ratio"])
def test_a_step_in_one_micro_batch_is_a_step_in_several(tmp_path, score):
    """Alone it needs no score pass, and its first step no pass for old log-probs either."""
    settings = STRONG | {"score": score, "tau": 1.0, "max_steps": 6}
    several = trained(tmp_path / "a", **settings)
    alone = trained(
        tmp_path / "b",
        per_device_train_batch_size=16,
        gradient_accumulation_steps=1,
        **settings,
    )
    assert_same_run(alone, several, exact=False)
    for name in ("kl/k3", "entropy", "reward", "groups/valid_fraction"):
        assert logged(alone, name) == pytest.approx(logged(several, name), rel=1e-3, abs=1e-6)


def test_the_engine_s_log_probs_never_stand_in_for_the_trainer_s(tmp_path):
    """An engine that is off by a nat changes its own metric and nothing else."""
    honest = trained(tmp_path / "a", **STRONG)
    for layout in ({}, {"per_device_train_batch_size": 16, "gradient_accumulation_steps": 1}):
        off = disco_trainer(tmp_path / "b", **STRONG, **layout)
        generate = off.engine.generate

        def wrong(*args, generate=generate, **kwargs):
            batch = generate(*args, **kwargs)
            batch.log_probs = [[value - 1 for value in row] for row in batch.log_probs]
            return batch

        off.engine.generate = wrong
        off.train()
        assert_same_run(off, honest, exact=False)
        assert logged(off, "sampling/log_prob_difference") == pytest.approx([1.0, 1.0], rel=1e-4)
    assert max(logged(honest, "sampling/log_prob_difference")) < 1e-5


# -- the objective over the trainer ----------------------------------------------------------------


def test_the_hinge_sees_the_whole_mini_batch(tmp_path):
    trainer = trained(tmp_path, **STRONG, max_steps=2)
    first, second = logged(trainer, "kl/k3")
    assert first == 0
    assert second > 1e-4
    assert logged(trainer, "kl/multiplier")[1] == pytest.approx(1000 * (second - 1e-4), rel=1e-4)
    assert logged(trainer, "kl/violated") == [0, 1]


def test_without_a_hinge_a_dead_one_changes_nothing(tmp_path):
    """delta above every KL that occurs: bit for bit the run without a penalty."""
    dead = trained(tmp_path / "a", delta=1e3)
    free = trained(tmp_path / "b", kl_penalty=0.0)
    assert_same_run(dead, free)


@pytest.mark.parametrize("objective", ["DisCO", "GRPO", "DrGRPO", "DAPO"])
def test_every_objective_trains_on_rollouts(tmp_path, objective):
    trainer = trained(tmp_path, objective=objective, **STRONG, max_steps=4)
    assert all(map(math.isfinite, losses(trainer)))
    assert not torch.equal(weights(trainer.model), weights(tiny_model()))


def never(completions, **columns):
    return [0.0] * len(completions)


def test_a_run_without_any_signal_stands_still(tmp_path):
    trainer = trained(tmp_path, reward=never)
    assert torch.equal(weights(trainer.model), weights(tiny_model()))
    assert losses(trainer) == [0.0] * 4
    assert logged(trainer, "groups/valid_fraction") == [0.0] * 4
    assert logged(trainer, "reward") == [0.0] * 2


def test_the_adapter_generates_and_is_trained_and_no_second_model_exists(tmp_path, monkeypatch):
    built: list[str] = []
    init = PreTrainedModel.__init__

    def building(self, *args, **kwargs):
        built.append(type(self).__name__)
        init(self, *args, **kwargs)

    monkeypatch.setattr(PreTrainedModel, "__init__", building)
    trainer = disco_trainer(tmp_path, peft_config=LoraConfig(**LORA), learning_rate=0.05)
    trainer.train()
    assert sorted(built) == ["Qwen3ForCausalLM", "Qwen3Model"]
    moved = [n for n, p in trainer.model.named_parameters() if p.requires_grad and p.abs().any()]
    assert any("lora_B" in name for name in moved)
    assert max(logged(trainer, "sampling/log_prob_difference")) < 1e-5


@pytest.mark.parametrize("kind", ["bf16", "gradient_checkpointing"])
def test_cheaper_settings_train(tmp_path, kind):
    cheap = trained(tmp_path / "a", **STRONG, **{kind: True}, max_steps=2)
    plain = trained(tmp_path / "b", **STRONG, max_steps=2)
    if kind == "gradient_checkpointing":
        assert_same_run(cheap, plain)
    else:
        # bfloat16 draws other answers now and then: only what is recorded is compared
        assert all(map(math.isfinite, losses(cheap)))
        assert logged(cheap, "kl/k3")[0] < 1e-6  # old and new are computed alike
        assert not torch.equal(weights(cheap.model), weights(plain.model))


# -- grading ---------------------------------------------------------------------------------------


def graded(completions, **columns):
    """Neither 0 nor 1, but on the same side of 0.3 as even_code of 0.5."""
    return [0.9 if value else 0.2 for value in even_code(completions)]


def test_a_threshold_gives_what_binary_rewards_give(tmp_path):
    binary = trained(tmp_path / "a", **STRONG)
    thresholded = trained(tmp_path / "b", reward=graded, reward_threshold=0.3, **STRONG)
    assert_same_run(binary, thresholded)


def test_questions_that_cannot_be_graded_give_no_signal_and_are_counted(tmp_path):
    def some(completions, prompts, **columns):
        known = even_code(completions)
        return [None if "+" in p else r for p, r in zip(prompts, known, strict=True)]

    trainer = disco_trainer(tmp_path, reward=some, max_steps=6)
    seen: list[tuple[str, list[float]]] = []
    roll_out = trainer._roll_out

    def watch():
        rows = roll_out()
        for start in range(0, len(rows), 4):
            text = trainer.processing_class.decode(rows.prompt_ids[start])
            seen.append((text, rows.targets[start : start + 4]))
        return rows

    trainer._roll_out = watch
    trainer.train()
    ungradable = [targets for text, targets in seen if "+" in text]
    assert ungradable
    assert all(targets == [0.0] * 4 for targets in ungradable)
    share = len(ungradable) / len(seen)
    counted = logged(trainer, "rewards/ungradable")
    assert sum(counted) / len(counted) == pytest.approx(share)
    # the mean reward is that of what was graded
    assert logged(trainer, "reward") == pytest.approx(logged(trainer, "rewards/some/mean"))


def test_reward_functions_get_their_columns_and_may_report():
    seen: dict[str, object] = {}

    def reward(prompts, completions, answer, finish_reasons, log_metric, **rest):
        seen.update(prompts=prompts, completions=completions, answer=answer, rest=rest)
        log_metric("my/metric", 7)
        return [1.0 if reason == "stop" else 0.0 for reason in finish_reasons]

    async def later(completions, **columns):
        return [0.0] * len(completions)

    rows = [{"prompt": "1+1=", "answer": "2", "index": 3, "completion_ids": "mine"}] * 2
    grader = Grader([reward, later], [1.0, 5.0], None, lambda ids: "".join(map(str, ids)))
    grader.check(rows)
    grades = grader(rows, [[2], [3]], ["stop", "length"], None)
    assert grades.targets == [1.0, 0.0]
    assert grades.rewards == {"reward": 0.5, "later": 0.0}
    assert grades.metrics == {"my/metric": 7.0}
    assert seen["answer"] == ["2", "2"]
    assert seen["completions"] == ["2", "3"]
    assert seen["rest"]["index"] == [3, 3]
    assert seen["rest"]["completion_ids"] == [[2], [3]]  # the completions', not the data set's


def test_conversations_are_answered_by_messages():
    seen: list[object] = []

    def reward(completions, **columns):
        seen.extend(completions)
        return [1.0]

    prompt = [{"role": "user", "content": "1+1="}]
    Grader([reward], None, None, lambda ids: "2")([{"prompt": prompt}], [[5]], ["stop"], None)
    assert seen == [[{"role": "assistant", "content": "2"}]]


def test_the_verifier_of_mathematics_grades_rollouts_as_it_is(
    tiny_model_path: str, tmp_path: Path
) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model_path)
    rows = [{"prompt": f"{k}+1=", "answer": str(k + 1)} for k in range(8)]
    trainer = DisCOTrainer(
        model,
        disco_config(tmp_path, max_steps=2),
        reward_funcs=math_reward,
        train_dataset=Dataset.from_list(rows),
        rollout=RolloutConfig(max_new_tokens=6, num_generations=4, updates_per_rollout=2),
    )
    trainer.train()
    logs = trainer.state.log_history[0]
    assert logs["reward"] == 0.0  # the tiny model writes no box
    assert logs["math/no_answer_rate"] + logs.get("math/truncated_rate", 0.0) == 1.0


def test_questions_whose_gold_answer_cannot_be_read_are_named_before_training(caplog) -> None:
    rows = [{"prompt": "1+1=", "answer": "2"}, {"prompt": "?", "answer": ""}]
    grader = Grader([math_reward], None, 0.0, str)
    with caplog.at_level("WARNING", logger="llm_xrisk.trainers.questions"):
        grader.check(rows)
    assert "math_reward cannot grade 1 of 2 questions (row 1: an empty text)" in caplog.text
    with pytest.raises(ValueError, match="cannot grade 1 of 1 questions"):
        grader.check(rows[1:])
    with pytest.raises(ValueError, match="got rows with prompt, need answer or solution"):
        grader.check([{"prompt": "1+1="}])
