"""Gradients of DFT and DisCO steps on the device against the CPU's, in float32.

Each device runs in a process of its own, the CPU's without sight of a GPU.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    PreTrainedModel,
    PrinterCallback,
    Qwen3Config,
    Qwen3ForCausalLM,
    TrainerCallback,
)

from benchmarks.on_device.objectives import relative_error
from benchmarks.on_device.trainers import QWEN_05B, Scale, dft_trainer, disco_trainer, gradient

ROOT = Path(__file__).resolve().parents[2]
BAR = 1e-5
SHAPE = {
    "vocab_size": 102,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "attn_implementation": "eager",
}
# three steps, the second and third of DisCO with a score pass and a policy that has moved
SMALL = Scale(QWEN_05B | SHAPE, prompt=9, completion=7, rows=16, warmup=0, steps=3, updates=3)
PLAIN = {"optim": "sgd", "max_grad_norm": 0.0, "bf16": False}
LEARNING_RATES = {"dft": 1e-2, "disco": 1e-3}


class GradientCallback(TrainerCallback):
    """Keeps the gradient of every optimizer step."""

    def __init__(self) -> None:
        self.found: list[Tensor] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.found.append(gradient(kwargs["model"]))


def check_gradients(device: str) -> dict[str, Any]:
    """Relative error of each step's gradient; micro-batches of half a mini-batch, scored apart."""
    with tempfile.TemporaryDirectory() as folder:
        files = {place: Path(folder) / f"{place}.safetensors" for place in {"cpu", device}}
        for place, file in files.items():
            run_on(place, file)
        want, got = load_file(files["cpu"]), load_file(files[device])
    errors = {name: relative_error(got[name], value) for name, value in want.items()}
    norms = {name: float(value.norm()) for name, value in want.items()}
    ok = all(error <= BAR for error in errors.values()) and all(n > 0 for n in norms.values())
    return {"ok": ok, "worst": max(errors.values()), "bar": BAR, "steps": errors, "norms": norms}


def run_on(place: str, file: Path) -> None:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    if place == "cpu":
        environment["CUDA_VISIBLE_DEVICES"] = ""
    command = [sys.executable, "-m", "benchmarks.on_device.gradients", place, str(file)]
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=180
    )
    if done.returncode != 0:
        raise RuntimeError(f"the steps on {place} failed:\n{(done.stdout + done.stderr)[-3000:]}")


def small_model(dtype: torch.dtype) -> PreTrainedModel:
    """Two layers of Qwen3 whose distributions are far from flat; the same on every device."""
    model = Qwen3ForCausalLM(Qwen3Config(**SMALL.model))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.normal_(0.0, 0.12, generator=generator)
    return model.to(dtype)


def steps(device: str, output: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """The gradients of some steps of both trainers."""
    found: dict[str, Tensor] = {}
    for name, build in (("dft", dft_trainer), ("disco", disco_trainer)):
        options = PLAIN | {"learning_rate": LEARNING_RATES[name]}
        trainer: Any = build(small_model(dtype), device, output, SMALL, 2, **options)
        trainer.mean_over_groups = False  # DFT, too, scores the whole mini-batch first
        kept = GradientCallback()
        trainer.add_callback(kept)
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        found |= {f"{name}.{k}": value for k, value in enumerate(kept.found)}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("device", choices=("cpu", "cuda"))
    parser.add_argument("file", type=Path)
    parser.add_argument("--dtype", default="float32", help="float64 shows how far float32 is off")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as output:
        found = steps(arguments.device, output, getattr(torch, arguments.dtype))
    save_file(found, arguments.file)


if __name__ == "__main__":
    main()
