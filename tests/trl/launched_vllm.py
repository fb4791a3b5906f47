"""A few steps of TRL with vLLM in the process, at a learning rate at which a stale weight shows.

Arguments: a folder, the step from which on tied heads are no longer refreshed after a sync, and the
number of steps. Writes how far vLLM's log-probs were from the trainer's in each step, as
``gaps.json``.
"""

import json
import os
import sys
from pathlib import Path

# vLLM binds the port ten seconds after it is chosen; TRL replaces 0 by a free one
os.environ.update({"MASTER_PORT": "0", "VLLM_CPU_CI_ENV": "1"})

from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

import llm_xrisk.trl
from llm_xrisk.data.gsm8k_steps import load_steps, tiny_model_path
from llm_xrisk.trl import DisCOGRPOConfig, DisCOGRPOTrainer


class LeaveHeadsStale(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args, state, control, **_):
        if state.global_step == self.step:
            llm_xrisk.trl.refresh_tied_heads = lambda model: 0


def every_other(completions: list[str], **_: object) -> list[float]:
    """Never all right or all wrong: every step moves the weights."""
    return [float(k % 2) for k in range(len(completions))]


def main(output: str, stale_from: int, steps: int) -> None:
    args = DisCOGRPOConfig(
        output,
        per_device_train_batch_size=16,
        num_generations=8,
        max_completion_length=8,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        max_steps=steps,
        logging_steps=1,
        bf16=False,
        use_cpu=True,
        gradient_checkpointing=False,
        use_vllm=True,
        vllm_mode="colocate",
        vllm_gpu_memory_utilization=0.1,
        vllm_max_model_length=64,
        report_to="none",
        disable_tqdm=True,
        save_strategy="no",
    )
    model = AutoModelForCausalLM.from_pretrained(tiny_model_path())
    if not model.config.tie_word_embeddings:
        raise RuntimeError("this is about a model whose output head is tied to its embedding")
    trainer = DisCOGRPOTrainer(
        model,
        every_other,
        args,
        train_dataset=Dataset.from_list(load_steps("train")[:256]),
        processing_class=AutoTokenizer.from_pretrained(tiny_model_path()),
        callbacks=[LeaveHeadsStale(stale_from)],
    )
    trainer.train()
    name = "sampling/sampling_logp_difference/mean"
    gaps = [entry[name] for entry in trainer.state.log_history if name in entry]
    Path(output, "gaps.json").write_text(json.dumps(gaps))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
