# SPDX-License-Identifier: Apache-2.0
"""Worker processes with a hard deadline per item: what hangs, crashes or swells costs one item."""

import logging
import os
import pickle
import sys
import threading
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from time import monotonic
from types import TracebackType
from typing import Any, Literal

from reward import worker
from reward.batch import Batch
from reward.dispatch import Dispatcher, Limits

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Outcome:
    """How one item ended.

    Args:
        status: "ok" if the function returned; "timeout" if it was killed at its deadline, or if the
            batch ended first; "crash" if it raised or ended its process; "oom" if memory ran out.
        value: What the function returned, `None` for another status.
        detail: One line for a person, empty for "ok".
        seconds: Wall time of the item.

    Example:
        >>> Outcome("ok", 6, "", 0.1).value
        6
    """

    status: Literal["ok", "timeout", "crash", "oom"]
    value: Any
    detail: str
    seconds: float


class WorkerPool:
    """Calls a function in worker processes, with limits of time and memory for each item.

    The workers are fresh interpreters: never forked, so CUDA and threads of this process are no
    concern, and its main module is not imported again. They end with this process, however it ends.
    Any thread may call `map`, and all share the workers; so does `await pool.amap(...)`.

    A worker is sent up to 32 items at a time and answers one by one. If an item hangs, the worker
    is killed and replaced, and the items behind it, which had not started, are run elsewhere.
    Importing the function's module takes none of an item's time.

    Args:
        workers: Number of processes; by default the cores this process or its container may use,
            shared out among the ranks of this machine where `LOCAL_WORLD_SIZE` is set.
        deadline: Seconds an item may take.
        batch_deadline: Seconds a whole `map` may take, waiting for other batches included.
        memory_limit: Bytes of address space of each worker.
        preload: Modules that a worker imports as it starts.
        recycle_after: A worker is replaced once it has answered this many items,
        recycle_rss: or when it holds this many bytes.

    Raises:
        ValueError: An argument is out of its range.
        RuntimeError: The process is itself a worker of a pool.

    Example:
        >>> import operator
        >>> with WorkerPool(1) as pool:
        ...     [o.value if o.status == "ok" else o.detail
        ...      for o in pool.map(operator.floordiv, [(7, 2), (7, 0)])]
        [3, 'ZeroDivisionError: integer division or modulo by zero']
    """

    def __init__(
        self,
        workers: int | None = None,
        *,
        deadline: float = 2.0,
        batch_deadline: float = 60.0,
        memory_limit: int = 2 << 30,
        preload: Sequence[str] = (),
        recycle_after: int = 10_000,
        recycle_rss: int = 1 << 30,
    ) -> None:
        workers = _cores() if workers is None else workers
        given = {"workers": workers, "recycle_after": recycle_after, "recycle_rss": recycle_rss}
        given |= {"deadline": deadline, "batch_deadline": batch_deadline}
        for name, value in (given | {"memory_limit": memory_limit}).items():
            if not value > 0:
                raise ValueError(
                    f"{name} must be above 0, got {value!r}; leave it out for a default"
                )
        if isinstance(preload, str):
            raise ValueError(f"preload must be a list, got {preload!r}; write [{preload!r}]")
        if worker.inside:
            raise RuntimeError(
                "got a pool inside a worker of a pool, where it would multiply the processes; "
                "need the verifier to compute in its own process: call the function itself"
            )
        self.workers = workers
        self.deadline = deadline
        self.batch_deadline = batch_deadline
        limits = Limits(memory_limit, tuple(preload), recycle_after, recycle_rss)
        self._dispatcher = Dispatcher(workers, limits)
        # at the end of the process, or when nobody holds the pool any more
        self._close = weakref.finalize(self, self._dispatcher.stop)

    def map(
        self,
        function: Callable[..., Any],
        items: Sequence[tuple[Any, ...]],
        *,
        deadline: float | None = None,
    ) -> list[Outcome]:
        """Call `function(*item)` for every item.

        Args:
            function: A callable that pickles by its name: a function at the top of a module other
                than the main one, a `functools.partial` of one, or an instance of such a class.
            items: The arguments of each call.
            deadline: Seconds an item may take, if not the pool's.

        Returns:
            One outcome for each item, in order, whatever happened to it.

        Raises:
            TypeError: The function cannot be pickled, or an item is not a tuple.
            RuntimeError: The pool is closed, the workers do not start, or the function cannot be
                imported in them.
        """
        batch = self._submit(function, items, deadline)
        try:
            batch.done.result()
        except BaseException:  # an interrupt of the caller, say: drop what is left
            self._dispatcher.cancel(batch)
            raise
        return _outcomes(batch)

    async def amap(
        self,
        function: Callable[..., Any],
        items: Sequence[tuple[Any, ...]],
        *,
        deadline: float | None = None,
    ) -> list[Outcome]:
        """Do as `map` does and leave the event loop free; cancelling drops what is left."""
        import asyncio  # not at the top: every worker imports this package, and it is half the time

        batch = await asyncio.to_thread(self._submit, function, items, deadline)
        try:
            await asyncio.wrap_future(batch.done)
        finally:
            self._dispatcher.cancel(batch)
        return await asyncio.to_thread(_outcomes, batch)

    def pids(self) -> list[int]:
        """Return the process ids of the workers there are now."""
        return self._dispatcher.pids()

    @property
    def usable(self) -> bool:
        """Whether `map` may be called: not closed, and no failure to start."""
        return self._dispatcher.refusal() is None

    def close(self) -> None:
        """End the workers; a `map` that still waits raises. Closing again does nothing."""
        self._close()

    def __enter__(self) -> "WorkerPool":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _submit(
        self,
        function: Callable[..., Any],
        items: Sequence[tuple[Any, ...]],
        deadline: float | None,
    ) -> Batch:
        deadline = self.deadline if deadline is None else deadline
        if not deadline > 0:
            raise ValueError(f"deadline must be above 0, got {deadline!r}; leave it out")
        for index, item in enumerate(items):
            if not isinstance(item, tuple):
                raise TypeError(
                    f"item {index} is of type {type(item).__name__}, need a tuple of the "
                    "function's arguments; write (item,) for a single one"
                )
        batch = Batch(_by_name(function), len(items), deadline, monotonic() + self.batch_deadline)
        for index, item in enumerate(items):
            try:
                batch.add(index, pickle.dumps(item, pickle.HIGHEST_PROTOCOL))
            except Exception as error:  # __reduce__ may raise anything
                detail = f"the item cannot be pickled: {worker.one_line(error)}"
                batch.finish(index, worker.CRASH, detail.encode(errors="replace"), 0.0)
        self._dispatcher.submit(batch)
        return batch


def _cores() -> int:
    """Return the share of this process in the cores that it may use."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    cores = min(cores or 1, _quota())
    ranks = os.environ.get("LOCAL_WORLD_SIZE", "")
    return max(1, int(cores / (int(ranks) if ranks.isdecimal() and int(ranks) else 1)))


def _quota(path: str = "/sys/fs/cgroup/cpu.max") -> float:
    """Return the cores that a container is held to; more workers would wait for each other."""
    try:
        with open(path) as file:
            quota, period = file.read().split()
        return float("inf") if quota == "max" else int(quota) / int(period)
    except (OSError, ValueError):
        return float("inf")


def _by_name(function: Callable[..., Any]) -> bytes:
    """Return what a worker imports the function from: the path and its pickle."""
    need = (
        "need a function at the top of a module that a worker can import; move it there, without "
        "lambda or nesting"
    )
    if getattr(function, "__module__", None) == "__main__":
        raise TypeError(f"got {function!r} of the main module, {need}")
    try:
        blob = pickle.dumps(function, pickle.HIGHEST_PROTOCOL)
    except Exception as error:  # PicklingError, AttributeError, or what __reduce__ raises
        raise TypeError(f"got {function!r}: {worker.one_line(error)}; {need}") from error
    path = [os.path.abspath(entry) for entry in sys.path if isinstance(entry, str)]
    return pickle.dumps((path, blob), pickle.HIGHEST_PROTOCOL)


def _outcomes(batch: Batch) -> list[Outcome]:
    if batch.late:
        _logger.warning(
            "%d of %d items had no result after the batch deadline of %.1f s and count as "
            "timeouts; use more workers, smaller batches or a higher batch_deadline",
            batch.late,
            batch.size,
            batch.expires - batch.submitted,
        )
    return [_outcome(*result) for result in batch.results if result is not None]


def _outcome(kind: int, payload: bytes, seconds: float) -> Outcome:
    if kind != worker.OK:
        status = {worker.CRASH: "crash", worker.OOM: "oom"}.get(kind, "timeout")
        return Outcome(status, None, payload.decode(), seconds)  # pyright: ignore[reportArgumentType]
    try:
        return Outcome("ok", pickle.loads(payload), "", seconds)
    except Exception as error:  # a class that is not here, or whose __setstate__ raises
        detail = f"the result cannot be unpickled: {worker.one_line(error)}"
        return Outcome("crash", None, detail, seconds)


_shared: WorkerPool | None = None
_shared_lock = threading.Lock()


def shared_pool() -> WorkerPool:
    """Return the pool of this process, started at the first call.

    A process forked from this one gets its own, and so does the next caller after the pool was
    closed.

    Example:
        >>> shared_pool() is shared_pool()
        True
    """
    global _shared
    with _shared_lock:
        if _shared is None or not _shared.usable:
            _shared = WorkerPool()
        return _shared


def _forget_shared() -> None:
    global _shared, _shared_lock
    _shared = None
    _shared_lock = threading.Lock()  # another thread may have held it as this process was forked


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_shared)
