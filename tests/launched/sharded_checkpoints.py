"""DFT under ZeRO-3 whose checkpoints keep their shards: ``FOLDER/full`` and ``FOLDER/lora``.

    accelerate launch ... --zero3_save_16bit_model false THIS FOLDER

``FOLDER/model`` is the model to start from; ``FOLDER/<run>.pt`` gets the weights as they were.
"""

import sys
from pathlib import Path

import torch
from peft import LoraConfig

from llm_xrisk.fcco import leave
from llm_xrisk.rollout.weight_sync import iter_named_parameters
from tests.trainers.build import LORA, dft_trainer

WIDE = LORA | {"r": 16}  # DeepSpeed leaves smaller matrices whole


def main(folder: Path) -> None:
    for run in ("full", "lora"):
        trainer = dft_trainer(
            folder / run,
            model=str(folder / "model"),
            peft_config=LoraConfig(**WIDE, task_type="CAUSAL_LM") if run == "lora" else None,
            per_device_train_batch_size=2,
            max_steps=1,
            save_strategy="steps",
            save_steps=1,
            use_cpu=False,
            ddp_backend="gloo",
        )
        if not trainer.is_deepspeed_enabled:
            raise RuntimeError("this is about DeepSpeed")
        trainer.train()
        weights = dict(iter_named_parameters(trainer.model_wrapped))  # adapters merged
        if trainer.accelerator.is_main_process:
            torch.save(weights, folder / f"{run}.pt")
    leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
