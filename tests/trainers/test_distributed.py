"""Two processes for real: gloo, ZeRO-1, ZeRO-2 and ZeRO-3 give what one process gives.

One launch per configuration trains everything; the tests look at what it left behind.
"""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.conftest import ROOT, run
from tests.launched.both_trainers import Watch, build, train
from tests.trainers.build import tiny_model

pytestmark = [pytest.mark.dist, pytest.mark.timeout(300)]

SCRIPT = ROOT / "tests" / "launched" / "both_trainers.py"
RELATIVE = 1e-5
ON_CPU = ["--num_processes", "2", "--mixed_precision", "no", "--main_process_port", "0"]
ROWS = ["classification", "contrastive"]
# configuration: (ZeRO stage, launch arguments that fit it to a CPU, runs)
CONFIGS: dict[str, tuple[int | None, list[str], list[str]]] = {
    "cpu": (None, [], ["dft", "disco", "dft-lora", "dft-continued", "disco-refill", *ROWS]),
    "zero1": (1, ON_CPU, ["dft"]),
    "zero2_cpu": (2, [], ["dft", "disco", *ROWS]),
    "zero3_cpu": (3, [], ["dft", "disco", "dft-lora", "dft-saved", "dft-resumed", *ROWS]),
}
CASES = [
    (c, r) for c, (_, _, runs) in CONFIGS.items() for r in runs if r in ("dft", "disco", *ROWS)
]
ZERO = [name for name, (stage, _, _) in CONFIGS.items() if stage]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("distributed")
    tiny_model().save_pretrained(path / "model")
    return path


@pytest.fixture(scope="module")
def alone(folder: Path) -> Any:
    """What one process makes of a run."""
    known: dict[str, dict[str, Any]] = {}

    def find(name: str, **settings: Any) -> dict[str, Any]:
        if name not in known:
            watch = Watch()
            settings = {"use_cpu": True, "callbacks": [watch]} | settings
            trainer = build(name, folder, 1, **settings)
            start = {name: value.clone() for name, value in trainer.model.state_dict().items()}
            known[name] = train(trainer, watch) | {"start": {"weights": start}}
        return known[name]

    return find


@pytest.fixture(scope="module")
def launched(folder: Path, alone: Any) -> Any:
    """What two processes make of it, by configuration."""
    known: dict[str, Path] = {}

    def find(config: str, name: str) -> list[dict[str, Any]]:
        if config not in known:
            stage, arguments, runs = CONFIGS[config]
            if "dft-continued" in runs:  # the checkpoint it starts from
                alone("alone", max_steps=6, save_strategy="steps", save_steps=4)
            yaml = ROOT / "accelerate_configs" / f"{config}.yaml"
            target = folder / config
            target.mkdir()
            for needed in ("model", "alone"):
                if (folder / needed).exists():
                    (target / needed).symlink_to(folder / needed)
            launch = ["-m", "accelerate.commands.launch", "--config_file", str(yaml), *arguments]
            zero = ["--zero"] if stage else []
            run([sys.executable, *launch, str(SCRIPT), str(target), *zero, "--runs", *runs])
            known[config] = target
        paths = [known[config] / f"{name}-{rank}.pt" for rank in (0, 1)]
        return [torch.load(path, weights_only=False) for path in paths]

    return find


def relative(one: Tensor, other: Tensor) -> float:
    return float((one.double() - other.double()).norm() / other.double().norm())


def vector(report: dict[str, Any]) -> Tensor:
    return torch.cat([value.flatten() for _, value in sorted(report["weights"].items())])


@pytest.mark.parametrize(("config", "name"), CASES)
def test_two_processes_train_what_one_does(launched, alone, config, name):
    expected, reports = alone(name), launched(config, name)
    assert [report["world"] for report in reports] == [2, 2]
    for report in reports:
        assert report["losses"] == pytest.approx(expected["losses"], rel=RELATIVE, abs=RELATIVE)
    assert relative(vector(expected), vector(expected["start"])) > 1e-3  # it moved
    assert relative(vector(reports[0]), vector(expected)) <= RELATIVE


@pytest.mark.parametrize("config", CONFIGS)
def test_tracked_values_move_and_are_the_same_everywhere(launched, alone, config):
    expected, (one, other) = alone("dft"), launched(config, "dft")
    assert torch.equal(one["u"], other["u"])
    assert relative(one["u"], expected["u"]) <= RELATIVE
    assert not one["u at start"].any()
    assert (one["u"] != 0).sum() >= 12


@pytest.mark.parametrize(("config", "name"), CASES)
def test_the_configuration_is_in_force(launched, config, name):
    stage = CONFIGS[config][0]
    for report in launched(config, name):
        assert report["deepspeed"] == (stage is not None)
        assert report["stage"] == stage
        wrapper = "DeepSpeedEngine" if stage else "DistributedDataParallel"
        assert report["wrapper"] == wrapper


@pytest.mark.parametrize("name", ["dft", "disco", "dft-lora"])
def test_zero3_partitions_the_parameters(launched, name):
    whole = tiny_model().get_input_embeddings().weight.numel()
    assert [report["partition"] for report in launched("zero3_cpu", name)] == [whole // 2] * 2
    other = launched("zero2_cpu", "dft")
    assert [report["partition"] for report in other] == [None] * 2


@pytest.mark.parametrize("name", ["dft", "disco", *ROWS])
def test_the_gradient_of_two_ranks_is_that_of_one(launched, alone, name):
    """The invariance contract over processes: unequal rows, questions torn over micro-batches."""
    expected = alone(name)["gradient"].double()
    for report in launched("cpu", name):
        gradient = report["gradient"].double()
        cosine = gradient @ expected / (gradient.norm() * expected.norm())
        assert 1 - float(cosine) <= 1e-6
        assert abs(float(gradient.norm() / expected.norm()) - 1) <= RELATIVE


@pytest.mark.parametrize("config", ["cpu", "zero3_cpu"])
def test_adapters_train_on_two_processes_too(launched, alone, config):
    expected, reports = alone("dft-lora"), launched(config, "dft-lora")
    assert reports[0]["losses"] == pytest.approx(expected["losses"], rel=RELATIVE)
    assert relative(reports[0]["u"], expected["u"]) <= RELATIVE
    names = [name for name in reports[0]["weights"] if "lora_B" in name]
    assert names
    for name in names:
        found, wanted = reports[0]["weights"][name], expected["weights"][name]
        assert found.any()
        assert relative(found, wanted) <= 1e-4


def test_a_run_goes_on_with_more_processes_and_the_same_tracked_values(launched, alone, folder):
    """Four steps by one process, two more by two: u is what it was, and the end is the same."""
    expected = alone("alone", max_steps=6, save_strategy="steps", save_steps=4)
    saved = folder / "alone" / "checkpoint-4" / "objective.safetensors"
    for report in launched("cpu", "dft-continued"):
        assert torch.equal(report["u at start"], load_file(saved)["inner.u"])
        assert report["u at start"].any()
        assert report["losses"] == pytest.approx(expected["losses"], rel=RELATIVE)
        assert relative(report["u"], expected["u"]) <= RELATIVE
    assert relative(vector(launched("cpu", "dft-continued")[0]), vector(expected)) <= RELATIVE


def test_zero3_resumes_where_it_was(launched):
    (saved, _), (resumed, other) = (launched("zero3_cpu", f"dft-{n}") for n in ("saved", "resumed"))
    assert resumed["losses"] == saved["losses"]
    assert torch.equal(resumed["u"], saved["u"])
    assert torch.equal(other["u"], saved["u"])
    assert torch.equal(vector(resumed), vector(saved))
    assert resumed["u at start"].any()


def test_refilling_on_two_ranks_ends_for_both_and_is_logged(launched):
    one, other = launched("cpu", "disco-refill")
    assert one["losses"] == other["losses"]
    shares = [line["groups/valid_fraction"] for line in one["log"] if "loss" in line]
    assert len(shares) == 4
    plain = [line["groups/valid_fraction"] for line in launched("cpu", "disco")[0]["log"][:4]]
    assert sum(shares) > sum(plain)
    assert max(line.get("rollout/refill_tokens", 0) for line in one["log"]) > 0
