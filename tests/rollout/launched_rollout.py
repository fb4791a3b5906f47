"""One training step on every rank, then rollouts from the wrapped model, compared on each rank."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from transformers import (
    HfArgumentParser,
    Qwen3Config,
    Qwen3ForCausalLM,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from llm_xrisk.fcco import leave
from llm_xrisk.rollout import SamplingConfig, TransformersEngine, make_engine
from llm_xrisk.rollout.scoring import sequence_log_probs
from llm_xrisk.rollout.weight_sync import iter_named_parameters, largest_difference, make_probe

CONFIG = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "tie_word_embeddings": True,
    "eos_token_id": 1,
    "pad_token_id": 0,
}


def build_model(lora: bool) -> torch.nn.Module:
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(Qwen3Config(**CONFIG))
    if not lora:
        return model
    adapter = LoraConfig(target_modules="all-linear", r=4, init_lora_weights=False)
    return get_peft_model(model, adapter)


def full_copy(model: torch.nn.Module) -> torch.nn.Module:
    """A plain model with the weights that were streamed out of the wrapped one."""
    copy = Qwen3ForCausalLM(Qwen3Config(**CONFIG)).eval()
    copy.load_state_dict(dict(iter_named_parameters(model)), strict=False)
    copy.tie_weights()
    return copy


def transformers_report(model: torch.nn.Module, copy: torch.nn.Module, rank: int) -> dict:
    """Ranks have unequal numbers of batches and stop at unequal lengths."""
    prompts = [[5 + i, 6] for i in range(5 if rank == 0 else 1)]
    arguments = {"sample_ids": list(range(len(prompts))), "num_generations": 2}
    sampling = SamplingConfig(max_new_tokens=4 + 8 * rank)
    engine = TransformersEngine(model, eos_token_ids=[1], batch_size=4, synced_gpus=True)
    batch = engine.generate(prompts, sampling, **arguments)
    expected = TransformersEngine(copy, eos_token_ids=[1]).generate(prompts, sampling, **arguments)
    return {
        "equal": batch.completion_ids == expected.completion_ids,
        "difference": largest_difference(batch.log_probs, expected.log_probs),
    }


def vllm_report(model: torch.nn.Module, copy: torch.nn.Module, rank: int) -> dict:
    engine = make_engine("vllm", model, max_model_len=48)
    engine.sync(model, version=3)
    probe = make_probe(96, length=24)
    expected = sequence_log_probs(copy, probe.prompts, probe.completions)
    served = engine.log_probs(probe.prompts, probe.completions)
    engine.generate([[5 + rank, 6]], SamplingConfig(max_new_tokens=4), sample_ids=[rank])
    engine.close()
    return {
        "equal": engine.policy_version == 3 and dist.is_initialized(),
        "difference": largest_difference(served, expected),
    }


class Measure(TrainerCallback):
    """Rollouts between the first and the second training step."""

    def __init__(self, trainer: Trainer, measure: Callable) -> None:
        self.trainer = trainer
        self.measure = measure
        self.report: dict = {}

    def on_step_end(self, args, state, control, **kwargs) -> None:
        if state.global_step == 1:
            model, rank = self.trainer.model_wrapped, dist.get_rank()
            self.report = self.measure(model, full_copy(model), rank)
            self.report["wrapper"] = type(model).__name__


def main() -> None:
    engine_name, lora = sys.argv[1], sys.argv[2] == "lora"
    (args,) = HfArgumentParser(TrainingArguments).parse_args_into_dataclasses(sys.argv[3:])
    rows = [{"input_ids": [i, i + 1, 7], "labels": [i, i + 1, 7]} for i in range(16)]
    trainer = Trainer(model=build_model(lora), args=args, train_dataset=rows)
    measure = Measure(trainer, vllm_report if engine_name == "vllm" else transformers_report)
    trainer.add_callback(measure)
    trainer.train()
    measure.report |= {"world_size": dist.get_world_size(), "steps": trainer.state.global_step}
    report = Path(args.output_dir, f"rank{dist.get_rank()}.json")
    report.write_text(json.dumps(measure.report))
    leave()


if __name__ == "__main__":
    main()
