"""Trainers of each kind in one launch; every process writes down where it is and what it has.

    accelerate launch ... tests/launched/both_trainers.py FOLDER [--zero] [--runs dft disco ...]

``FOLDER/model`` is the model to start from; each run leaves ``FOLDER/<run>-<rank>.pt``.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from transformers import TrainerCallback

from llm_xrisk.fcco import leave
from tests.trainers.build import LORA, dft_trainer, disco_trainer, losses, pairs
from tests.trainers.rows_of import classification_trainer, contrastive_trainer

PROMPTS, ROWS = 8, 16  # per optimizer step, on all processes together
ROW_TRAINERS: dict[str, Any] = {
    "classification": classification_trainer,
    "contrastive": contrastive_trainer,
}


def build(run: str, folder: Path, world: int, **settings: Any) -> Any:
    """The trainer of a run on any number of processes: the same mini-batches on each."""
    model = str(folder / "model")
    settings = {"max_steps": 4} | settings
    if run in ROW_TRAINERS:
        return ROW_TRAINERS[run](
            folder / run,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=PROMPTS // 2 // world,
            **settings,
        )
    if run.startswith("disco"):
        # two rows to a micro-batch tear the four answers to a question apart
        return disco_trainer(
            folder / run,
            model=model,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=ROWS // 2 // world,
            learning_rate=settings.pop("learning_rate", 3e-3),
            tau=0.3,
            rollout={"refill_tokens": 2000} if run == "disco-refill" else {},
            **settings,
        )
    peft_config = LoraConfig(**LORA) if "lora" in run else None
    rows = [row | {"negatives": row["negatives"][: k % 3]} for k, row in enumerate(pairs())]
    torch.manual_seed(0)
    return dft_trainer(
        folder / run,
        model=model,
        rows=rows,  # none, one or two negatives: the processes have unequal numbers of rows
        peft_config=peft_config,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=PROMPTS // 2 // world,
        gamma=0.5,
        **settings,
    )


class Watch(TrainerCallback):
    """Keeps what is gone after training: the state at the start, the first gradient."""

    def __init__(self) -> None:
        self.seen: dict[str, Any] = {}
        self.trainer: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        inner = getattr(self.trainer.objective, "inner", None)
        self.seen["u at start"] = None if inner is None else inner.u.clone()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        gradients = [p.grad for p in kwargs["model"].parameters() if p.grad is not None]
        if "gradient" not in self.seen and gradients:
            self.seen["gradient"] = torch.cat([g.flatten() for g in gradients]).clone()


def train(trainer: Any, watch: Watch, resume: str | None = None) -> dict[str, Any]:
    """Train and tell."""
    watch.trainer = trainer
    trainer.train(resume_from_checkpoint=resume)
    state = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    plugin = trainer.accelerator.state.deepspeed_plugin
    first = next(iter(trainer.model.parameters()))
    inner = getattr(trainer.objective, "inner", None)
    return watch.seen | {
        "rank": trainer.args.process_index,
        "world": trainer.args.world_size,
        "deepspeed": trainer.is_deepspeed_enabled,
        "stage": plugin.zero_stage if trainer.is_deepspeed_enabled else None,
        "wrapper": type(trainer.model_wrapped).__name__,
        "held": first.numel(),  # what this process holds of the first parameter between steps
        "partition": first.ds_tensor.numel() if hasattr(first, "ds_tensor") else None,
        "losses": losses(trainer),
        "log": trainer.state.log_history,
        "u": None if inner is None else inner.u.clone(),
        "weights": {name: value.float().cpu().clone() for name, value in (state or {}).items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--zero", action="store_true")
    parser.add_argument("--runs", nargs="+", default=["dft", "disco"])
    options = parser.parse_args()
    # DeepSpeed is silently off where a CPU is asked for; gloo says how the processes meet
    backend = {"use_cpu": False, "ddp_backend": "gloo"} if options.zero else {"use_cpu": True}
    for run in options.runs:
        settings: dict[str, Any] = dict(backend)
        resume = None
        if run.endswith("saved"):
            settings |= {"save_strategy": "steps", "save_steps": 2}
        if run.endswith("resumed"):  # from a run that was saved by as many processes
            resume = str(options.folder / run.replace("resumed", "saved") / "checkpoint-2")
        if run.endswith("continued"):  # from a run of one process
            settings["max_steps"] = 6
            resume = str(options.folder / "alone" / "checkpoint-4")
        watch = Watch()
        trainer = build(run, options.folder, 2, callbacks=[watch], **settings)
        if run.endswith(("resumed", "continued")):
            cache = "ref_log_likelihood.safetensors"
            source = Path(resume or "").parent / cache
            Path(trainer.args.output_dir, cache).parent.mkdir(parents=True, exist_ok=True)
            Path(trainer.args.output_dir, cache).write_bytes(source.read_bytes())
        report = train(trainer, watch, resume)
        torch.save(report, options.folder / f"{run}-{report['rank']}.pt")
        trainer.accelerator.wait_for_everyone()
    leave()


if __name__ == "__main__":
    main()
