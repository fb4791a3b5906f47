"""A TempNet trained by the package's trainer, on a frozen model."""

import time
from pathlib import Path
from typing import Any

from transformers import PrinterCallback

from benchmarks.temperature.data import Part, Sizes
from benchmarks.temperature.samplers import BOUNDS, Sampler
from llm_xrisk.data.tiny_calculator import char_tokenizer
from llm_xrisk.trainers.tempnet import TempNetTrainer
from llm_xrisk.trainers.tempnet_config import TempNetTrainingConfig

# constant, as the authors' for GPT-2: a TempNet starts with a long plateau
SCHEDULE = "constant"


def train_tempnet(
    model: Any, train: Part, sampler: Sampler, seed: int, folder: Path, sizes: Sizes
) -> dict[str, Any]:
    """Train, save into a folder, and say how long it took."""
    chunks = not train.texts[0]
    rows = [
        {"prompt_ids": prompt, "completion_ids": completion}
        for prompt, completion in zip(train.prompts, train.completions, strict=True)
    ]
    settings = TempNetTrainingConfig(
        output_dir=str(folder),
        entropy=sampler.value,
        tempnet_learning_rate=sampler.rate or 0.0,
        per_device_train_batch_size=sizes.net_chunks if chunks else sizes.net_rows,
        max_steps=sizes.net_steps,
        lr_scheduler_type=SCHEDULE,
        weight_decay=0.0,
        save_strategy="no",
        save_base=False,
        report_to="none",
        disable_tqdm=True,
        logging_strategy="no",
        use_cpu=True,
        bf16=False,
        seed=seed,
        data_seed=seed,
        **BOUNDS,
    )
    tokenizer = char_tokenizer()
    trainer = TempNetTrainer(model, settings, train_dataset=rows, processing_class=tokenizer)
    trainer.remove_callback(PrinterCallback)
    start = time.process_time()
    trainer.train()
    seconds = time.process_time() - start
    trainer.net.save_pretrained(folder)
    return {"training_seconds": seconds}
