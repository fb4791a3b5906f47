"""Time and memory of training steps and of log-probs."""

import gc
import statistics
import tempfile
import time
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from benchmarks.on_device.trainers import Scale, dft_trainer, disco_trainer, pairs, qwen2, settings
from llm_xrisk.models.logprobs import selective_log_softmax, token_log_probs

GIB = 1 << 30


class Clock(TrainerCallback):
    """Times every optimizer step, fetching and scoring included; memory after the warm-up."""

    def __init__(self, device: str, warmup: int) -> None:
        self.device, self.warmup = device, warmup
        self.marks: list[float] = []

    def mark(self) -> None:
        synchronize(self.device)
        self.marks.append(time.perf_counter())
        if len(self.marks) == self.warmup + 1:
            reset_peak(self.device)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.mark()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.mark()

    @property
    def seconds(self) -> list[float]:
        """Of the steps after the warm-up."""
        marks = self.marks[self.warmup :]
        return [after - before for before, after in pairwise(marks)]


class CompletionLikelihood(Trainer):
    """Supervised fine-tuning through the same log-probs: what a step costs without an objective."""

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Any,
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        inputs = dict(inputs)
        mask = inputs.pop("labels") != -100
        keep = int(inputs.pop("keep"))
        tokens = token_log_probs(model, **inputs, completion_mask=mask, keep=keep)
        return -tokens.log_probs.sum() / num_items_in_batch


def sft_trainer(
    model: Any, device: str, output: str, scale: Scale, accumulate: int, *, ours: bool
) -> Trainer:
    """The rows of DFT, each as a prompt with an answer to imitate."""
    rows = [
        row["prompt_ids"] + completion
        for row in pairs(scale)
        for completion in (row["completion_ids"], *row["negative_ids"])
    ]
    extra: dict[str, Any] = {"keep": scale.completion} if ours else {}

    def collate(chosen: list[list[int]]) -> dict[str, Any]:
        ids = torch.tensor(chosen)
        labels = ids.clone()
        labels[:, : scale.prompt] = -100
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels} | extra

    options = settings(device, output, scale, accumulate)
    options |= {"per_device_train_batch_size": scale.rows // accumulate}
    options |= {"gradient_checkpointing": True, "remove_unused_columns": False}
    options |= {"bf16": device != "cpu"}
    build = CompletionLikelihood if ours else Trainer
    arguments = TrainingArguments(**options)
    return build(model=model, args=arguments, train_dataset=rows, data_collator=collate)


def _dft_scored(*arguments: Any) -> Any:
    trainer = dft_trainer(*arguments)
    trainer.mean_over_groups = False  # as if micro-batches split groups: score, then backprop
    return trainer


Build = Callable[..., Any]
# name: (trainer, micro-batches of an optimizer step)
VARIANTS: dict[str, tuple[Build, int]] = {
    "sft transformers": (lambda *a: sft_trainer(*a, ours=False), 1),
    "sft": (lambda *a: sft_trainer(*a, ours=True), 1),
    "sft, 2 micro-batches": (lambda *a: sft_trainer(*a, ours=True), 2),
    "dft": (dft_trainer, 1),
    "dft, 2 micro-batches": (dft_trainer, 2),
    "dft, 2 micro-batches, score pass": (_dft_scored, 2),
    "disco": (disco_trainer, 1),
    "disco, 2 micro-batches, score pass": (disco_trainer, 2),
}


def time_trainers(device: str, scale: Scale) -> dict[str, Any]:
    """Every variant's step: seconds, tokens per second, peak memory; and ratios to SFT's."""
    found = {
        name: time_trainer(build, device, scale, count) for name, (build, count) in VARIANTS.items()
    }
    for name, (_, count) in VARIANTS.items():
        base = "sft" if count == 1 else "sft, 2 micro-batches"
        found[name]["time_vs_sft"] = found[name]["step_s"] / found[base]["step_s"]
    shape = {"rows": scale.rows, "prompt": scale.prompt, "completion": scale.completion}
    return {"ok": all(v["ok"] for v in found.values()), "step": shape, "variants": found}


def time_trainer(build: Build, device: str, scale: Scale, accumulate: int) -> dict[str, Any]:
    """Median seconds of a step; of DisCO's, those that follow a rollout's first update."""
    with tempfile.TemporaryDirectory() as output:
        model = qwen2(scale, device)
        trainer = build(model, device, output, scale, accumulate)
        clock = Clock(device, scale.warmup)
        trainer.add_callback(clock)
        trainer.remove_callback(PrinterCallback)
        result = trainer.train()
    rollout = build is disco_trainer
    later = [s for k, s in enumerate(clock.seconds) if not rollout or k % scale.updates]
    step = statistics.median(later)
    row = {
        "ok": len(clock.seconds) == scale.steps and result.training_loss == result.training_loss,
        "step_s": step,
        "slowest_s": max(later),
        "tokens_per_s": scale.tokens / step,
        "peak_gib": peak(device),
        "parameters": sum(p.numel() for p in model.parameters()),
        "bf16": bool(trainer.args.bf16),
        "gradient_checkpointing": bool(trainer.args.gradient_checkpointing),
    }
    if rollout:  # the first update comes with the rollout's grading and its old log-probs
        row["first_update_s"] = statistics.median(clock.seconds[:: scale.updates])
    del trainer, model
    release(device)
    return row


def time_log_probs(device: str, scale: Scale) -> dict[str, Any]:
    """Forward and backward of log-probs beyond the logits: ours, and a plain log_softmax."""
    ways = {"ours": _ours, "log_softmax": _plain}
    found = {name: measure_log_probs(way, device, scale) for name, way in ways.items()}
    errors = (found["ours"].pop("values") - found["log_softmax"].pop("values")).abs()
    ratio: dict[str, Any] = {"time": found["ours"]["seconds"] / found["log_softmax"]["seconds"]}
    if device == "cuda":
        ratio["memory"] = found["ours"]["extra_gib"] / found["log_softmax"]["extra_gib"]
    error = float(errors.max())
    return {"ok": error <= 1e-4, "largest_difference": error, "ratio": ratio} | found


def measure_log_probs(
    way: Callable[[Tensor, Tensor], Tensor], device: str, scale: Scale
) -> dict[str, Any]:
    """Median seconds of five repetitions after one, and the peak above what the logits take."""
    generator = torch.Generator().manual_seed(0)
    rows, vocab = max(1, scale.rows // 4), scale.model["vocab_size"]
    shape = (rows, scale.completion)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    hidden = torch.randn(*shape, 64, generator=generator).to(device, dtype).requires_grad_()
    head = torch.randn(vocab, 64, generator=generator).to(device, dtype)
    targets = torch.randint(vocab, shape, generator=generator).to(device)
    seconds, extra, values = [], 0, torch.empty(0)
    for _ in range(6):
        logits = hidden @ head.T
        reset_peak(device)
        held = allocated(device)
        synchronize(device)
        start = time.perf_counter()
        values = way(logits, targets)
        values.mean().backward()
        synchronize(device)
        seconds.append(time.perf_counter() - start)
        extra = peak_bytes(device) - held
        values, logits = values.detach().cpu(), None
    size = rows * scale.completion * vocab * torch.finfo(dtype).bits // 8
    found = {"seconds": statistics.median(seconds[1:]), "logits_gib": size / GIB, "values": values}
    release(device)
    return found | {"extra_gib": extra / GIB if device == "cuda" else None}


def _ours(logits: Tensor, targets: Tensor) -> Tensor:
    return selective_log_softmax(logits, targets)[0]


def _plain(logits: Tensor, targets: Tensor) -> Tensor:
    return logits.float().log_softmax(-1).gather(-1, targets.unsqueeze(-1)).squeeze(-1)


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def reset_peak(device: str) -> None:
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()


def allocated(device: str) -> int:
    return torch.cuda.memory_allocated() if device == "cuda" else 0


def peak_bytes(device: str) -> int:
    return torch.cuda.max_memory_allocated() if device == "cuda" else 0


def peak(device: str) -> float | None:
    return peak_bytes(device) / GIB if device == "cuda" else None


def release(device: str) -> None:
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
