"""What every test shares: a quiet, offline, single-threaded process, seeds, the shipped model."""

import os

# Before torch and its neighbours are imported, here and in every process a test starts. CPU only,
# unless XRISK_TEST_DEVICE names another device; no hub, no telemetry; vLLM's CPU back end as small
# as it goes.
DEVICE = os.environ.get("XRISK_TEST_DEVICE", "cpu")
ENVIRONMENT = {
    "CI": "1",
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",  # repeatable sums on a GPU
    "DS_ACCELERATOR": "cpu",
    "HF_DATASETS_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
}
if DEVICE == "cpu":
    ENVIRONMENT["CUDA_VISIBLE_DEVICES"] = ""
for name, value in ENVIRONMENT.items():
    os.environ.setdefault(name, value)

import random  # noqa: E402
import signal  # noqa: E402
import subprocess  # noqa: E402
import sys  # noqa: E402
from collections.abc import Callable  # noqa: E402
from pathlib import Path  # noqa: E402

import pytest  # noqa: E402
import torch  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
TIMEOUTS = {"slow": 1800, "vllm": 600, "dist": 300}  # seconds; other tests have pyproject's


def pytest_configure() -> None:
    """Move the tensors of tests to another device, those made while collecting included."""
    if DEVICE != "cpu":
        from tests.on_device import move_tests_to

        move_tests_to(DEVICE)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Give tests that start processes or engines the time these need."""
    for item in items:
        marks = [mark for mark in TIMEOUTS if item.get_closest_marker(mark)]
        if marks and not item.get_closest_marker("timeout"):
            item.add_marker(pytest.mark.timeout(TIMEOUTS[marks[0]]))


@pytest.fixture(autouse=True)
def fixed_seeds() -> None:
    """Same random numbers in every test, whatever ran before it."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    random.seed(0)


@pytest.fixture(scope="session")
def tiny_model_path() -> str:
    """The model shipped in the package, for ``from_pretrained``."""
    from llm_xrisk.data.gsm8k_steps import tiny_model_path

    return tiny_model_path()


def stop(process: subprocess.Popen[str]) -> None:
    """End a launcher that hangs; its ranks, in sessions of their own, end with its SIGTERM."""
    os.killpg(process.pid, signal.SIGTERM)
    try:
        process.wait(timeout=40)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    if process.stdout is not None:
        process.stdout.close()


def run(command: list[str], *, timeout: float = 240) -> str:
    """Run a command with its children; return its output, or fail with the end of it."""
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=timeout)
    finally:
        if process.poll() is None:
            stop(process)
    if process.returncode != 0:
        pytest.fail(f"{' '.join(command)} exited with {process.returncode}:\n{output[-4000:]}")
    return output


@pytest.fixture
def accelerate_launch() -> Callable[..., str]:
    """Launch a script under one of ``accelerate_configs``: ``launch("cpu", script, "--x", "1")``.

    ``launch_arguments`` go to ``accelerate launch`` and override the YAML. Returns its output.
    """

    def launch(
        config: str, script: Path | str, *arguments: str, launch_arguments: tuple[str, ...] = ()
    ) -> str:
        yaml = ROOT / "accelerate_configs" / f"{config}.yaml"
        launcher = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(yaml)]
        return run([*launcher, *launch_arguments, str(script), *arguments])

    return launch
