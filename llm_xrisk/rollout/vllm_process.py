"""Starting vLLM inside a process that also trains, and leaving that process as it was."""

import os
import random
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from llm_xrisk.rollout.weight_sync import base_model

# Set only where the user has not: one GiB of cache, no pinning of threads the trainer needs too.
_CPU_ENVIRONMENT = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
_LAUNCHER_VARIABLES = (
    *("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"),
    *("LD_PRELOAD", "LD_LIBRARY_PATH"),
)


def start_vllm(model: Any, empty: bool, settings: dict[str, Any]) -> Any:
    """A ``vllm.LLM``: of a checkpoint, or with the config of a live model and no weights yet.

    Args:
        model: A transformers model, or anything with a ``path``.
        empty: Whether ``model`` is a live model, whose weights are still to come.
        settings: Arguments of ``vllm.LLM``.

    Raises:
        ImportError: vLLM is not installed.
        RuntimeError: several processes were launched and none has joined a group yet.
    """
    share_the_cpu()
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # keeps the model within reach of sync()
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if launched > 1 and not dist.is_initialized():
        raise RuntimeError(
            f"{launched} processes were launched, but torch.distributed is not initialised, and "
            "vLLM would open a group of its own; build the trainer (or an accelerate.Accelerator) "
            "before the vllm rollout engine"
        )
    if launched > 1:
        settings["distributed_executor_backend"] = "external_launcher"
    with process_state_kept(), tempfile.TemporaryDirectory() as folder:
        LLM = _vllm_class()
        if not empty:
            return LLM(model=model.path, **settings)
        config = model.config.__class__.from_dict(model.config.to_dict())
        config.architectures = config.architectures or [_architecture(model)]
        config.save_pretrained(folder)
        return LLM(model=folder, load_format="dummy", **settings)


def share_the_cpu() -> None:
    """Keep vLLM's CPU back end small, beside a model that trains; settings of the user stay."""
    if not torch.cuda.is_available():
        for name, value in _CPU_ENVIRONMENT.items():
            os.environ.setdefault(name, value)


def _architecture(model: Any) -> str:
    inner = base_model(model)
    return type(inner).__name__.removeprefix("FSDP")  # fully_shard makes a subclass of that name


def _vllm_class() -> Any:
    try:
        from vllm import LLM
    except ImportError as error:
        extra = "gpu" if torch.cuda.is_available() else "cpu"
        raise ImportError(
            f"the vllm rollout engine needs vLLM, which cannot be imported ({error}); "
            f'install it with: pip install "llm-xrisk[{extra}]", or use the transformers engine'
        ) from error
    return LLM


@contextmanager
def process_state_kept() -> Iterator[None]:
    """Undo what vLLM does to the process it runs in: seeds, thread setting, launcher variables."""
    environment = {name: os.environ.get(name) for name in _LAUNCHER_VARIABLES}
    python_state, numpy_state = random.getstate(), np.random.get_state()
    set_num_threads = torch.set_num_threads
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)
        torch.set_num_threads = set_num_threads
        for name, value in environment.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@contextmanager
def process_groups_kept() -> Iterator[None]:
    """Let a vLLM engine shut down without destroying the groups it shares.

    Its shutdown supposes a process of its own and destroys every group there is, those of other
    engines and the trainer's among them.
    """
    from vllm.v1.engine import core

    destroy = getattr(core, "cleanup_dist_env_and_memory", None)
    if destroy is None:
        yield
        return
    core.cleanup_dist_env_and_memory = lambda *_, **__: None
    try:
        yield
    finally:
        core.cleanup_dist_env_and_memory = destroy


def leave_process_groups(*, also_world: bool) -> None:
    """Close vLLM's process groups, and the world's if vLLM opened it."""
    from vllm.distributed import parallel_state

    parallel_state.destroy_model_parallel()
    if also_world:
        parallel_state.destroy_distributed_environment()
