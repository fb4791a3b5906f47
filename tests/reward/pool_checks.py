"""What the tests of the pool look at: outcomes, processes, programs of their own."""

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from reward.pool import Outcome

ROOT = Path(__file__).resolve().parents[2]


def statuses(outcomes: list[Outcome]) -> list[str]:
    return [outcome.status for outcome in outcomes]


def values(outcomes: list[Outcome]) -> list[object]:
    return [outcome.value for outcome in outcomes]


def eventually(condition: Callable[[], bool], seconds: float = 5.0) -> bool:
    until = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > until:
            return False
        time.sleep(0.02)
    return True


def lives(pid: int) -> bool:
    """Whether a process is there and no zombie."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state not in "ZX"


def script(code: str, *arguments: str, **options) -> subprocess.Popen[str]:
    """Start a program whose main module has no guard, in a session of its own."""
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        cwd=ROOT,
        text=True,
        stdout=subprocess.PIPE,
        **options,
    )
