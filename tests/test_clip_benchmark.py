"""What stands between the runs of benchmarks/clip.py and its table."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("sklearn")

from benchmarks import clip


def test_every_method_has_as_many_configurations_as_any_other():
    assert {len(settings) for settings in clip.GRID.values()} == {clip.Plan().settings}
    assert set().union(*clip.ARMS.values()) == clip.GRID.keys()
    for pairs, compared in clip.COMPARED.items():
        assert {name for pair in compared for name in pair} <= set(clip.ARMS[pairs])


def test_halves_that_find_each_other_are_counted_in_both_directions():
    class Fixed(torch.nn.Module):
        def forward(self, images: torch.Tensor) -> list[torch.Tensor]:
            first = torch.eye(3)
            # the second one's partner is a better match of the first
            return [first, torch.tensor([[1.0, 0.0, 0.0], [0.9, 0.1, 0.0], [0.0, 0.0, 1.0]])]

    found = clip.retrieved(Fixed(), torch.zeros(3, 1, 8, 8))
    # 1 finds 1 as no other has a part of it; its own partner finds 0
    assert found.tolist() == [1.0, 0.5, 1.0]


def test_a_stopped_benchmark_goes_on_and_comes_to_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(clip, "ARMS", {256: clip.ARMS[256]})
    monkeypatch.setattr(sys, "argv", ["clip.py", "--toy", "--folder", str(tmp_path)])
    clip.main()
    results = tmp_path / "toy" / "results.json"
    first = json.loads(results.read_text())
    runs = tmp_path / "toy" / "runs.jsonl"
    lines = runs.read_text().splitlines()
    runs.write_text("\n".join(lines[:-1]) + "\n" + lines[-1][:40])  # killed while writing
    capsys.readouterr()
    clip.main()
    printed = capsys.readouterr().out
    assert printed.count("; seed ") == 1  # the one that was cut
    again = json.loads(results.read_text())
    methods = first["results"]["256 pairs"]["methods"]
    for method, row in again["results"]["256 pairs"]["methods"].items():
        assert {m: row[m] for m in clip.METRICS} == {m: methods[method][m] for m in clip.METRICS}
    gap = again["results"]["256 pairs"]["paired differences"][f"{clip.DRRHO} - {clip.CONSTANT}"]
    means = [methods[m]["R@1"]["estimate"] for m in (clip.DRRHO, clip.CONSTANT)]
    assert gap["R@1"]["estimate"] == pytest.approx(means[0] - means[1], abs=0.011)
    assert np.isfinite(again["references"]["R@1, test"])
