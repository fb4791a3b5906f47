"""Four SGD steps on stored completions; rank 0 writes losses, KL and the weights' change.

Arguments: a folder, and the completions of a micro-batch on each process.
"""

import json
import sys
from pathlib import Path

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from llm_xrisk.data.gsm8k_steps import load_steps, tiny_model_path
from llm_xrisk.fcco import leave
from llm_xrisk.trl import DisCOGRPOConfig, DisCOGRPOTrainer

GENERATIONS = 4


def stored(prompts: list[str], trainer: DisCOGRPOTrainer) -> dict[str, object]:
    """Completions that depend on the prompt and its repetition alone."""
    encode = trainer.processing_class
    texts = [str(len(prompt) * (k % GENERATIONS) ** 2) for k, prompt in enumerate(prompts)]
    return {
        "prompt_ids": [encode(prompt)["input_ids"] for prompt in prompts],
        "completion_ids": [[*encode(text)["input_ids"], encode.eos_token_id] for text in texts],
        "logprobs": None,
    }


def uneven(completions: list[str], answer: list[str], **_: object) -> list[float]:
    """One, two or no right answers to a question."""
    kinds = [len(gold) % 3 for gold in answer]
    return [float(k % GENERATIONS < kind) for k, kind in enumerate(kinds)]


def main(output: str, rows: int) -> None:
    args = DisCOGRPOConfig(
        output,
        per_device_train_batch_size=rows,
        num_generations=GENERATIONS,
        num_iterations=2,
        tau=1.0,
        kl_penalty=5.0,
        optim="sgd",
        learning_rate=0.003,
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        max_steps=4,
        logging_steps=1,
        bf16=False,
        use_cpu=True,
        gradient_checkpointing=False,
        disable_tqdm=True,
        report_to="none",
        save_strategy="no",
    )
    trainer = DisCOGRPOTrainer(
        AutoModelForCausalLM.from_pretrained(tiny_model_path()),
        uneven,
        args,
        train_dataset=Dataset.from_list(load_steps("train")[:64]),
        processing_class=AutoTokenizer.from_pretrained(tiny_model_path()),
        rollout_func=stored,
    )
    before = torch.cat([p.detach().flatten().clone() for p in trainer.model.parameters()])
    trainer.train()
    if trainer.accelerator.is_main_process:
        after = torch.cat([p.detach().flatten() for p in trainer.model.parameters()])
        torch.save(after - before, Path(output, "change.pt"))
        entries = [entry for entry in trainer.state.log_history if "objective" in entry]
        names = ("loss", "objective", "kl/k3", "groups/valid_fraction", "entropy")
        report = {name: [entry[name] for entry in entries] for name in names}
        report["world_size"] = trainer.accelerator.num_processes
        Path(output, "report.json").write_text(json.dumps(report))
    leave()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
