"""Two steps of a tiny model; every rank writes down what it believes it ran in."""

import json
from pathlib import Path

import torch
from transformers import HfArgumentParser, Qwen3Config, Qwen3ForCausalLM, Trainer, TrainingArguments

from llm_xrisk.fcco import leave


def main() -> None:
    (args,) = HfArgumentParser(TrainingArguments).parse_args_into_dataclasses()
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=32,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=16,
    )
    rows = [{"input_ids": [i, i + 1], "labels": [i, i + 1]} for i in range(16)]
    trainer = Trainer(model=Qwen3ForCausalLM(config), args=args, train_dataset=rows)
    trainer.train()
    plugin = trainer.accelerator.state.deepspeed_plugin
    report = {
        "rank": trainer.accelerator.process_index,
        "world_size": trainer.accelerator.num_processes,
        "zero_stage": plugin.zero_stage if trainer.is_deepspeed_enabled else None,
        "wrapper": type(trainer.model_wrapped).__name__,
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
    }
    Path(args.output_dir, f"rank{report['rank']}.json").write_text(json.dumps(report))
    leave()


if __name__ == "__main__":
    main()
