"""DRRHO trainers in one launch; every process writes down what it has.

    accelerate launch ... tests/launched/drrho_runs.py FOLDER [--zero]

``FOLDER/model`` is the model to start from, ``FOLDER/reference`` another one; each run of
:data:`RUNS` leaves ``FOLDER/<run>-<rank>.pt``.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig

from llm_xrisk.fcco import leave
from tests.launched.both_trainers import Watch, train
from tests.trainers.build import LORA, pairs
from tests.trainers.test_drrho import trainer_of

ROWS = 8  # per optimizer step, on all processes together
RUNS: dict[str, dict[str, Any]] = {
    "by-name": {"objective": "KLDRO"},
    "tokens": {"objective": "CVaRDRO", "level": "token"},
    "initial": {"objective": "KLDRO", "reference_model": None},
    "adapter": {"objective": "KLConstrainedDRO", "loss_reduction": "sum", "reference_model": None},
}


def build(run: str, folder: Path, world: int, **settings: Any) -> Any:
    """The trainer of a run on any number of processes: the same mini-batches on each."""
    torch.manual_seed(0)
    settings = {"reference_model": str(folder / "reference")} | RUNS[run] | settings
    return trainer_of(
        folder / run,
        model=str(folder / "model"),
        eval_dataset=pairs(7),  # unequal shares of the pass for the reference
        peft_config=LoraConfig(**LORA) if run == "adapter" else None,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=ROWS // 2 // world,
        max_steps=4,
        **settings,
    )


def report(run: str, folder: Path, world: int, **settings: Any) -> dict[str, Any]:
    """Train, and tell what came of it."""
    watch = Watch()
    trainer = build(run, folder, world, callbacks=[watch], **settings)
    found = train(trainer, watch)
    tables = {"train": trainer.data_collator.reference, "eval": trainer._eval_reference[""]}
    known = {f"{n}-{k}": v.clone() for n, table in tables.items() for k, v in table.items()}
    state = {k: v.clone() for k, v in trainer.objective.state_dict().items()}
    return found | {"reference": known, "state": state}


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
