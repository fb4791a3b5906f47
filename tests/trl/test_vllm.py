"""A real vLLM on the CPU inside TRL's trainer, in a process of its own: it keeps groups open."""

import json
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.conftest import run


@pytest.mark.vllm
@pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed")
def test_vllm_follows_the_policy_as_long_as_tied_heads_are_refreshed(tmp_path):
    script = Path(__file__).with_name("launched_vllm.py")
    run([sys.executable, str(script), str(tmp_path), "6", "10"])
    gaps = json.loads((tmp_path / "gaps.json").read_text())
    fresh, stale = gaps[:6], gaps[6:]
    assert (len(fresh), len(stale)) == (6, 4)
    assert max(fresh) < 0.03  # vLLM computes in bfloat16
    assert max(stale) > 0.1
