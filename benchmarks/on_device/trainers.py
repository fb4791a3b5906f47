"""Trainers, models and rows that need no network: random weights, random completions."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedModel, Qwen2Config, Qwen2ForCausalLM

from llm_xrisk.data.gsm8k_steps import tiny_model_path
from llm_xrisk.rollout.engine import Completion as Row
from llm_xrisk.rollout.engine import (
    Progress,
    RolloutBatch,
    RolloutEngine,
    SamplingConfig,
    assemble,
    expand_requests,
)
from llm_xrisk.trainers import DFTConfig, DFTTrainer, DisCOConfig, DisCOTrainer, RolloutConfig

SEED = 0


@dataclass(frozen=True)
class Scale:
    """Sizes of a run: all rows are equally long, so any ``rows`` of them cost the same.

    Attributes:
        model: Settings of the model's configuration.
        prompt: Tokens of each prompt.
        completion: Tokens of each completion.
        rows: Rows of an optimizer step.
        warmup: Steps left out; a multiple of ``updates``.
        steps: Steps measured.
        updates: DisCO's optimizer steps per rollout.
        negatives: DFT's negatives per prompt.
        generations: DisCO's answers per question.
    """

    model: dict[str, Any]
    prompt: int
    completion: int
    rows: int
    warmup: int
    steps: int
    updates: int = 4
    negatives: int = 3
    generations: int = 8

    @property
    def tokens(self) -> int:
        """Tokens of an optimizer step."""
        return self.rows * (self.prompt + self.completion)


# the shape of Qwen2.5-0.5B: 494 M parameters
QWEN_05B = {
    "vocab_size": 151936,
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32768,
    "tie_word_embeddings": True,
    "bos_token_id": None,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
TINY = {"vocab_size": 512, "hidden_size": 56, "intermediate_size": 64, "num_hidden_layers": 2}
FULL = Scale(QWEN_05B, prompt=256, completion=256, rows=32, warmup=4, steps=12)
TOY = Scale(QWEN_05B | TINY, prompt=12, completion=8, rows=8, warmup=2, steps=4, updates=2)
TOY = replace(TOY, generations=4)


class PremadeEngine(RolloutEngine):
    """Answers every prompt with random tokens, so that a measured step holds no generation.

    Args:
        vocab_size: Number of token ids.
        length: Tokens of each completion.
    """

    def __init__(self, vocab_size: int, length: int) -> None:
        self.vocab_size, self.length = vocab_size, length

    def generate(
        self,
        prompts: list[list[int]],
        sampling: SamplingConfig,
        *,
        sample_ids: list[int],
        num_generations: int = 1,
        on_progress: Progress | None = None,
    ) -> RolloutBatch:
        """Random completions of equal length, by the rows' seeds."""
        requests = expand_requests(
            prompts,
            sampling,
            sample_ids=sample_ids,
            num_generations=num_generations,
            policy_version=self.policy_version,
        )
        rows = [
            Row(random_ids(r.seed, self.length, self.vocab_size), [0.0] * self.length, "length")
            for r in requests
        ]
        return assemble(requests, rows, self.policy_version)

    def log_probs(
        self, prompts: list[list[int]], completions: list[list[int]], *, temperature: float = 1.0
    ) -> list[list[float]]:
        """Those of a uniform policy."""
        uniform = -float(torch.tensor(self.vocab_size).log())
        return [[uniform] * len(completion) for completion in completions]

    def sync(self, model: nn.Module, *, version: int) -> None:
        """Take the version; there are no weights to bring."""
        self.policy_version = version

    def close(self) -> None:
        """There is nothing to give back."""


def random_ids(seed: int, length: int, vocab_size: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(2, vocab_size, (length,), generator=generator).tolist()


def qwen2(scale: Scale, device: str) -> PreTrainedModel:
    """A model of random weights, made where it is used."""
    torch.manual_seed(SEED)
    with torch.device(device):
        return Qwen2ForCausalLM(Qwen2Config(**scale.model))


def pairs(scale: Scale) -> list[dict[str, Any]]:
    """DFT rows for four steps: prompts with a gold answer and negatives, all of random tokens."""
    vocab, columns = scale.model["vocab_size"], 1 + scale.negatives
    likelihood = -scale.completion * float(torch.tensor(vocab).log())

    def row(index: int) -> dict[str, Any]:
        ids = [random_ids(index * 64 + j, scale.completion, vocab) for j in range(columns)]
        return {
            "index": index,
            "prompt_ids": random_ids(index * 64 + 63, scale.prompt, vocab),
            "completion_ids": ids[0],
            "negative_ids": ids[1:],
            "ref_log_likelihoods": [likelihood] * scale.negatives,
        }

    return [row(index) for index in range(4 * scale.rows // columns)]


def questions(scale: Scale) -> list[dict[str, Any]]:
    """Prompts of ``scale.prompt`` characters, which the shipped tokenizer gives a token each."""
    return [
        {"index": k, "prompt": f"{k:0{scale.prompt - 1}d}="}
        for k in range(scale.rows // scale.generations * scale.updates * 4)
    ]


def every_other(completion_ids: list[list[int]], **columns: Any) -> list[float]:
    """A verdict that makes every question mixed: half of its answers are right."""
    return [float(row % 2 == 0) for row in range(len(completion_ids))]


def settings(device: str, output: str, scale: Scale, accumulate: int, **changes: Any) -> Any:
    """Training arguments that all measured trainers share."""
    common: dict[str, Any] = {
        "output_dir": output,
        "use_cpu": device == "cpu",
        "seed": SEED,
        "report_to": [],
        "disable_tqdm": True,
        "save_strategy": "no",
        "logging_steps": 10**6,
        "dataloader_pin_memory": device != "cpu",
        "lr_scheduler_type": "constant",
        "learning_rate": 1e-6,
        "gradient_accumulation_steps": accumulate,
        "max_steps": scale.warmup + scale.steps,
    }
    return common | changes


def dft_trainer(
    model: PreTrainedModel, device: str, output: str, scale: Scale, accumulate: int, **changes: Any
) -> DFTTrainer:
    """A batch size counts prompts; each brings a gold row and its negatives."""
    prompts = scale.rows // (1 + scale.negatives) // accumulate
    batch = {"per_device_train_batch_size": prompts, "num_negatives": scale.negatives}
    arguments = settings(device, output, scale, accumulate, **batch, **changes)
    return DFTTrainer(
        model,
        DFTConfig(**arguments),
        train_dataset=pairs(scale),
        processing_class=shipped_tokenizer(),
    )


def disco_trainer(
    model: PreTrainedModel, device: str, output: str, scale: Scale, accumulate: int, **changes: Any
) -> DisCOTrainer:
    """A batch size counts completions; a step takes whole questions."""
    batch = {"per_device_train_batch_size": scale.rows // accumulate}
    arguments = settings(device, output, scale, accumulate, **batch, **changes)
    rollout = RolloutConfig(
        max_new_tokens=scale.completion,
        temperature=1.0,
        num_generations=scale.generations,
        updates_per_rollout=scale.updates,
    )
    return DisCOTrainer(
        model,
        DisCOConfig(**arguments),
        train_dataset=questions(scale),
        processing_class=shipped_tokenizer(),
        reward_funcs=every_other,
        rollout=rollout,
        engine=PremadeEngine(scale.model["vocab_size"], scale.completion),
    )


def shipped_tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(tiny_model_path())


def gradient(model: nn.Module) -> Tensor:
    """All gradients as one vector on the CPU."""
    return torch.cat(
        [p.grad.detach().flatten().cpu() for p in model.parameters() if p.grad is not None]
    )
