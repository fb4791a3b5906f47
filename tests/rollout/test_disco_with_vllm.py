"""DisCO on a real vLLM: the engine follows the trainer, on a model with tied embeddings too."""

from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from llm_xrisk.data.gsm8k_steps import load_steps
from llm_xrisk.trainers import DisCOConfig, DisCOTrainer, RolloutConfig
from reward import arithmetic_reward

pytestmark = pytest.mark.vllm


def test_disco_trains_on_vllm_rollouts_that_follow_a_tied_model(
    tiny_model_path: str, tmp_path: Path
) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model_path)
    assert model.config.tie_word_embeddings
    trainer = DisCOTrainer(
        model,
        DisCOConfig(
            output_dir=str(tmp_path),
            max_steps=6,
            per_device_train_batch_size=64,
            learning_rate=3e-3,  # large: a policy that lags would show
            delta=1.0,
            logging_steps=2,
            use_cpu=True,
            gradient_checkpointing=False,
            save_strategy="no",
            report_to=[],
        ),
        reward_funcs=arithmetic_reward,
        train_dataset=load_steps("train")[:200],
        processing_class=AutoTokenizer.from_pretrained(tiny_model_path),
        rollout=RolloutConfig(
            max_new_tokens=12, temperature=1.0, updates_per_rollout=2, rollout="vllm"
        ),
    )
    before = model.lm_head.weight.detach().clone()
    try:
        trainer.train()
    finally:
        trainer.engine.close()
    logs = [row for row in trainer.state.log_history if "sampling/log_prob_difference" in row]
    assert len(logs) == 3, "one rollout for every two steps"
    assert float((model.lm_head.weight.detach() - before).abs().max()) > 1e-3
    assert max(row["sampling/log_prob_difference"] for row in logs) < 1e-4
    assert trainer.engine.policy_version == 4
