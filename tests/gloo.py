"""One pool of processes for all tests that need several ranks of gloo."""

import multiprocessing
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist


class GlooPool:
    """Processes that join a group of any size up to ``size`` for the length of one call."""

    def __init__(self, size: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._folder = tempfile.TemporaryDirectory()
        self._calls = 0
        self._results = context.SimpleQueue()
        self._tasks = [context.SimpleQueue() for _ in range(size)]
        self._processes = [
            context.Process(target=_serve, args=(rank, tasks, self._results), daemon=True)
            for rank, tasks in enumerate(self._tasks)
        ]
        for process in self._processes:
            process.start()

    def run(self, world: int, function: Callable[..., Any], *args: Any) -> list[Any]:
        """Return ``function(rank, *args)`` of every rank of a group of ``world`` processes.

        ``function`` is found by name in the other process; results travel as pickles, so they
        should hold numbers and arrays rather than tensors.
        """
        self._calls += 1
        store = str(Path(self._folder.name) / f"store{self._calls}")
        for tasks in self._tasks[:world]:
            tasks.put((world, store, function, args))
        answers = dict(self._results.get() for _ in range(world))
        failures = [answer for ok, answer in answers.values() if not ok]
        if failures:
            raise RuntimeError("\n".join(failures))
        return [answers[rank][1] for rank in range(world)]

    def close(self) -> None:
        """End the processes."""
        for tasks in self._tasks:
            tasks.put(None)
        for process in self._processes:
            process.join(timeout=10)
            if process.is_alive():
                process.kill()
        self._folder.cleanup()


def _serve(rank: int, tasks: Any, results: Any) -> None:
    torch.set_num_threads(1)
    while (task := tasks.get()) is not None:
        world, store, function, args = task
        try:
            dist.init_process_group(
                "gloo", init_method=f"file://{store}", rank=rank, world_size=world
            )
            results.put((rank, (True, function(rank, *args))))
        except Exception:
            results.put((rank, (False, traceback.format_exc())))
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()
