"""The benchmark for a GPU machine runs on a CPU at toy size, and its checks can fail."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.on_device import objectives, suite
from llm_xrisk.objectives import OBJECTIVES, Objective, ObjectiveOutput
from tests.contract import Batch
from tests.on_device import RandomNumbersOfTheCPU

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "benchmarks" / "device.py"


def launch(command: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"OUT": str(folder), "PYTHON": sys.executable}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, Any]]:
    """The printed table and the file of one run."""
    folder = tmp_path_factory.mktemp("device")
    done = launch([sys.executable, str(SCRIPT), "--device", "cpu", "--toy"], folder)
    assert done.returncode == 0, done.stdout + done.stderr
    (file,) = folder.glob("device-cpu-*.json")
    return done.stdout, json.loads(file.read_text())


def test_a_toy_run_checks_every_objective(toy: tuple[str, dict[str, Any]]) -> None:
    found = toy[1]["objectives"]
    assert len(found["objectives"]) >= len(OBJECTIVES)
    assert (found["missing"], found["host_sync"]) == ([], [])
    assert all(row["float64"] <= 1e-10 for row in found["objectives"].values())


def test_a_toy_run_times_every_trainer(toy: tuple[str, dict[str, Any]]) -> None:
    table, found = toy
    variants = found["training"]["variants"]
    assert {"sft", "dft", "disco", "disco, 2 micro-batches, score pass"} <= set(variants)
    for name, row in variants.items():
        assert name in table
        assert row["tokens_per_s"] == pytest.approx(8 * (12 + 8) / row["step_s"])
    assert variants["sft"]["time_vs_sft"] == 1.0
    assert found["tests"]["passed"] > 0
    assert "all parts passed" in table


def test_the_steps_whose_gradients_are_compared_have_some(
    toy: tuple[str, dict[str, Any]],
) -> None:
    norms = toy[1]["gradients"]["norms"]
    assert set(norms) == {f"{name}.{step}" for name in ("dft", "disco") for step in range(3)}
    assert len(set(norms.values())) == 6  # the policy moves
    assert min(norms.values()) > 0.1


def test_a_run_is_recorded_with_versions_seed_and_hardware(
    toy: tuple[str, dict[str, Any]],
) -> None:
    found = toy[1]
    assert found["versions"]["torch"].startswith(torch.__version__.split("+")[0])
    assert (found["seed"], found["toy"], found["device"]) == (0, True, "cpu")
    assert found["hardware"]["cpus"] == os.cpu_count()


def test_without_a_gpu_the_command_says_so_and_what_to_do(tmp_path: Path) -> None:
    done = launch(["sh", str(ROOT / "benchmarks" / "device.sh")], tmp_path)
    assert done.returncode == 2
    assert "got --device cuda and torch sees no GPU; try --device cpu --toy" in done.stderr


class Drifting(Objective):
    """The mean, times a factor; optionally with a look at its value."""

    def __init__(self, factor: float, *, peeks: bool = False) -> None:
        super().__init__()
        self.factor, self.peeks = factor, peeks

    def forward(self, scores: Tensor, targets: Tensor) -> ObjectiveOutput:
        loss = scores.mean() * self.factor
        return ObjectiveOutput(loss, {"loss": torch.tensor(float(loss))} if self.peeks else {})


class Contract:
    """What the checks ask of a contract test; every objective built is further off."""

    def __init__(self, drift: float = 0.0, *, peeks: bool = False) -> None:
        self.drift, self.peeks, self.built = drift, peeks, 0

    def build(self, **options: Any) -> Objective:
        self.built += 1
        return Drifting(1 + self.drift * self.built, peeks=self.peeks)

    def batches(self, count: int) -> list[Batch]:
        return [Batch(torch.ones(3), torch.ones(3)) for _ in range(count)]


def test_an_objective_that_differs_between_devices_is_found() -> None:
    good: Any = objectives.check_objective(Contract(), "cpu")  # pyright: ignore
    assert (good["float64"], good["ok"], good["waits"]) == (0.0, True, "")
    bad: Any = objectives.check_objective(Contract(drift=1e-4), "cpu")  # pyright: ignore
    assert bad["float64"] == pytest.approx(1e-4, rel=1e-2)
    assert not bad["ok"]


def test_an_objective_that_reads_a_value_is_found() -> None:
    assert "meta" in objectives.waits(Contract(peeks=True), "cpu")  # pyright: ignore


def test_failures_of_the_suite_are_counted_and_named(tmp_path: Path) -> None:
    cases = '<testcase classname="a" name="one"/><testcase classname="a" name="two"><failure/>'
    skipped = '<testcase classname="b" name="three"><skipped/></testcase>'
    report = tmp_path / "report.xml"
    report.write_text(
        f"<testsuites><testsuite>{cases}</testcase>{skipped}</testsuite></testsuites>"
    )
    found = suite.read_report(report)
    assert found == {"passed": 1, "failed": 1, "skipped": 1, "failures": ["a::two"]}


def test_tests_on_another_device_see_the_numbers_of_the_cpu() -> None:
    def draws() -> list[Tensor]:
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            filled = torch.empty(2).normal_(1.0, 2.0, generator=generator)
        order = torch.randperm(5)
        return [filled, order, torch.randn(2, 3, generator=generator), torch.rand(2)]

    torch.manual_seed(7)
    want = draws()
    torch.manual_seed(7)
    with RandomNumbersOfTheCPU("cpu"):
        got = draws()
        leaf = torch.randn(2, requires_grad=True)
    assert all(torch.equal(one, other) for one, other in zip(got, want, strict=True))
    assert leaf.is_leaf and leaf.requires_grad
