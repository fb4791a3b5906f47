"""Runs that kill themselves: each in a process of its own, forked after the imports.

    python tests/launched/killed_runs.py FOLDER

writes ``FOLDER/<run>`` for each run of :data:`RUNS` up to where a SIGKILL ends it.
"""

import gc
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from transformers import TrainerCallback

from tests.trainers.build import LORA, dft_trainer, disco_trainer, pairs

SAVING = {"save_strategy": "steps", "save_steps": 3, "max_steps": 8}
ADAM = {"optim": "adamw_torch", "lr_scheduler_type": "cosine", "learning_rate": 3e-3}
RUNS = ("dft", "disco", "lora", "torn")
KILL_AT = 5  # between the checkpoints of steps 3 and 6


def build(run: str, folder: Path, callbacks: Any = None) -> Any:
    """The trainer of a run; the same one trains without interruption and resumes."""
    torch.manual_seed(0)
    settings: dict[str, Any] = SAVING | ADAM | {"callbacks": callbacks}
    if run == "disco":
        # three steps are one and a half rollouts: some answers wait in the checkpoint
        return disco_trainer(folder, **settings)
    # an epoch is five steps: checkpoints lie inside the first and inside the second
    settings |= {"rows": pairs(40), "gamma": 0.5, "gamma_decay_epochs": 2.0}
    peft_config = LoraConfig(**LORA) if run == "lora" else None
    return dft_trainer(folder, peft_config=peft_config, **settings)


class KillAtStep(TrainerCallback):
    """SIGKILL: no handler, no finally, no flush."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == KILL_AT:
            os.kill(os.getpid(), signal.SIGKILL)


def kill_inside_a_checkpoint(trainer: Any) -> None:
    """End the process while checkpoint-6 is being written."""
    save = trainer._save_scaler

    def killed(folder: str) -> None:
        if trainer.state.global_step == 6:
            os.kill(os.getpid(), signal.SIGKILL)
        save(folder)

    trainer._save_scaler = killed


def main() -> None:
    folder = Path(sys.argv[1])
    gc.freeze()
    for run in RUNS:
        child = os.fork()
        if child == 0:
            torch.set_num_threads(1)
            if run == "torn":
                trainer = build(run, folder / run)
                kill_inside_a_checkpoint(trainer)
            else:
                trainer = build(run, folder / run, callbacks=[KillAtStep()])
            trainer.train()
            os._exit(0)
        _, status = os.waitpid(child, 0)
        if os.waitstatus_to_exitcode(status) != -signal.SIGKILL:
            raise SystemExit(f"{run} ended with status {status} instead of being killed")


if __name__ == "__main__":
    main()
