"""Finished runs, kept in a folder so that a benchmark goes on where it was stopped."""

import base64
import contextlib
import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.tabular.training import Run


def key_of(run: Run) -> str:
    """A name for a run, the same in every process."""
    text = json.dumps(asdict(run), sort_keys=True, default=list)
    return hashlib.sha256(text.encode()).hexdigest()[:24]


def encode(scores: np.ndarray) -> str:
    """Scores as text, bit for bit."""
    return base64.b64encode(np.asarray(scores, dtype=np.float32).tobytes()).decode()


def decode(text: str) -> np.ndarray:
    """What `encode` wrote, flat."""
    return np.frombuffer(base64.b64decode(text), dtype=np.float32)


class Store:
    """Runs by key: the scores of the rows to predict, and how long the run took.

    Args:
        folder: Holds one file of lines for each method.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "runs"
        self.folder.mkdir(parents=True, exist_ok=True)
        self._found: dict[str, dict[str, Any]] = {}
        for path in sorted(self.folder.glob("*.jsonl")):
            for line in path.read_text(encoding="utf-8").splitlines():
                self._read(line)

    def __contains__(self, run: Run) -> bool:
        return key_of(run) in self._found

    def scores(self, run: Run) -> np.ndarray:
        """(n * outputs,) scores of a finished run."""
        return decode(self._found[key_of(run)]["scores"])

    def seconds(self, run: Run) -> float:
        """How long it took."""
        return float(self._found[key_of(run)]["seconds"])

    def add(self, run: Run, scores: str, seconds: float) -> None:
        """Keep a run, at once and whole."""
        entry = {"key": key_of(run), **asdict(run), "seconds": seconds, "scores": scores}
        self._found[entry["key"]] = entry
        with self._path(run.method).open("a", encoding="utf-8") as file:
            file.write("\n" + json.dumps(entry, default=list))

    def forget(self, method: str) -> None:
        """Drop the runs of a method, because its code has changed."""
        self._path(method).unlink(missing_ok=True)
        self._found = {k: e for k, e in self._found.items() if e["method"] != method}

    def _read(self, line: str) -> None:
        """Take a line in; the one that a killed process was writing is run again."""
        with contextlib.suppress(json.JSONDecodeError):
            entry = json.loads(line)
            self._found[entry["key"]] = entry

    def _path(self, method: str) -> Path:
        name = "".join(c if c.isalnum() else "-" for c in method.lower())
        return self.folder / f"{name}.jsonl"
