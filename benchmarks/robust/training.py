"""One run: the trainer with a method's settings, and what is measured of its model."""

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from transformers import AutoModelForCausalLM, PrinterCallback

from benchmarks.robust.sets import Rows
from llm_xrisk.data.tiny_calculator import char_tokenizer
from llm_xrisk.rollout.scoring import evaluation_mode, left_pad, length_sorted_batches
from llm_xrisk.trainers.drrho import DRRHOTrainer
from llm_xrisk.trainers.drrho_config import DRRHOConfig

EVALUATION_BATCH = 256
TAIL = 0.1  # the share of the test rows whose mean loss is the CVaR
FIXED: dict[str, Any] = {
    "dataloader_pin_memory": False,
    "disable_tqdm": True,
    "gradient_checkpointing": False,
    "logging_steps": 10**9,
    "lr_scheduler_type": "cosine",
    "per_device_eval_batch_size": EVALUATION_BATCH,
    "report_to": [],
    "save_strategy": "no",
    "use_cpu": True,
    "warmup_steps": 2,
    "weight_decay": 0.01,
}


def quiet() -> None:
    """One thread, and no bars of transformers."""
    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()  # pyright: ignore[reportAttributeAccessIssue]
    transformers.utils.logging.disable_progress_bar()  # pyright: ignore[reportAttributeAccessIssue]


def train(
    start: str | Path, rows: Rows, arguments: Mapping[str, Any], *, samples: int, batch: int
) -> Any:
    """The model after ``samples`` rows in mini-batches of ``batch``, a part of one left out."""
    with tempfile.TemporaryDirectory() as folder:
        args = DRRHOConfig(
            output_dir=folder,
            per_device_train_batch_size=batch,
            max_steps=max(1, samples // batch),
            **{**FIXED, **arguments},
        )
        trainer = DRRHOTrainer(
            AutoModelForCausalLM.from_pretrained(start),
            args,
            train_dataset=rows,
            processing_class=char_tokenizer(),
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        return trainer.model


@torch.no_grad()
def measure(model: Any, rows: Rows) -> np.ndarray:
    """Of each row, (2, n): negative log-likelihood of the completion, and whether greedy gives it.

    Greedy decoding gives the completion exactly if each of its tokens, the end included, is the
    likeliest one after those before it.
    """
    found = np.zeros((2, len(rows)), dtype=np.float32)
    whole = [[*row["prompt_ids"], *row["completion_ids"]] for row in rows]
    with evaluation_mode(model):
        for batch in length_sorted_batches([len(row) for row in whole], EVALUATION_BATCH):
            lengths = [len(rows[k]["completion_ids"]) for k in batch]
            padded = left_pad([whole[k] for k in batch], pad_id=0, device=torch.device("cpu"))
            width = max(lengths)
            logits = model(**vars(padded), logits_to_keep=width + 1).logits[:, :-1]
            targets = padded.input_ids[:, -width:]
            log_probs = logits.log_softmax(-1).gather(-1, targets.unsqueeze(-1)).squeeze(-1)
            right = logits.argmax(-1) == targets
            for place, (k, length) in enumerate(zip(batch, lengths, strict=True)):
                found[0, k] = -log_probs[place, -length:].sum().item()
                found[1, k] = right[place, -length:].all().item()
    return found


def metrics(found: np.ndarray, rows: Rows) -> dict[str, np.ndarray]:
    """Values (n,) of each test row whose means are the metrics.

    ``pass@1`` is the probability of the exact answer, what sampling at temperature 1 has on
    average; ``nll`` the mean over a completion's tokens; ``cvar`` the mean of the worst rows' nll
    as the mean over all rows of nu + [nll - nu]_+ / share, with nu their smallest.
    """
    lengths = np.array([len(row["completion_ids"]) for row in rows])
    total, greedy = found.reshape(2, -1).astype(np.float64)
    nll = total / lengths
    worst = max(1, round(TAIL * len(nll)))
    nu = np.sort(nll)[-worst]
    tail = nu + np.maximum(nll - nu, 0.0) * len(nll) / worst
    return {"pass@1": np.exp(-total), "greedy": greedy, "nll": nll, "cvar": tail}
