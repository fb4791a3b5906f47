"""TempNet on two processes: gloo, ZeRO-2 and ZeRO-3 give what one process gives."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM

from llm_xrisk.models.tempnet import TempNet
from tests.conftest import ROOT, run
from tests.launched.tempnet_runs import RUNS, report
from tests.trainers.build import tiny_model, weights
from tests.trainers.test_distributed import RELATIVE, relative

pytestmark = [pytest.mark.dist, pytest.mark.timeout(300)]

SCRIPT = ROOT / "tests" / "launched" / "tempnet_runs.py"
CONFIGS = {"cpu": None, "zero2_cpu": 2, "zero3_cpu": 3}  # ZeRO stage
FROZEN = ("frozen", "saved", "resumed")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tempnet")
    tiny_model().save_pretrained(path / "model")
    return path


@pytest.fixture(scope="module")
def alone(folder: Path) -> Any:
    """What one process makes of a run."""
    known: dict[str, dict[str, Any]] = {}

    def find(name: str) -> dict[str, Any]:
        name = "frozen" if name in FROZEN else name
        if name not in known:
            known[name] = report(name, folder, 1, use_cpu=True)
        return known[name] | {"folder": folder / name}

    return find


@pytest.fixture(scope="module")
def launched(folder: Path) -> Any:
    """What two processes make of it, by configuration."""
    known: dict[str, Path] = {}

    def find(config: str, name: str) -> list[dict[str, Any]]:
        if config not in known:
            known[config] = target = folder / config
            target.mkdir()
            (target / "model").symlink_to(folder / "model")
            yaml = ROOT / "accelerate_configs" / f"{config}.yaml"
            launch = ["-m", "accelerate.commands.launch", "--config_file", str(yaml)]
            zero = ["--zero"] if CONFIGS[config] else []
            run([sys.executable, *launch, str(SCRIPT), str(target), *zero])
        paths = [known[config] / f"{name}-{rank}.pt" for rank in (0, 1)]
        found = [torch.load(path, weights_only=False) for path in paths]
        return [one | {"folder": known[config] / name} for one in found]

    return find


def saved(folder: Path, name: str) -> Tensor:
    """All weights that the run wrote, as one vector."""
    parts = [weights(TempNet.from_pretrained(folder))]
    if name not in FROZEN:
        model = AutoModelForCausalLM.from_pretrained(folder)
        if name == "adapter":
            model = PeftModel.from_pretrained(tiny_model(), folder)
        parts.append(weights(model))
    return torch.cat(parts)


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize("config", CONFIGS)
def test_two_processes_train_what_one_does(launched, alone, config, name):
    expected, reports = alone(name), launched(config, name)
    for found in reports:
        assert (found["world"], found["stage"]) == (2, CONFIGS[config])
        assert found["losses"] == pytest.approx(expected["losses"], rel=RELATIVE, abs=RELATIVE)
        for key, value in expected["eval"].items():
            if "_per_second" not in key and "time" not in key:
                assert found["eval"][key] == pytest.approx(value, rel=1e-4, abs=1e-5), key
        for line, other in zip(found["log"], expected["log"], strict=True):
            for key in ("tau/mean", "tau/min", "tau/max", "entropy", "nll"):
                assert line[key] == pytest.approx(other[key], rel=1e-4)
    assert len(set(expected["losses"])) == 4
    found = saved(reports[0]["folder"], name)
    assert relative(found, saved(expected["folder"], name)) <= 10 * RELATIVE


@pytest.mark.parametrize("config", CONFIGS)
def test_a_frozen_model_is_sharded_by_zero_3_alone_and_saved_on_demand(launched, folder, config):
    for found in launched(config, "frozen"):
        assert found["chunked"]
        assert found["sharded"] == (CONFIGS[config] == 3)
        assert not (found["folder"] / "model.safetensors").exists()
    checkpoint = launched(config, "saved")[0]["folder"] / "checkpoint-2"
    files = [
        p for kind in ("*.safetensors", "*states.pt", "optim*.pt") for p in checkpoint.rglob(kind)
    ]
    model = (folder / "model" / "model.safetensors").stat().st_size
    assert 0 < sum(path.stat().st_size for path in files) < model
    base = AutoModelForCausalLM.from_pretrained(launched(config, "resumed")[0]["folder"])
    assert torch.equal(weights(base), weights(tiny_model()))
