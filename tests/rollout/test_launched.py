"""Rollouts from models that several processes hold together."""

import json
from importlib.util import find_spec
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("launched_rollout.py")
ARGUMENTS = ("--max_steps", "2", "--per_device_train_batch_size", "2", "--learning_rate", "0.01")
QUIET = ("--save_strategy", "no", "--report_to", "none", "--disable_tqdm", "true")
GLOO = ("--use_cpu", "true")
ZERO = ("--ddp_backend", "gloo")


def reports(launch, folder: Path, config: str, engine: str, adapter: str, training: tuple) -> list:
    output = ("--output_dir", str(folder))
    launch(config, SCRIPT, engine, adapter, *ARGUMENTS, *QUIET, *output, *training)
    return [json.loads(path.read_text()) for path in sorted(folder.glob("rank*.json"))]


@pytest.mark.dist
@pytest.mark.skipif(find_spec("deepspeed") is None, reason="DeepSpeed is not installed")
@pytest.mark.parametrize("adapter", ["full", "lora"])
def test_zero3_ranks_with_unequal_work_draw_what_one_process_draws(
    accelerate_launch, tmp_path, adapter
):
    ranks = reports(accelerate_launch, tmp_path, "zero3_cpu", "transformers", adapter, ZERO)
    assert [(rank["world_size"], rank["steps"]) for rank in ranks] == [(2, 2), (2, 2)]
    assert all(rank["equal"] and rank["difference"] < 1e-4 for rank in ranks)
    assert ranks[0]["wrapper"] == "DeepSpeedEngine"


@pytest.mark.vllm
@pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed")
@pytest.mark.parametrize(
    ("config", "adapter", "training", "wrapper"),
    [
        ("cpu", "full", GLOO, "DistributedDataParallel"),
        ("zero3_cpu", "lora", ZERO, "DeepSpeedEngine"),
    ],
)
def test_every_rank_syncs_its_own_vllm_engine(
    accelerate_launch, tmp_path, config, adapter, training, wrapper
):
    ranks = reports(accelerate_launch, tmp_path, config, "vllm", adapter, training)
    assert [(rank["world_size"], rank["steps"]) for rank in ranks] == [(2, 2), (2, 2)]
    assert all(rank["equal"] and rank["difference"] < 1e-4 for rank in ranks)
    assert ranks[0]["wrapper"] == wrapper
