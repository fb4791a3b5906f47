"""The tests of the core, the objectives and the log-probs, on the device."""

import importlib.util
import os
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
TESTS = ("tests/fcco", "tests/objectives", "tests/models")
TOY_TESTS = ("tests/fcco/test_groups.py",)
# On CUDA a wrong index is an assertion inside a kernel, which ends the process; gloo processes
# hold their tensors on the CPU; torch.compile is tested on the CPU, where no compiler is missing.
ELSEWHERE = "not (out_of_range or processes or compiles)"
OPTIONAL = "hypothesis"  # the one package of these tests that such a machine may lack
SECONDS = 270


def run_suite(device: str, *, toy: bool) -> dict[str, Any]:
    """Numbers of tests passed, failed and skipped, and the names of those that failed."""
    left_out = files_left_out()
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        # the settings of pytest that need plugins or the newest libraries are left out
        command = [sys.executable, "-m", "pytest", *(TOY_TESTS if toy else TESTS), "-q"]
        command += ["-k", ELSEWHERE, f"--junitxml={report}", "-o", "filterwarnings=default"]
        command += ["-o", "addopts=--import-mode=importlib"]
        command += [f"--ignore={name}" for name in left_out]
        try:
            done = subprocess.run(
                command,
                cwd=ROOT,
                env=os.environ | {"XRISK_TEST_DEVICE": device},
                capture_output=True,
                text=True,
                timeout=SECONDS,
            )
        except subprocess.TimeoutExpired as error:
            output = (error.stdout or b"").decode(errors="replace")
            return {"ok": False, "error": f"not done in {SECONDS} s", "output": output[-3000:]}
        if not report.is_file():
            return {"ok": False, "error": (done.stdout + done.stderr)[-3000:]}
        counts = read_report(report)
    counts["left_out"] = left_out
    counts["ok"] = done.returncode == 0 and counts["passed"] > 0
    if not counts["ok"]:
        counts["output"] = done.stdout[-6000:]
    return counts


def files_left_out() -> list[str]:
    """The files that need the package, where it is missing."""
    if importlib.util.find_spec(OPTIONAL) is not None:
        return []
    files = [path for folder in TESTS for path in (ROOT / folder).glob("test_*.py")]
    return sorted(str(f.relative_to(ROOT)) for f in files if OPTIONAL in f.read_text())


def read_report(path: Path) -> dict[str, Any]:
    """Count the cases of a JUnit report."""
    cases = list(ET.parse(path).getroot().iter("testcase"))
    failed = [c for c in cases if c.find("failure") is not None or c.find("error") is not None]
    skipped = [c for c in cases if c.find("skipped") is not None]
    return {
        "passed": len(cases) - len(failed) - len(skipped),
        "failed": len(failed),
        "skipped": len(skipped),
        "failures": [f"{c.get('classname')}::{c.get('name')}" for c in failed],
    }
