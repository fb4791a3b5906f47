# SPDX-License-Identifier: Apache-2.0
"""The thread behind a `reward.pool.WorkerPool`: it owns the workers and keeps the deadlines.

One thread starts every worker, because the kernel ties a worker's life to the thread that started
it. It never blocks on a worker: sockets are non-blocking, both ways, and messages may arrive in
parts.
"""

import heapq
import math
import os
import pickle
import select
import signal
import threading
from collections import deque
from contextlib import suppress
from dataclasses import dataclass
from time import monotonic

from reward import worker as child
from reward.batch import TIMEOUT, Batch
from reward.process import WorkerProcess

START_SECONDS = 60.0
RETRY_SECONDS = 0.2
STOP_SECONDS = 10.0
EXIT_SECONDS = 0.2
MAX_FAILED_STARTS = 3
MAX_KILLED_STARTS = 30  # killed from outside, which says nothing of the start
MEMORY_SIGNALS = (-signal.SIGKILL, -signal.SIGSEGV, -signal.SIGABRT, -signal.SIGBUS)


@dataclass(frozen=True)
class Limits:
    """What holds for every worker of a pool."""

    memory: int
    preload: tuple[str, ...]
    recycle_after: int
    recycle_rss: int


class Dispatcher:
    """Sends chunks to workers, reads results, kills at deadlines, replaces what died."""

    def __init__(self, workers: int, limits: Limits) -> None:
        self._size = workers
        self._limits = limits
        self._pid = os.getpid()
        self._lock = threading.RLock()  # of the five below; a collected pool may stop in here
        self._inbox: list[Batch] = []
        self._cancelled: list[Batch] = []
        self._stopping = False
        self._broken: str | None = None
        self._wake_read, self._wake_write = os.pipe()
        os.set_blocking(self._wake_read, False)
        os.set_blocking(self._wake_write, False)
        # of the thread alone
        self._batches: set[Batch] = set()
        self._queue: deque[Batch] = deque()
        self._ends: list[tuple[float, int, Batch]] = []
        self._workers: dict[int, WorkerProcess] = {}
        self._poller = select.poll()
        self._poller.register(self._wake_read, select.POLLIN)
        self._failed_starts = self._killed_starts = 0
        self._function = b""  # the last one that a worker could import
        self._thread = threading.Thread(target=self._run, name="reward-pool", daemon=True)
        self._thread.start()

    def submit(self, batch: Batch) -> None:
        """Take a batch; its future ends when every item has a result."""
        refusal = self.refusal()
        if refusal is None:  # in a forked process somebody may hold the lock for ever
            with self._lock:
                refusal = self.refusal()
                if refusal is None:
                    self._inbox.append(batch)
                    self._wake()
                    return
        raise RuntimeError(refusal)

    def refusal(self) -> str | None:
        """Say why no batch is taken, if so."""
        if self._pid != os.getpid():
            return (
                f"got a batch in process {os.getpid()} for the pool of process {self._pid}, need "
                "a pool started here: use shared_pool(), or make one after the fork"
            )
        if self._broken is not None:
            return self._broken
        if self._stopping:
            return "got a batch for a closed pool, need an open one: make a new WorkerPool"
        return None

    def cancel(self, batch: Batch) -> None:
        """Drop what is left of a batch, if anything is."""
        if batch.done.cancel():
            with self._lock:
                self._cancelled.append(batch)
                self._wake()

    def _wake(self) -> None:
        with self._lock, suppress(OSError):  # full, so it wakes anyway; or closed
            os.write(self._wake_write, b"w")

    def pids(self) -> list[int]:
        """Return the processes that live."""
        return [worker.pid for worker in list(self._workers.values())]

    def stop(self) -> None:
        """End thread and workers. Does nothing in a forked process, whose workers they are not."""
        if self._pid != os.getpid():
            return
        with self._lock:
            self._stopping = True
            self._wake()
        if threading.current_thread() is not self._thread:
            self._thread.join(timeout=STOP_SECONDS)

    # From here on everything runs in the thread.

    def _run(self) -> None:
        error = RuntimeError(
            "the pool was closed while it worked on a batch; make a new WorkerPool"
        )
        try:
            while not self._stopping and self._broken is None:
                self._take_in()
                self._start_missing()
                self._hand_out()
                self._listen()
                self._keep_deadlines()
        except Exception as unexpected:
            # Callers must not wait for a thread that is gone.
            error = RuntimeError(f"the pool ended: {child.one_line(unexpected)}")
            error.__cause__ = unexpected
        self._end(error)

    def _end(self, error: RuntimeError) -> None:
        with self._lock:
            if not self._stopping and self._broken is None:
                self._broken = str(error)
            batches = [*self._batches, *self._inbox]
            self._inbox.clear()
        for batch in batches:
            batch.end(RuntimeError(self._broken) if self._broken else error)
        for worker in list(self._workers.values()):
            self._retire(worker)
        self._poller.unregister(self._wake_read)
        with self._lock:
            os.close(self._wake_read)
            os.close(self._wake_write)
            self._wake_read = self._wake_write = -1

    def _start_missing(self) -> None:
        while len(self._workers) < self._size:
            try:
                worker = WorkerProcess(self._limits.memory, self._limits.preload)
            except OSError as error:  # no process or descriptor to be had, for now perhaps
                self._failed_start(child.one_line(error))
                return
            worker.expires = monotonic() + START_SECONDS
            self._workers[worker.fileno] = worker
            self._poller.register(worker.fileno, select.POLLIN)
            self._send(worker)

    def _take_in(self) -> None:
        with self._lock:
            arrived, self._inbox = self._inbox, []
            cancelled, self._cancelled = self._cancelled, []
        for batch in arrived:
            self._batches.add(batch)
            heapq.heappush(self._ends, (batch.expires, id(batch), batch))
            self._enqueue(batch)
        for batch in [*cancelled, *(b for b in arrived if not b.left)]:
            self._drop(batch)

    def _enqueue(self, batch: Batch) -> None:
        if batch.pending and not batch.queued:
            batch.queued = True
            self._queue.append(batch)

    def _hand_out(self) -> None:
        for worker in [w for w in self._workers.values() if not w.waited_for]:
            while self._queue and not self._queue[0].pending:
                self._queue.popleft().queued = False
            if not self._queue:
                return
            batch = self._queue[0]
            self._queue.rotate(-1)  # each in turn, so that a large one delays no other
            worker.batch, worker.chunk = batch, batch.take(self._size)
            worker.begun = False
            worker.expires = monotonic() + START_SECONDS
            self._teach(worker, batch.function)
            items = pickle.dumps([batch.items[i] for i in worker.chunk], pickle.HIGHEST_PROTOCOL)
            worker.queue(child.frame(child.CHUNK, len(worker.chunk), batch.deadline, items))
            self._send(worker)

    def _teach(self, worker: WorkerProcess, function: bytes) -> None:
        if function and worker.function != function:
            worker.function = function
            worker.queue(child.frame(child.FUNCTION, payload=function))

    def _drop(self, batch: Batch, error: BaseException | None = None) -> None:
        """End a batch, and the work on it."""
        self._batches.discard(batch)
        batch.end(error)
        for worker in [w for w in self._workers.values() if w.batch is batch and w.chunk]:
            self._retire(worker)

    def _listen(self) -> None:
        for descriptor, events in self._poller.poll(self._patience()):
            if descriptor == self._wake_read:
                with suppress(BlockingIOError):
                    os.read(self._wake_read, 4096)
                continue
            worker = self._workers.get(descriptor)  # None: retired with a batch, just now
            if worker is not None and events & select.POLLOUT:
                self._send(worker)
            if worker is not None and events & ~select.POLLOUT:
                self._read(worker)

    def _patience(self) -> float | None:
        """Return the milliseconds until the next deadline."""
        times = [w.expires for w in self._workers.values() if w.waited_for]
        times += [self._ends[0][0]] if self._ends else []
        times += [monotonic() + RETRY_SECONDS] if len(self._workers) < self._size else []
        return max(0.0, math.ceil(1000 * (min(times) - monotonic()))) if times else None

    def _send(self, worker: WorkerProcess) -> None:
        waiting = worker.send()
        events = select.POLLIN | (select.POLLOUT if waiting else 0)
        self._poller.modify(worker.fileno, events)

    def _read(self, worker: WorkerProcess) -> None:
        if not self._has(worker):
            return
        messages, alive = worker.receive()
        for kind, index, seconds, payload in messages:
            if not self._has(worker):
                return  # retired by the message before
            self._take_message(worker, kind, index, seconds, payload)
        if not alive and self._has(worker):
            self._bury(worker)

    def _has(self, worker: WorkerProcess) -> bool:
        return self._workers.get(worker.fileno) is worker

    def _take_message(
        self, worker: WorkerProcess, kind: int, index: int, seconds: float, payload: bytes
    ) -> None:
        batch = worker.batch
        if kind == child.READY:
            worker.started(peak=index << 10)
            self._failed_starts = self._killed_starts = 0
            self._teach(worker, self._function)  # imports it while nothing waits
            self._send(worker)
        elif kind == child.FAILED and not worker.ready:
            self._break(payload.decode())
        elif kind == child.DONE and not worker.chunk:
            self._recycle_if_due(worker, index << 10)
        elif batch is None:
            return
        elif kind == child.FAILED and not worker.begun:
            self._drop(batch, RuntimeError(_not_imported(payload.decode())))
        elif kind == child.BEGUN:
            worker.begun = True
            self._function = batch.function
            worker.expires = monotonic() + batch.deadline
        elif kind not in child.RESULTS or not (worker.begun and worker.chunk):
            self._bury(worker)  # the item wrote to the socket itself
        else:
            running = worker.chunk.popleft()
            worker.served += 1
            worker.expires = monotonic() + batch.deadline
            if kind == child.OOM:
                self._retire(worker)
            self._finish(batch, running, kind, payload, seconds)

    def _finish(self, batch: Batch, index: int, kind: int, payload: bytes, seconds: float) -> None:
        batch.finish(index, kind, payload, seconds)
        if not batch.left:
            self._drop(batch)

    def _recycle_if_due(self, worker: WorkerProcess, resident: int) -> None:
        worker.batch = None
        limits = self._limits
        if worker.served >= limits.recycle_after or resident >= limits.recycle_rss:
            self._retire(worker)

    def _keep_deadlines(self) -> None:
        now = monotonic()
        for worker in list(self._workers.values()):
            if worker.expires <= now and worker.waited_for:
                self._read(worker)  # an answer that is already here counts
            if worker.expires <= now and worker.waited_for and self._has(worker):
                self._bury(worker, late=True)
        while self._ends and (self._ends[0][0] <= now or not self._ends[0][2].left):
            batch = heapq.heappop(self._ends)[2]
            if batch in self._batches:
                self._cut(batch, now - batch.submitted)

    def _cut(self, batch: Batch, seconds: float) -> None:
        """End a batch at its deadline."""
        limit = batch.expires - batch.submitted
        detail = f"no result within the batch deadline of {limit:.4g} s"
        for index in [i for i, result in enumerate(batch.results) if result is None]:
            batch.finish(index, TIMEOUT, detail.encode(), seconds)
            batch.late += 1
        self._drop(batch)

    def _bury(self, worker: WorkerProcess, *, late: bool = False) -> None:
        """Blame the item that ran for the end of its worker, and replace the worker."""
        batch = worker.batch
        running = worker.chunk.popleft() if worker.begun and worker.chunk else None
        code, peak = self._retire(worker, patience=0.0 if late else EXIT_SECONDS)
        if batch is not None and running is not None:
            since = worker.expires - batch.deadline
            grown = peak if peak > worker.peak_at_start else 0
            kind, detail = _cause(code, grown, self._limits.memory)
            if late:
                kind, detail = TIMEOUT, f"killed at its deadline of {batch.deadline:.4g} s"
            self._finish(batch, running, kind, detail.encode(), monotonic() - since)
            return
        reason = f"no answer in {START_SECONDS:.0f} s" if late else _ending(code)
        if worker.complaint:
            reason = f"{reason}: {worker.complaint}"
        if not worker.ready and code == -signal.SIGKILL and not late:
            self._killed_starts += 1
            if self._killed_starts >= MAX_KILLED_STARTS:
                self._break(reason)
        elif not worker.ready:
            self._failed_start(reason)
        elif batch is not None and worker.chunk:
            batch.failed_starts += 1
            if batch.failed_starts >= MAX_FAILED_STARTS and batch in self._batches:
                self._drop(batch, RuntimeError(_not_imported(reason)))

    def _retire(self, worker: WorkerProcess, *, patience: float = 0.0) -> tuple[int, int]:
        """End a worker; what it had not started goes to the front of its batch."""
        self._poller.unregister(worker.fileno)
        del self._workers[worker.fileno]
        if worker.batch in self._batches and not worker.batch.done.done():
            worker.batch.pending.extendleft(reversed(worker.chunk))
            self._enqueue(worker.batch)
        return worker.end(patience=patience)

    def _failed_start(self, reason: str) -> None:
        self._failed_starts += 1
        if self._failed_starts >= MAX_FAILED_STARTS:
            self._break(reason)

    def _break(self, cause: str) -> None:
        with self._lock:
            self._broken = (
                f"a worker of the pool did not start: {cause}; need a worker that imports "
                f"{', '.join(self._limits.preload) or 'reward'} within {START_SECONDS:.0f} s and "
                f"{self._limits.memory >> 20} MiB: mend the cause and make a new WorkerPool"
            )


def _not_imported(reason: str) -> str:
    return (
        f"a worker could not import the function: {reason}; need it at the top of a module on "
        "sys.path whose import succeeds: move it, or mend the import"
    )


def _ending(code: int) -> str:
    if code >= 0:
        return f"the worker exited with code {code}"
    return f"the worker was ended by signal {-code} ({signal.strsignal(-code)})"


def _cause(code: int, peak: int, memory: int) -> tuple[int, str]:
    """Tell a crash from memory that ran out where C code could not raise MemoryError."""
    detail = _ending(code)
    if code == -signal.SIGXCPU:
        return TIMEOUT, f"{detail}: CPU time"
    if code in MEMORY_SIGNALS and peak >= memory // 2:
        return child.OOM, f"{detail} holding {peak >> 20} MiB"
    return child.CRASH, detail
