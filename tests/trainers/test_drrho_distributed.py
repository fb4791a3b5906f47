"""DRRHO on two processes: gloo, ZeRO-2 and ZeRO-3 give what one process gives."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import ROOT, run
from tests.launched.drrho_runs import RUNS, report
from tests.trainers.build import tiny_model
from tests.trainers.test_distributed import RELATIVE, relative, vector

pytestmark = [pytest.mark.dist, pytest.mark.timeout(300)]

SCRIPT = ROOT / "tests" / "launched" / "drrho_runs.py"
CONFIGS = {"cpu": None, "zero2_cpu": 2, "zero3_cpu": 3}  # ZeRO stage


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("drrho")
    tiny_model().save_pretrained(path / "model")
    tiny_model(seed=3).save_pretrained(path / "reference")
    return path


@pytest.fixture(scope="module")
def alone(folder: Path) -> Any:
    """What one process makes of a run."""
    known: dict[str, dict[str, Any]] = {}

    def find(name: str) -> dict[str, Any]:
        if name not in known:
            known[name] = report(name, folder, 1, use_cpu=True)
        return known[name]

    return find


@pytest.fixture(scope="module")
def launched(folder: Path) -> Any:
    """What two processes make of it, by configuration."""
    known: dict[str, Path] = {}

    def find(config: str, name: str) -> list[dict[str, Any]]:
        if config not in known:
            known[config] = target = folder / config
            target.mkdir()
            for needed in ("model", "reference"):
                (target / needed).symlink_to(folder / needed)
            yaml = ROOT / "accelerate_configs" / f"{config}.yaml"
            launch = ["-m", "accelerate.commands.launch", "--config_file", str(yaml)]
            zero = ["--zero"] if CONFIGS[config] else []
            run([sys.executable, *launch, str(SCRIPT), str(target), *zero])
        paths = [known[config] / f"{name}-{rank}.pt" for rank in (0, 1)]
        return [torch.load(path, weights_only=False) for path in paths]

    return find


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize("config", CONFIGS)
def test_two_processes_train_what_one_does(launched, alone, config, name):
    expected, reports = alone(name), launched(config, name)
    for found in reports:
        assert (found["world"], found["stage"]) == (2, CONFIGS[config])
        assert found["losses"] == pytest.approx(expected["losses"], rel=RELATIVE, abs=RELATIVE)
        assert found["state"].keys() == expected["state"].keys()
        for key, value in found["state"].items():
            torch.testing.assert_close(value, expected["state"][key], rtol=1e-4, atol=1e-5)
            assert torch.equal(value, reports[0]["state"][key])
    assert relative(vector(reports[0]), vector(expected)) <= 10 * RELATIVE
    assert len(set(expected["losses"])) == 4


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize("config", CONFIGS)
def test_every_process_has_every_reference_loss(launched, alone, config, name):
    expected, reports = alone(name)["reference"], launched(config, name)
    assert len(expected) == 24 + 7
    for found in reports:
        assert found["reference"].keys() == expected.keys()
        for index, value in found["reference"].items():
            torch.testing.assert_close(value, expected[index], rtol=1e-5, atol=1e-5)
