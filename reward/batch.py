# SPDX-License-Identifier: Apache-2.0
"""The items of one `map` of a `reward.pool.WorkerPool`, and which of them to send together."""

import math
from collections import deque
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from time import monotonic

from reward import worker as child

TIMEOUT = 0
"""The kind of a result that no worker sends."""

MAX_CHUNK = 32
FIRST_CHUNK = 8  # until something is known of what an item costs
CHUNK_SECONDS = 0.05
CHUNK_BYTES = 8 << 20


class Batch:
    """The items of one `map`, and what is known of them."""

    def __init__(self, function: bytes, size: int, deadline: float, expires: float) -> None:
        self.function = function
        self.size = size
        self.deadline = deadline
        self.submitted = monotonic()
        self.expires = expires
        self.items: list[bytes] = [b""] * size
        self.results: list[tuple[int, bytes, float] | None] = [None] * size
        self.pending: deque[int] = deque()
        self.left = size
        self.late = 0
        self.failed_starts = 0
        self.queued = False  # whether it stands in the dispatcher's queue
        self.seconds = 0.0  # of the items that returned
        self.returned = 0
        self.done: Future[None] = Future()

    def add(self, index: int, item: bytes) -> None:
        """Have an item computed."""
        self.items[index] = item
        self.pending.append(index)

    def finish(self, index: int, kind: int, payload: bytes, seconds: float) -> None:
        """Keep the result of an item."""
        self.results[index] = (kind, payload, seconds)
        self.items[index] = b""
        self.left -= 1
        if kind == child.OK:
            self.seconds += seconds
            self.returned += 1

    def take(self, workers: int) -> deque[int]:
        """Return the items to send next: many if they are cheap, fewer towards the end."""
        cost = self.seconds / self.returned if self.returned else CHUNK_SECONDS / FIRST_CHUNK
        size = min(MAX_CHUNK, math.ceil(len(self.pending) / (2 * workers)))
        size = max(1, min(size, int(CHUNK_SECONDS / max(cost, 1e-6))))
        chunk = deque([self.pending.popleft()])
        total = len(self.items[chunk[0]])
        while self.pending and len(chunk) < size:
            total += len(self.items[self.pending[0]])
            if total > CHUNK_BYTES:
                break
            chunk.append(self.pending.popleft())
        return chunk

    def end(self, error: BaseException | None = None) -> None:
        """Wake who waits for the batch."""
        self.pending.clear()
        with suppress(InvalidStateError):  # the caller went away
            if error is None:
                self.done.set_result(None)
            else:
                self.done.set_exception(error)
