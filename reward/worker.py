# SPDX-License-Identifier: Apache-2.0
"""The child side of `reward.pool`: one process that answers chunks of items over a socket.

Every message is a header and a payload. The header is no pickle and the parent decodes the payload
of a result in the thread that asked for it, so nothing a function returns can upset the dispatcher.
"""

import ctypes
import importlib
import math
import os
import pickle
import resource
import signal
import socket
import struct
import sys
from collections.abc import Callable
from contextlib import suppress
from time import perf_counter, process_time
from typing import Any, NoReturn

HEADER = struct.Struct("<BIdQ")
"""Kind, index of the item, seconds, bytes of payload."""

START, FUNCTION, CHUNK = 1, 2, 3  # parent to child
READY, FAILED, BEGUN, OK, CRASH, OOM, DONE = 10, 11, 12, 13, 14, 15, 16  # child to parent
RESULTS = frozenset({OK, CRASH, OOM})
MAX_RESULT = 64 << 20
MAX_DETAIL = 300
_HEADROOM = 16 << 20  # below its memory limit, or a worker is of no use
_PR_SET_PDEATHSIG = 1

inside = False
"""Whether this process is a worker; a pool refuses to start in one."""


def frame(kind: int, index: int = 0, seconds: float = 0.0, payload: bytes = b"") -> bytes:
    """Return one message as bytes."""
    return HEADER.pack(kind, index, seconds, len(payload)) + payload


def one_line(error: BaseException) -> str:
    """Say an exception in one short line, even one whose text cannot be had."""
    name = type(error).__name__
    try:
        text = " ".join(str(error)[: 4 * MAX_DETAIL].split())
    except Exception:
        return f"{name} (its text raised too)"
    return f"{name}: {text}"[:MAX_DETAIL] if text else name


def main(descriptor: int, parent: int) -> NoReturn:
    """Serve until the parent closes its end, or dies."""
    global inside
    inside = True
    _die_with(parent)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())  # as the thread that made the pool had it
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    for number in (signal.SIGTERM, signal.SIGXCPU):
        signal.signal(number, signal.SIG_DFL)  # a parent that ignores them hands that down
    os.set_inheritable(descriptor, False)
    with suppress(EOFError, ConnectionError):
        _serve(socket.socket(fileno=descriptor))
    os._exit(0)  # threads or exit handlers of a function must not keep the process


def _die_with(parent: int) -> None:
    """Have the kernel kill this process when the thread that started it ends."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # it died before the call above
        os._exit(0)


def _serve(connection: socket.socket) -> None:
    stream = connection.makefile("rb", buffering=1 << 16)
    function: Callable[..., Any] | str = "no function was sent"
    while True:
        kind, count, seconds, payload = _receive(stream)
        if kind == START:
            _start(connection, payload)
        elif kind == FUNCTION:
            function = _load(payload)
        elif isinstance(function, str):
            connection.sendall(frame(FAILED, payload=function.encode(errors="replace")))
        else:
            _answer(connection, function, count, pickle.loads(payload), seconds)


def _receive(stream: Any) -> tuple[int, int, float, bytes]:
    header = stream.read(HEADER.size)
    if len(header) < HEADER.size:
        raise EOFError
    kind, index, seconds, size = HEADER.unpack(header)
    payload = stream.read(size)
    if len(payload) < size:
        raise EOFError
    return kind, index, seconds, payload


def _start(connection: socket.socket, payload: bytes) -> None:
    """Set the limits, import what is asked for, and say so, or why not."""
    memory_limit, preload = pickle.loads(payload)
    try:
        _lower(resource.RLIMIT_AS, memory_limit)
        _lower(resource.RLIMIT_CORE, 0)
        for name in preload:
            importlib.import_module(name)
        bytearray(_HEADROOM)
    except BaseException as error:  # SystemExit at import is a failed start too
        text = f"{one_line(error)} (in the start of a worker, preload={list(preload)})"
        connection.sendall(frame(FAILED, payload=text.encode(errors="replace")))
        os._exit(1)
    # Until here stderr was a file in which the parent finds why a start failed; from here on it
    # would only grow.
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 1)
    os.dup2(null, 2)
    os.close(null)
    connection.sendall(frame(READY, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss))


def _lower(which: int, limit: int) -> None:
    hard = resource.getrlimit(which)[1]
    limit = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
    resource.setrlimit(which, (limit, limit))


def _load(payload: bytes) -> Callable[..., Any] | str:
    """Return the function, or why there is none."""
    try:
        sys.path[:], blob = pickle.loads(payload)
        return pickle.loads(blob)
    except BaseException as error:  # a module may raise anything as it is imported
        return one_line(error)


def _answer(
    connection: socket.socket,
    function: Callable[..., Any],
    count: int,
    items: list[bytes],
    deadline: float,
) -> None:
    """Answer the items in order, each as soon as it is known."""
    connection.sendall(frame(BEGUN))
    limit, own = _CpuLimit(deadline), os.getpid()
    for index in range(count):
        limit.arm()
        start = perf_counter()
        kind, payload = _call(function, items[index])
        if os.getpid() != own:  # the item forked, and only one may answer
            os._exit(0)
        connection.sendall(frame(kind, index, perf_counter() - start, payload))
        if kind == OOM:
            os._exit(0)  # what is left of the heap is not to be trusted
    limit.disarm()  # the import of the next function has no such limit
    connection.sendall(frame(DONE, _resident() >> 10))


def _call(function: Callable[..., Any], item: bytes) -> tuple[int, bytes]:
    try:
        payload = pickle.dumps(function(*pickle.loads(item)), pickle.HIGHEST_PROTOCOL)
    except MemoryError:
        return OOM, b"MemoryError"
    except BaseException as error:  # an item that exits or interrupts must not end the worker
        return CRASH, one_line(error).encode(errors="replace")
    if len(payload) > MAX_RESULT:
        return CRASH, f"result of {len(payload)} bytes, more than {MAX_RESULT}".encode()
    return OK, payload


class _CpuLimit:
    """A second net: the kernel ends an item that computes on while the parent is stopped.

    The soft limit counts the CPU time of the whole process, so it moves on with every item and a
    worker may live for ever; twice the deadline and two seconds more, it never comes first.
    """

    def __init__(self, deadline: float) -> None:
        self._budget = math.ceil(2 * deadline) + 2
        self._armed = -1
        self._hard = resource.getrlimit(resource.RLIMIT_CPU)[1]

    def arm(self) -> None:
        """Move the limit on, which costs a system call once per second of CPU time."""
        limit = int(process_time()) + self._budget
        if limit != self._armed:
            self._armed = limit
            soft = limit if self._hard == resource.RLIM_INFINITY else min(limit, self._hard)
            resource.setrlimit(resource.RLIMIT_CPU, (soft, self._hard))

    def disarm(self) -> None:
        """Take the soft limit away."""
        resource.setrlimit(resource.RLIMIT_CPU, (self._hard, self._hard))


def _resident() -> int:
    """Bytes of memory held now."""
    try:
        with open("/proc/self/statm", "rb") as file:
            return int(file.read().split()[1]) * resource.getpagesize()
    except OSError:  # no /proc: the peak stands in for it
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
