"""TempNet trainers in one launch; every process writes down what it has.

    accelerate launch ... tests/launched/tempnet_runs.py FOLDER [--zero]

``FOLDER/model`` is the language model; each run of :data:`RUNS` leaves ``FOLDER/<run>-<rank>.pt``.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig

from llm_xrisk.fcco import leave
from llm_xrisk.models import logprobs
from tests.trainers.build import LORA, losses, pairs
from tests.trainers.test_tempnet_trainer import trainer_of

ROWS = 8  # per optimizer step, on all processes together
STEPS = 4
RUNS: dict[str, dict[str, Any]] = {
    "frozen": {},
    "joint": {"train_model": True, "learning_rate": 0.05},
    "adapter": {"train_model": True, "learning_rate": 0.05},
    "saved": {"save_strategy": "steps", "save_steps": STEPS // 2},
    "resumed": {"save_base": True},
}
CHUNK = 102 * 7  # numbers: several chunks a batch, and not as many on each process


def build(run: str, folder: Path, world: int, **settings: Any) -> Any:
    """The trainer of a run on any number of processes: the same mini-batches on each."""
    torch.manual_seed(0)
    return trainer_of(
        folder / run,
        model=str(folder / "model"),
        eval_dataset=pairs(8),
        peft_config=LoraConfig(**LORA) if run == "adapter" else None,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=ROWS // 2 // world,
        per_device_eval_batch_size=4 // world,
        max_steps=STEPS,
        **RUNS[run] | settings,
    )


def report(run: str, folder: Path, world: int, **settings: Any) -> dict[str, Any]:
    """Train, evaluate, save, and tell what came of it."""
    chunk, logprobs._CHUNK_NUMBERS = logprobs._CHUNK_NUMBERS, CHUNK
    trainer = build(run, folder, world, **settings)
    resume = str(folder / "saved" / f"checkpoint-{STEPS // 2}") if run == "resumed" else None
    trainer.train(resume_from_checkpoint=resume)
    evaluation = trainer.evaluate()
    trainer.save_model()
    logprobs._CHUNK_NUMBERS = chunk
    plugin = getattr(trainer.accelerator.state, "deepspeed_plugin", None)
    model = trainer.model.language_model
    return {
        "rank": trainer.args.process_index,
        "world": trainer.args.world_size,
        "stage": plugin.zero_stage if trainer.is_deepspeed_enabled else None,
        "losses": losses(trainer),
        "log": [line for line in trainer.state.log_history if "loss" in line],
        "eval": evaluation,
        "chunked": trainer.model._chunked,
        "sharded": any(hasattr(parameter, "ds_id") for parameter in model.parameters()),
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--zero", action="store_true")
    options = parser.parse_args()
    # DeepSpeed is silently off where a CPU is asked for; gloo says how the processes meet
    backend = {"use_cpu": False, "ddp_backend": "gloo"} if options.zero else {"use_cpu": True}
    for run in RUNS:
        found = report(run, options.folder, 2, **backend)
        torch.save(found, options.folder / f"{run}-{found['rank']}.pt")
    leave()


if __name__ == "__main__":
    main()
