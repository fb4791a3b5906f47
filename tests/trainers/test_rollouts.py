"""Rollouts of DisCOTrainer: which questions, refilling, evaluation, what waits in a checkpoint."""

import logging

import pytest
import torch
from torch import Tensor

from llm_xrisk.fcco import join
from llm_xrisk.rollout.buffer import RolloutBuffer
from llm_xrisk.trainers.questions import QuestionStream
from tests.gloo import GlooPool
from tests.trainers.build import disco_trainer, logged, losses, questions
from tests.trainers.test_disco import STRONG, assert_same_run, never, trained


def test_questions_come_in_permutations_and_from_any_position():
    stream = QuestionStream(rows=5, seed=1)
    first = stream.draw(12)
    assert sorted(first[:5]) == sorted(first[5:10]) == list(range(5))
    assert first[:5] != first[5:10]
    again = QuestionStream(rows=5, seed=1)
    again.position = 7
    assert again.draw(5) == first[7:]
    assert QuestionStream(rows=5, seed=2).draw(12) != first


def test_a_question_asked_again_gets_other_answers(tmp_path):
    """Four questions a step, two in the data set: every rollout asks each several times."""
    trainer = disco_trainer(tmp_path, rows=questions(2))
    rows = trainer._roll_out()
    by_prompt: dict[tuple[int, ...], list[tuple[int, ...]]] = {}
    for prompt, completion in zip(rows.prompt_ids, rows.completion_ids, strict=True):
        by_prompt.setdefault(tuple(prompt), []).append(tuple(completion))
    assert len(by_prompt) == 2
    for answers in by_prompt.values():
        assert len(answers) == 16
        assert len(set(answers)) > 12
    assert len(set(rows.group)) == 8


def signal_share(rows: RolloutBuffer) -> float:
    groups = [rows.targets[k : k + 4] for k in range(0, len(rows), 4)]
    return sum(0 < sum(group) < 4 for group in groups) / len(groups)


def rarely(completions, **columns):
    return [float(sum(map(ord, text)) % 11 == 0) for text in completions]


def test_refilling_replaces_questions_without_a_signal(tmp_path):
    plain = disco_trainer(tmp_path, reward=rarely)._roll_out()
    trainer = disco_trainer(tmp_path, reward=rarely, rollout={"refill_tokens": 10_000})
    refilled = trainer._roll_out()
    assert signal_share(plain) < 0.8
    assert signal_share(refilled) == 1.0
    assert len(refilled) == len(plain) == 32
    for start in range(0, 32, 4):  # whole questions
        assert len(set(refilled.group[start : start + 4])) == 1
        assert len(set(map(tuple, refilled.prompt_ids[start : start + 4]))) == 1
    assert len(set(refilled.group)) == 8
    (spent,) = [float(value) for value, _ in trainer._recorded["train"]["rollout/refill_tokens"]]
    assert spent > 0
    assert trainer._stream.position > 8


def test_refilling_stops_where_the_budget_ends(tmp_path):
    trainer = disco_trainer(tmp_path, reward=never, rollout={"refill_tokens": 100})
    rows = trainer._roll_out()
    (spent,) = [float(value) for value, _ in trainer._recorded["train"]["rollout/refill_tokens"]]
    # the round that exceeds it is the last: 8 questions of 4 answers of at most 6 tokens
    assert 100 <= spent < 100 + 8 * 4 * 6
    assert len(rows) == 32
    assert signal_share(rows) == 0


def test_refilling_with_a_signal_everywhere_asks_nothing(tmp_path):
    calls: list[int] = []

    def alternate(completions, **columns):
        calls.append(len(completions))
        return [float(k % 2) for k in range(len(completions))]

    trainer = disco_trainer(tmp_path, reward=alternate, rollout={"refill_tokens": 1000})
    assert signal_share(trainer._roll_out()) == 1.0
    assert calls == [32]


def unequal_refill(rank: int) -> list[float]:
    """Rank 0 always has a signal, rank 1 never: both must leave the loop together."""
    torch.manual_seed(0)

    def alternate(completions, **columns):
        return [float(k % 2) for k in range(len(completions))]

    reward = alternate if rank == 0 else never
    trainer = disco_trainer("unused", reward=reward, rollout={"refill_tokens": 200})
    rows = trainer._refill(trainer._generate(list(range(8)), list(range(8))), 8)
    (spent,) = [float(value) for value, _ in trainer._recorded["train"]["rollout/refill_tokens"]]
    positions = join(torch.tensor([trainer._stream.position]))[0].tolist()
    return [len(rows), signal_share(rows), spent, *positions]


@pytest.mark.dist
def test_two_ranks_refill_together(gloo):
    one, other = gloo.run(2, unequal_refill)
    assert one[:2] == [32, 1.0]
    assert other[:2] == [32, 0.0]
    assert other[2] >= 200
    assert one[3] == one[4] == other[3] == other[4] > 0


@pytest.fixture
def gloo():
    pool = GlooPool(2)
    yield pool
    pool.close()


def test_evaluation_asks_every_question_and_changes_no_training(tmp_path):
    plain = trained(tmp_path / "a", **STRONG)
    evaluated = disco_trainer(
        tmp_path / "b", **STRONG, eval_strategy="steps", eval_steps=1, eval_dataset=questions(5)
    )
    evaluated.train()
    assert_same_run(plain, evaluated)
    assert len(logged(evaluated, "eval_reward")) == 4
    metrics = evaluated.evaluate(questions(7))
    assert {"eval_reward", "eval_mean_length"} <= set(metrics)
    assert (metrics["eval_reward"] * 28) % 1 == pytest.approx(0, abs=1e-4)


# -- what survives a restart -----------------------------------------------------------------------


def test_a_buffer_survives_its_file_to_the_bit():
    buffer = RolloutBuffer(
        [[1, 2], [1, 2], [3]], [[4], [5, 6], [7]], [[-0.1], [-1e-9, -2.5], [-1 / 3]],
        [1.0, 0.0, 1.0], [9, 9, 12], 3,
    )  # fmt: skip
    again = RolloutBuffer.from_state({k: v.clone() for k, v in buffer.state().items()})
    assert again == buffer
    assert RolloutBuffer.from_state(RolloutBuffer().state()) == RolloutBuffer()


def test_a_rollout_made_for_other_steps_is_dropped_and_said(tmp_path, caplog):
    settings = {"save_strategy": "steps", "save_steps": 1}
    trained(tmp_path, **settings, max_steps=1)
    caplog.set_level(logging.WARNING)
    other = disco_trainer(
        tmp_path, **settings, max_steps=3, rollout={"num_generations": 8, "updates_per_rollout": 2}
    )
    other.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    (text,) = [r.getMessage() for r in caplog.records if "checkpoint was written" in r.getMessage()]
    assert "'num_generations': '4'" in text
    assert "'num_generations': '8'" in text
    assert "are dropped and new ones generated" in text
    assert len(losses(other)) == 3


def old_policy(trainer) -> Tensor:
    return torch.tensor([value for row in trainer._buffer.old_log_probs for value in row])


def test_a_waiting_rollout_is_restored_with_its_old_policy(tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 1, **STRONG}
    first = trained(tmp_path, **settings, max_steps=1)
    resumed = disco_trainer(tmp_path, **settings, max_steps=2)
    seen: list[Tensor] = []
    fetch = resumed.mini_batch

    def watch(batches):
        seen.append(old_policy(resumed))
        return fetch(batches)

    resumed.mini_batch = watch
    resumed.train(resume_from_checkpoint=True)
    assert len(old_policy(first)) > 0
    assert torch.equal(seen[0], old_policy(first))
