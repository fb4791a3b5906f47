"""Small trainers of everything, for the tests of this folder and the scripts they launch."""

from functools import cache
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

from llm_xrisk.data.gsm8k_steps import load_steps, tiny_model_path
from llm_xrisk.trainers import DFTConfig, DFTTrainer, DisCOConfig, DisCOTrainer, RolloutConfig

LORA: dict[str, Any] = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "up_proj"]}
COMMON: dict[str, Any] = {
    "use_cpu": True,
    "report_to": [],
    "disable_tqdm": True,
    "gradient_checkpointing": False,
    "dataloader_pin_memory": False,
    "logging_steps": 1,
    "save_strategy": "no",
    "learning_rate": 0.1,
    "lr_scheduler_type": "constant",
    "optim": "sgd",
    "max_grad_norm": 0.0,
    "max_steps": 4,
}


@cache
def tokenizer() -> Any:
    """The shipped one: it comes without weights worth depending on."""
    return AutoTokenizer.from_pretrained(tiny_model_path())


def tiny_model(seed: int = 0, **changes: Any) -> PreTrainedModel:
    """Two layers of 32 whose distributions are far from flat."""
    settings: dict[str, Any] = {
        "vocab_size": 102,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 128,
        "tie_word_embeddings": True,
        "bos_token_id": None,
        "eos_token_id": 1,
        "pad_token_id": 0,
    }
    model = Qwen3ForCausalLM(Qwen3Config(**(settings | changes)))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.normal_(0.0, 0.15, generator=generator)
    return model


@cache
def _steps() -> list[Any]:
    return load_steps("train")[:100]


def questions(count: int = 24) -> list[dict[str, Any]]:
    """Real arithmetic, numbered."""
    rows = _steps()[:count]
    return [{"index": k, "prompt": r["prompt"], "answer": r["answer"]} for k, r in enumerate(rows)]


def pairs(count: int = 24, negatives: int = 3) -> list[dict[str, Any]]:
    """The same with gold answers and some wrong ones."""
    return [
        {
            "index": row["index"],
            "prompt": row["prompt"],
            "completion": row["answer"],
            "negatives": [str(7 * k + j + 1) for j in range(negatives)],
        }
        for k, row in enumerate(questions(count))
    ]


def even_code(completions: list[str], **columns: Any) -> list[float]:
    """A verifier that a random model satisfies half of the time."""
    return [float(sum(map(ord, text)) % 2 == 0) for text in completions]


def dft_config(output: Path | str, **changes: Any) -> DFTConfig:
    """Settings of a short run; per step 8 prompts with 2 negatives each."""
    batches = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    return DFTConfig(output_dir=str(output), **(COMMON | batches | changes))


def dft_trainer(
    output: Path | str,
    *,
    model: Any = None,
    rows: Any = None,
    peft_config: Any = None,
    eval_dataset: Any = None,
    callbacks: Any = None,
    **changes: Any,
) -> DFTTrainer:
    """A trainer on :func:`pairs`; ``changes`` are settings."""
    return DFTTrainer(
        model if model is not None else tiny_model(),
        dft_config(output, **changes),
        train_dataset=pairs() if rows is None else rows,
        eval_dataset=eval_dataset,
        processing_class=tokenizer(),
        peft_config=peft_config,
        callbacks=callbacks,
    )


def disco_config(output: Path | str, **changes: Any) -> DisCOConfig:
    """Settings of a short run; per step 4 questions with 4 answers each."""
    batches = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 2}
    small = {"learning_rate": 1e-3}  # so that the hinge acts and does not explode
    return DisCOConfig(output_dir=str(output), **(COMMON | batches | small | changes))


def disco_trainer(
    output: Path | str,
    *,
    model: Any = None,
    rows: Any = None,
    reward: Any = even_code,
    eval_dataset: Any = None,
    peft_config: Any = None,
    rollout: dict[str, Any] | None = None,
    callbacks: Any = None,
    engine: Any = None,
    **changes: Any,
) -> DisCOTrainer:
    """A trainer on :func:`questions`; ``changes`` are settings, ``rollout`` those of rollouts."""
    drawing: dict[str, Any] = {
        "max_new_tokens": 6,
        "temperature": 1.0,
        "num_generations": 4,
        "updates_per_rollout": 2,
    }
    return DisCOTrainer(
        model if model is not None else tiny_model(),
        disco_config(output, **changes),
        train_dataset=questions() if rows is None else rows,
        eval_dataset=eval_dataset,
        processing_class=tokenizer(),
        reward_funcs=reward,
        peft_config=peft_config,
        rollout=RolloutConfig(**(drawing | (rollout or {}))),
        callbacks=callbacks,
        engine=engine,
    )


def losses(trainer: Any) -> list[float]:
    """The loss of every log line."""
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]


def logged(trainer: Any, name: str) -> list[float]:
    """A metric of every log line that has it."""
    return [line[name] for line in trainer.state.log_history if name in line]


def weights(model: Any) -> torch.Tensor:
    """All parameters as one vector."""
    return torch.cat([p.detach().flatten() for p in model.parameters()])
