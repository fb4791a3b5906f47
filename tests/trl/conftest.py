"""Trainers of the shipped model on the CPU, TRL's and ours, with the same rows."""

from collections.abc import Callable
from typing import Any

import pytest
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import GRPOTrainer

from llm_xrisk.data.gsm8k_steps import load_steps
from llm_xrisk.trl import DisCOGRPOConfig, DisCOGRPOTrainer
from reward import arithmetic_reward


@pytest.fixture
def settings(tmp_path) -> dict[str, Any]:
    """Two questions of four answers a micro-batch, four updates a rollout."""
    return {
        "output_dir": str(tmp_path),
        "per_device_train_batch_size": 8,
        "num_generations": 4,
        "steps_per_generation": 4,
        "max_completion_length": 8,
        "learning_rate": 1e-3,
        "max_steps": 5,
        "logging_steps": 1,
        "bf16": False,
        "use_cpu": True,
        "gradient_checkpointing": False,
        "report_to": "none",
        "disable_tqdm": True,
        "save_strategy": "no",
    }


@pytest.fixture
def make_trainer(settings, tiny_model_path) -> Callable[..., DisCOGRPOTrainer]:
    """``make_trainer(reward, peft_config=..., tau=0.0, ...)``: options of either kind."""

    def make(
        reward: Any = arithmetic_reward, trainer: Any = DisCOGRPOTrainer, **options: Any
    ) -> GRPOTrainer:
        names = ("peft_config", "eval_dataset", "rollout_func", "optimizers")
        passed = {name: options.pop(name) for name in names if name in options}
        return trainer(
            AutoModelForCausalLM.from_pretrained(tiny_model_path),
            reward,
            DisCOGRPOConfig(**(settings | options)),
            train_dataset=Dataset.from_list(load_steps("train")[:64]),
            processing_class=AutoTokenizer.from_pretrained(tiny_model_path),
            **passed,
        )

    return make
