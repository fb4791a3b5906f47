"""The benchmark of serving, at the size of a toy."""

import json
import sys
from importlib.util import find_spec

import pytest

from tests.conftest import run


@pytest.mark.vllm
@pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed")
def test_the_benchmark_of_serving_measures_both_engines(tmp_path):
    output = tmp_path / "serving.json"
    run([sys.executable, "benchmarks/serving.py", "--toy", "--output", str(output)])
    found = json.loads(output.read_text())
    assert found["parameters"]["tempnet"] > 256 * found["vocabulary"]
    overheads = [found["transformers"]["2 rows"]["tempnet"], *found["vllm"]["2 rows"].values()]
    assert len(overheads) == 4
    assert all(len(figures["overhead_of_pairs"]) == 1 for figures in overheads)
