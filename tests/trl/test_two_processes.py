"""The objective joins the rows of all processes: two of them train as one."""

import json
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).with_name("launched_disco.py")


@pytest.mark.dist
def test_two_processes_train_as_one(accelerate_launch, tmp_path):
    reports, changes = [], []
    for config, rows in (("single", "16"), ("cpu", "8")):
        folder = tmp_path / config
        folder.mkdir()
        accelerate_launch(config, SCRIPT, str(folder), rows)
        reports.append(json.loads((folder / "report.json").read_text()))
        changes.append(torch.load(folder / "change.pt"))
    one, two = reports
    assert (one.pop("world_size"), two.pop("world_size")) == (1, 2)
    for name in one:
        assert two[name] == pytest.approx(one[name], rel=1e-4, abs=1e-7), name
    assert one["kl/k3"][1] > 1e-6  # the second step on the same completions: the hinge acts
    assert 0 < min(one["groups/valid_fraction"]) < 1  # unequal groups
    assert (changes[0] - changes[1]).norm() / changes[0].norm() < 1e-4
