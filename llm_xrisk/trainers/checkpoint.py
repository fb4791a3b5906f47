"""Checkpoints: the objective's state beside the optimizer's, whole or not at all."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

OBJECTIVE_NAME = "objective.safetensors"
_STATE_NAME = "trainer_state.json"  # written last by transformers: its presence means complete


def save_objective(objective: nn.Module, directory: str) -> None:
    """Write the objective's state into a checkpoint directory, atomically."""
    state = {name: value.contiguous() for name, value in objective.state_dict().items()}
    save_tensors(state, Path(directory) / OBJECTIVE_NAME, {"objective": type(objective).__name__})


def load_objective(objective: nn.Module, directory: str) -> None:
    """Restore what :func:`save_objective` wrote.

    Raises:
        FileNotFoundError: the checkpoint holds no state of the objective.
        ValueError: it holds another objective's, or one of another ``num_samples``.
    """
    path = Path(directory) / OBJECTIVE_NAME
    if not path.is_file():
        raise FileNotFoundError(
            f"{directory} has no {OBJECTIVE_NAME}, so the tracked values would start anew; resume "
            "from a checkpoint of this trainer saved without save_only_model, or start a new run "
            "with the checkpoint as the model"
        )
    with safe_open(path, framework="pt") as file:
        saved = (file.metadata() or {}).get("objective")
    if saved != type(objective).__name__:
        raise ValueError(
            f"{path} holds the state of {saved}, this run trains {type(objective).__name__}; "
            "resume with the settings the run started with"
        )
    objective.load_state_dict(load_file(path))


def save_tensors(
    tensors: Mapping[str, Tensor], path: Path, metadata: dict[str, str] | None = None
) -> None:
    """Write a safetensors file so that it is there in full or not at all."""
    partial = path.with_suffix(".partial")
    save_file(dict(tensors), partial, metadata=metadata)
    os.replace(partial, path)


def invalidate(directory: str) -> None:
    """Take the mark of completeness from a checkpoint that is about to be written again."""
    (Path(directory) / _STATE_NAME).unlink(missing_ok=True)


def last_complete_checkpoint(output_dir: str | None) -> str:
    """The newest ``checkpoint-N`` that was written to its end.

    Raises:
        ValueError: there is none.
    """
    found: list[tuple[int, Any]] = []
    for path in Path(output_dir or ".").glob("checkpoint-*"):
        number = path.name.removeprefix("checkpoint-")
        if number.isdigit() and _is_complete(path):
            found.append((int(number), path))
    if not found:
        raise ValueError(
            f"no complete checkpoint in {output_dir}; leave resume_from_checkpoint out to start "
            "a new run"
        )
    return str(max(found)[1])


def _is_complete(path: Path) -> bool:
    try:
        json.loads((path / _STATE_NAME).read_text())
    except (OSError, ValueError):
        return False
    return True
