"""Composed rewards in training: format and accuracy together, columns, a real step of TRL."""

from collections.abc import Sequence
from typing import Any

import pytest
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import GRPOConfig, GRPOTrainer

from llm_xrisk.data.columns import require_columns
from reward.arithmetic import arithmetic_reward
from reward.compose import ByDataSource, Gate, WeightedSum
from reward.format import boxed_once
from reward.length import repetition, soft_overlong
from reward.math import math_reward


def test_format_pays_only_when_the_answer_is_right_and_the_reverse() -> None:
    batch = {
        "prompts": ["1+1="] * 4,
        "completions": [r"\boxed{2}", "2", r"\boxed{3}", "3"],
        "answer": ["2"] * 4,
    }
    right = graded_by_last_digit
    assert Gate(boxed_once, when=right)(**batch) == [1.0, 0.0, 0.0, 0.0]
    assert Gate(right, when=boxed_once)(**batch) == [1.0, 0.0, 0.0, 0.0]
    total = WeightedSum([(right, 1.0), (Gate(boxed_once, when=right), 0.1)])
    assert total(**batch) == [1.1, 1.0, 0.0, 0.0]


def graded_by_last_digit(completions: Sequence[str], answer: Sequence[str], **c: Any) -> list:
    """Say whether the last digit is the answer."""
    return [float(t.rstrip("}")[-1] == a) for t, a in zip(completions, answer, strict=True)]


def test_a_missing_column_of_a_part_is_found_before_training() -> None:
    function = ByDataSource({"sums": arithmetic_reward})
    with pytest.raises(ValueError, match=r"by_data_source asks for \['answer'\]"):
        require_columns(function, ["prompt", "data_source"])


def test_a_trainer_of_trl_takes_them_as_they_are(tiny_model_path: str, tmp_path: Any) -> None:
    rows = [
        {"prompt": f"{k}+1=", "answer": str(k + 1), "data_source": ("sums", "form")[k % 2]}
        for k in range(4)
    ]
    total = WeightedSum(
        [
            (ByDataSource({"sums": arithmetic_reward, "form": boxed_once}), 1.0),
            (Gate(soft_overlong(4, 2), when=arithmetic_reward), 0.5),
            (repetition(2), 0.1),
        ],
        name="everything",
    )
    trainer = GRPOTrainer(
        AutoModelForCausalLM.from_pretrained(tiny_model_path),
        [arithmetic_reward, math_reward, total],
        GRPOConfig(
            str(tmp_path),
            per_device_train_batch_size=8,
            num_generations=2,
            max_completion_length=4,
            max_steps=1,
            logging_steps=1,
            bf16=False,
            use_cpu=True,
            gradient_checkpointing=False,
            report_to="none",
            disable_tqdm=True,
            save_strategy="no",
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(tiny_model_path),
    )
    trainer.train()
    logged = trainer.state.log_history[0]
    assert "rewards/everything/mean" in logged
    assert "rewards/arithmetic_reward/mean" in logged
    assert "rewards/math_reward/mean" in logged
    assert any(name.startswith("math/") for name in logged)
    assert any(name.startswith("arithmetic/") for name in logged)
