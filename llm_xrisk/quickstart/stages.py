"""Stages that are done once: a directory, a key of everything that determined it, a result."""

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

_MARK = "stage.json"


def stage_progress() -> Progress:
    """Progress bars with time left, one per stage."""
    return Progress(
        SpinnerColumn(finished_text="[green]✓[/green]"),
        TextColumn("{task.description:<34}"),
        BarColumn(bar_width=28),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )


@dataclass
class Stages:
    """The stages of one seed.

    A stage's key is a hash of its settings and its inputs' keys, so it is done again exactly when
    something that determines it has changed. Each function gets the stage's directory and a
    callback that moves its progress bar; what it left half-done it finds there again.

    Args:
        root: Directory of the stages.
        progress: Where bars are shown.
        label: Put before each stage's name.
    """

    root: Path
    progress: Progress
    label: str = ""
    keys: dict[str, str] = field(default_factory=dict[str, str])
    seconds: dict[str, float] = field(default_factory=dict[str, float])
    reused: list[str] = field(default_factory=list[str])

    def run(
        self,
        name: str,
        title: str,
        work: Callable[[Path, Callable[[float], None]], None],
        *,
        total: float,
        settings: dict[str, Any],
        inputs: tuple[str, ...] = (),
    ) -> Path:
        """Do a stage unless it is done; return its directory."""
        parts = {"settings": settings, "inputs": [self.keys[i] for i in inputs]}
        key = hashlib.blake2b(json.dumps(parts, sort_keys=True).encode(), digest_size=8).hexdigest()
        self.keys[name] = key
        directory = self.root / name
        mark = _read(directory / _MARK)
        if mark.get("key") == key and mark.get("done"):
            self.reused.append(self.label + title)
            self.seconds[name] = mark["seconds"]
            return directory
        if directory.exists() and mark.get("key") != key:
            shutil.rmtree(directory)  # made with other settings
        directory.mkdir(parents=True, exist_ok=True)
        _write(directory / _MARK, {"key": key, "done": False})
        with self._bar(self.label + title, total) as advance:
            start = time.perf_counter()
            work(directory, advance)
            self.seconds[name] = time.perf_counter() - start
        _write(directory / _MARK, {"key": key, "done": True, "seconds": self.seconds[name]})
        return directory

    @contextmanager
    def _bar(self, title: str, total: float) -> Iterator[Callable[[float], None]]:
        task = self.progress.add_task(title, total=total)
        yield lambda amount: self.progress.update(task, advance=amount)
        self.progress.update(task, completed=total)


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.is_file() else {}


def _write(path: Path, value: dict[str, Any]) -> None:
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(value))
    os.replace(partial, path)
