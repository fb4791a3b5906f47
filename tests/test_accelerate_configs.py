"""Every launch configuration parses; those that need no GPU start the processes they promise."""

import json
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file
from accelerate.utils import DistributedType

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = sorted((ROOT / "accelerate_configs").glob("*.yaml"))
SCRIPT = ROOT / "tests" / "launched" / "tiny_training.py"
KINDS = {
    "single": (DistributedType.NO, 1, None),
    "ddp": (DistributedType.MULTI_GPU, 8, None),
    "fsdp2": (DistributedType.FSDP, 8, None),
    "zero1": (DistributedType.DEEPSPEED, 8, 1),
    "zero2": (DistributedType.DEEPSPEED, 8, 2),
    "zero3": (DistributedType.DEEPSPEED, 8, 3),
    "cpu": (DistributedType.MULTI_GPU, 2, None),
    "zero2_cpu": (DistributedType.DEEPSPEED, 2, 2),
    "zero3_cpu": (DistributedType.DEEPSPEED, 2, 3),
}
ON_CPU = ("--num_processes", "2", "--mixed_precision", "no", "--main_process_port", "0")
GLOO = ("--use_cpu", "true")
ZERO = ("--ddp_backend", "gloo")
# configuration, launch arguments that fit it to a CPU, training arguments, wrapper, ZeRO stage
RUNNABLE = [
    ("cpu", (), GLOO, "DistributedDataParallel", None),
    ("zero1", ON_CPU, ZERO, "DeepSpeedEngine", 1),
    ("zero2_cpu", (), ZERO, "DeepSpeedEngine", 2),
    ("zero3_cpu", (), ZERO, "DeepSpeedEngine", 3),
]


def reports(folder: Path) -> list[dict]:
    return [json.loads(path.read_text()) for path in sorted(folder.glob("rank*.json"))]


def train(launcher, folder: Path, config: str, launch: tuple, training: tuple) -> list[dict]:
    steps = ("--max_steps", "2", "--logging_steps", "1", "--per_device_train_batch_size", "2")
    output = ("--output_dir", str(folder), "--save_strategy", "no", "--report_to", "none")
    launcher(config, SCRIPT, *steps, *output, *training, launch_arguments=launch)
    return reports(folder)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_accelerate_reads_every_configuration(path):
    config = load_config_from_file(str(path))
    assert isinstance(config, ClusterConfig)
    kind, processes, stage = KINDS[path.stem]
    assert config.distributed_type == kind
    assert config.num_processes == processes
    assert config.deepspeed_config.get("zero_stage") == stage
    assert config.use_cpu is False  # true would switch DeepSpeed off without a word


def test_every_configuration_of_the_design_is_there():
    assert {path.stem for path in CONFIGS} == set(KINDS)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_configuration_says_how_it_is_launched(path):
    head = path.read_text().split("compute_environment")[0]
    assert f"accelerate launch --config_file accelerate_configs/{path.name}" in head


@pytest.mark.dist
@pytest.mark.parametrize(("config", "launch", "training", "wrapper", "stage"), RUNNABLE)
def test_two_processes_train_together(
    accelerate_launch, tmp_path, config, launch, training, wrapper, stage
):
    ranks = train(accelerate_launch, tmp_path, config, launch, training)
    assert [report["rank"] for report in ranks] == [0, 1]
    assert [report["world_size"] for report in ranks] == [2, 2]
    assert [report["wrapper"] for report in ranks] == [wrapper, wrapper]
    assert [report["zero_stage"] for report in ranks] == [stage, stage]
    assert ranks[0]["losses"] == ranks[1]["losses"]  # the mean over both, not one's own
    assert len(ranks[0]["losses"]) == 2


@pytest.mark.dist
def test_fsdp2_without_a_gpu_is_plain_data_parallel(accelerate_launch, tmp_path):
    """The day accelerate shards on a CPU, this fails, and fsdp2 belongs in RUNNABLE."""
    ranks = train(accelerate_launch, tmp_path, "fsdp2", ON_CPU, GLOO)
    assert [report["wrapper"] for report in ranks] == ["DistributedDataParallel"] * 2
