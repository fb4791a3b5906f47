"""A process that left its group ends well, though gloo's threads still wait for Python's lock."""

import subprocess
import sys
from pathlib import Path

import pytest

from llm_xrisk.fcco import leave

ROOT = Path(__file__).resolve().parents[2]
# The lock is not handed over while Python computes, and what refers to the group keeps its threads:
# with destroy_process_group in the place of leave, every other such process ends in an abort.
SCRIPT = """
import sys
import torch, torch.distributed as dist
from llm_xrisk.fcco import leave
dist.init_process_group("gloo", init_method=f"file://{sys.argv[1]}", rank=0, world_size=1)
referred = dist.group.WORLD
sys.setswitchinterval(1e3)
tensors = [torch.ones(3) for _ in range(40)]
works = [dist.all_reduce(tensor, async_op=True) for tensor in tensors]
del works
leave()
"""


@pytest.mark.dist
def test_a_process_that_left_does_not_abort_at_its_end(tmp_path):
    codes = []
    for run in range(6):
        command = [sys.executable, "-c", SCRIPT, str(tmp_path / f"store{run}")]
        codes.append(subprocess.run(command, cwd=ROOT, capture_output=True).returncode)
    assert codes == [0] * 6


def test_leaving_no_group_does_nothing():
    assert leave(patience=1e9) is None
