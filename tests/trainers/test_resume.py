"""A run that is killed and resumed is, on a CPU, bit for bit the run that was not."""

import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from llm_xrisk.trainers import mixin
from llm_xrisk.trainers.checkpoint import last_complete_checkpoint
from tests.conftest import run
from tests.launched.killed_runs import build
from tests.trainers.build import losses

RUNS = ("dft", "disco", "lora")


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("killed")
    run([sys.executable, "-m", "tests.launched.killed_runs", str(folder)])
    return folder


@pytest.fixture(scope="module")
def pairs_of_runs(killed: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """(resumed, uninterrupted) trainers by name, each trained once."""
    known: dict[str, tuple[Any, Any]] = {}

    def find(name: str) -> tuple[Any, Any]:
        if name not in known:
            whole = build(name, tmp_path_factory.mktemp(name))
            whole.train()
            resumed = build(name, killed / name)
            resumed.train(resume_from_checkpoint=True)
            known[name] = (resumed, whole)
        return known[name]

    return find


def tensors_of(state: Any, prefix: str = "") -> dict[str, Any]:
    """An optimizer's state as one flat dictionary."""
    if isinstance(state, dict):
        items = [(str(key), value) for key, value in state.items()]
    elif isinstance(state, list):
        items = [(str(key), value) for key, value in enumerate(state)]
    else:
        return {prefix: state}
    flat: dict[str, Any] = {}
    for key, value in items:
        flat |= tensors_of(value, f"{prefix}/{key}")
    return flat


def assert_equal(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        same = (
            torch.equal(value, other[name]) if isinstance(value, Tensor) else value == other[name]
        )
        assert same, name


@pytest.mark.parametrize("name", RUNS)
def test_the_run_was_killed_between_checkpoints(killed, name):
    assert last_complete_checkpoint(str(killed / name)) == str(killed / name / "checkpoint-3")
    assert not (killed / name / "checkpoint-6").exists()


@pytest.mark.parametrize("name", RUNS)
def test_weights_and_losses_are_those_of_the_uninterrupted_run(pairs_of_runs, name):
    resumed, whole = pairs_of_runs(name)
    assert losses(resumed) == losses(whole)  # the log of the first steps is in the checkpoint
    assert len(set(losses(whole))) > 4
    assert_equal(dict(resumed.model.state_dict()), dict(whole.model.state_dict()))


@pytest.mark.parametrize("name", RUNS)
def test_optimizer_schedule_and_log_are_too(pairs_of_runs, name):
    resumed, whole = pairs_of_runs(name)
    one, other = (tensors_of(t.optimizer.state_dict()) for t in (resumed, whole))
    assert any("exp_avg" in key for key in one)
    assert_equal(one, other)
    assert resumed.lr_scheduler.state_dict() == whole.lr_scheduler.state_dict()
    timed = ("train_runtime", "train_samples_per_second", "train_steps_per_second", "train_loss")
    lines = [
        [{k: v for k, v in line.items() if k not in timed} for line in t.state.log_history]
        for t in (resumed, whole)
    ]
    assert lines[0] == lines[1]


@pytest.mark.parametrize("name", ["dft", "lora"])
def test_tracked_values_are_too(pairs_of_runs, name):
    resumed, whole = pairs_of_runs(name)
    assert_equal(dict(resumed.objective.state_dict()), dict(whole.objective.state_dict()))
    assert resumed.objective.inner.u.abs().max() > 0
    assert resumed.objective.inner.visited.all()


def test_waiting_answers_are_too(pairs_of_runs, killed):
    state = load_file(killed / "disco" / "checkpoint-3" / "rollouts-0.safetensors")
    assert int(state["steps"]) == 1  # mid-rollout: one of two steps taken
    assert len(state["targets"]) == 16
    resumed, whole = pairs_of_runs("disco")
    assert resumed._buffer == whole._buffer
    assert resumed._stream.position == whole._stream.position > 0


def test_random_numbers_are_too(pairs_of_runs, killed):
    resumed, whole = pairs_of_runs("dft")
    paths = [Path(t.args.output_dir) / "checkpoint-6" / "rng_state.pth" for t in (resumed, whole)]
    one, other = (torch.load(path, weights_only=False) for path in paths)
    assert torch.equal(one["cpu"], other["cpu"])
    assert one["python"] == other["python"]


@pytest.mark.parametrize("what", ["tracked values", "waiting answers"])
def test_what_is_not_restored_is_missed(killed, pairs_of_runs, monkeypatch, tmp_path, what):
    """The comparison above notices if resuming forgets something."""
    name = "dft" if what == "tracked values" else "disco"
    _, whole = pairs_of_runs(name)
    shutil.copytree(killed / name, tmp_path / name)
    forgetful = build(name, tmp_path / name)
    if name == "dft":
        monkeypatch.setattr(mixin, "load_objective", lambda objective, folder: None)
    else:
        monkeypatch.setattr(type(forgetful), "_layout", lambda trainer: {"world_size": "other"})
    forgetful.train(resume_from_checkpoint=str(tmp_path / name / "checkpoint-3"))
    assert losses(forgetful)[:3] == losses(whole)[:3]
    assert losses(forgetful)[3:] != losses(whole)[3:]


def test_a_checkpoint_that_was_being_written_is_passed_over(killed, tmp_path):
    torn = killed / "torn"
    assert (torn / "checkpoint-6" / "model.safetensors").is_file()
    assert not (torn / "checkpoint-6" / "trainer_state.json").exists()
    resumed = build("torn", torn)
    started: list[int] = []
    load = resumed._load_optimizer_and_scheduler

    def watch(checkpoint: str | None) -> None:
        started.append(int(str(checkpoint).rpartition("-")[2]))
        load(checkpoint)

    resumed._load_optimizer_and_scheduler = watch
    resumed.train(resume_from_checkpoint=True)
    assert started == [3]
    whole = build("torn", tmp_path)
    whole.train()
    assert_equal(dict(resumed.model.state_dict()), dict(whole.model.state_dict()))
    assert last_complete_checkpoint(str(torn)) == str(torn / "checkpoint-8")
