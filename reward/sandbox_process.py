# SPDX-License-Identifier: Apache-2.0
"""Parent side of the sandbox's processes: the server that forks them, descriptors, output."""

import atexit
import os
import selectors
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

GRACE = 0.6  # seconds a launcher has to end its program after the deadline
_REPORT_BYTES = 1 << 16  # of what the launcher and the judge report
_START = 30.0  # seconds the server has to start
_ENVIRONMENT = {
    "PATH": "/usr/bin:/bin",
    "LANG": "C.UTF-8",
    "PYTHONHASHSEED": "0",
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
}
# A package without its __init__: only the modules of the child side are imported.
_BOOT = """
import sys, types
package = types.ModuleType("reward")
package.__path__ = [sys.argv[1]]
sys.modules["reward"] = package
from reward.sandbox_launcher import serve
serve(int(sys.argv[2]))
"""


class SandboxUnavailable(RuntimeError):
    """The isolation asked for cannot be had on this machine."""


@dataclass(frozen=True)
class Request:
    """One sandbox to run: options for the launcher, and the texts that only its processes read."""

    options: dict[str, object]
    program: str
    tests: str | None
    stdin: str
    output_bytes: int


@dataclass(frozen=True)
class Outcome:
    """What came out of it: texts cut at the limit, whether stdout was, and whether it ended."""

    texts: dict[str, str]
    flooded: bool
    finished: bool


class Descriptors:
    """The descriptors of one run: those given away, and our ends of its pipes."""

    def __init__(self) -> None:
        self.given: list[int] = []
        self.kept: list[int] = []

    def __enter__(self) -> "Descriptors":
        return self

    def __exit__(self, *exception: object) -> None:
        for fd in (*self.given, *self.kept):
            os.close(fd)

    def reader(self) -> int:
        """A pipe whose writing end is given away; returns the other."""
        ours, theirs = os.pipe()
        self.kept.append(ours)
        self.given.append(theirs)
        return ours

    def leash(self) -> int:
        """A pipe whose reading end is given away; returns the other."""
        theirs, ours = os.pipe()
        self.kept.append(ours)
        self.given.append(theirs)
        return ours

    def file(self, text: str) -> None:
        """Give away a file in memory: a pipe could block whoever writes a long text into it."""
        fd = os.memfd_create("sandbox")
        self.given.append(fd)
        data = text.encode("utf-8", "surrogatepass")
        while data:
            data = data[os.write(fd, data) :]
        os.lseek(fd, 0, os.SEEK_SET)

    def null(self) -> None:
        """Give away /dev/null, for output that nobody wants."""
        self.given.append(os.open(os.devnull, os.O_RDWR))

    def drop(self, fd: int) -> None:
        """Close one of ours before the end."""
        self.kept.remove(fd)
        os.close(fd)

    def close_given(self) -> None:
        """Close what was given away, so that a pipe ends when its last user does."""
        while self.given:
            os.close(self.given.pop())


class Server:
    """The process that forks launchers; it ends with this one."""

    def __init__(self, interpreter: Sequence[str]) -> None:
        self.owner = os.getpid()
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs, tempfile.TemporaryFile() as errors:
            self._process = subprocess.Popen(
                [*interpreter, "-c", _BOOT, str(Path(__file__).parent), str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=errors,
                pass_fds=[theirs.fileno()],
                env=_ENVIRONMENT,
                cwd="/",
                start_new_session=True,  # a Ctrl-C is for us; our end is its end
            )
            theirs.close()
            self._socket = ours
            ours.settimeout(_START)
            try:
                ready = ours.recv(100)
            except OSError:
                ready = b""
            if not ready:
                self.close()
                errors.seek(0)
                last = errors.read()[-400:].decode("utf-8", "replace").strip()
                raise SandboxUnavailable(f"the server of sandboxes did not start: {last}")

    def send(self, request: bytes, fds: Sequence[int]) -> None:
        """Ask for one sandbox.

        Raises:
            OSError: The server is gone.
        """
        socket.send_fds(self._socket, [request], list(fds))

    def close(self) -> None:
        """End the server. Sandboxes that still run are ended by their own leashes."""
        self._socket.close()
        if self.owner == os.getpid():
            self._process.kill()
            self._process.wait()


_servers: dict[tuple[str, ...], Server] = {}
_lock = threading.Lock()


def _server(interpreter: Sequence[str], failed: Server | None = None) -> Server:
    """The server of this process, started when first needed or when the last one is gone."""
    key = tuple(interpreter)
    with _lock:
        server = _servers.get(key)
        if server is not None and (server is failed or server.owner != os.getpid()):
            server.close()
            server = None
        if server is None:
            server = _servers[key] = Server(interpreter)
        return server


def close_servers() -> None:
    """End the servers of this process; the next sandbox starts one again."""
    with _lock:
        while _servers:
            _servers.popitem()[1].close()


def _after_fork() -> None:
    """In a fork: another thread may have held the lock, and the servers are not ours to use."""
    global _lock
    _lock = threading.Lock()


atexit.register(close_servers)
os.register_at_fork(after_in_child=_after_fork)


def run_request(interpreter: Sequence[str], request: Request, deadline: float) -> Outcome:
    """Run one sandbox and wait for its end.

    Args:
        interpreter: Command of the interpreter it runs in.
        request: What to run.
        deadline: When it must be over, in the time of `time.monotonic`.

    Raises:
        SandboxUnavailable: No process can be had to run it.
    """
    with Descriptors() as descriptors:
        names: dict[str, int] = {}
        descriptors.file(request.stdin)
        if request.tests is None:
            names["stdout"] = descriptors.reader()
        else:
            descriptors.null()
        names["stderr"] = descriptors.reader()
        leash = descriptors.leash()
        names["status"] = descriptors.reader()
        descriptors.file(request.program)
        if request.tests is not None:
            descriptors.file(request.tests)
            names["verdict"] = descriptors.reader()
        data, server = repr(request.options).encode(), _server(interpreter)
        try:
            server.send(data, descriptors.given)
        except OSError:
            _send_again(interpreter, server, data, descriptors.given)
        descriptors.close_given()
        reader = _Reader(names, request.output_bytes)
        finished = reader.until(deadline + GRACE)
        descriptors.drop(leash)
        if not finished:
            reader.until(time.monotonic() + GRACE / 2, whatever_comes=True)
        return reader.outcome(finished)


def _send_again(
    interpreter: Sequence[str], failed: Server, data: bytes, fds: Sequence[int]
) -> None:
    try:
        _server(interpreter, failed).send(data, fds)
    except OSError as error:
        raise SandboxUnavailable(f"the server of sandboxes does not listen: {error}") from None


class _Reader:
    """Reads what a launcher and its program write, with a cap, until the launcher is gone."""

    def __init__(self, fds: dict[str, int], cap: int) -> None:
        self.fds = fds
        self.caps = {"stdout": cap, "stderr": cap}
        self.kept = {name: bytearray() for name in ("status", "verdict", "stdout", "stderr")}
        self.flooded = False
        for fd in fds.values():
            os.set_blocking(fd, False)

    def until(self, deadline: float, *, whatever_comes: bool = False) -> bool:
        """Read until the launcher has ended, the deadline, or too much output.

        Args:
            deadline: In the time of `time.monotonic`.
            whatever_comes: Go on after too much output, and keep no more of it.

        Returns:
            Whether the launcher has ended.
        """
        with selectors.DefaultSelector() as selector:
            for name, fd in self.fds.items():
                selector.register(fd, selectors.EVENT_READ, name)
            while (left := deadline - time.monotonic()) > 0:
                if self.flooded and not whatever_comes:
                    return False
                ready = [(key.fd, key.data) for key, _ in selector.select(left)]
                ended = {name: fd for fd, name in ready if not self._read(fd, name)}
                if "status" in ended:
                    self._read_rest()
                    return True
                for fd in ended.values():
                    selector.unregister(fd)
        return False

    def _read(self, fd: int, name: str) -> bool:
        """Read what is there; returns whether more may come."""
        try:
            data = os.read(fd, 1 << 16)
        except BlockingIOError:
            return True
        kept = self.kept[name]
        room = self.caps.get(name, _REPORT_BYTES) - len(kept)
        kept += data[:room]
        self.flooded |= name == "stdout" and len(data) > room
        return bool(data)

    def _read_rest(self) -> None:
        """Read what the pipes still hold; a pipe holds less than this reads."""
        for name, fd in self.fds.items():
            for _ in range(32):
                before = len(self.kept[name])
                if not self._read(fd, name) or len(self.kept[name]) == before:
                    break

    def outcome(self, finished: bool) -> Outcome:
        """Put together what was read."""
        texts = {name: bytes(data).decode("utf-8", "replace") for name, data in self.kept.items()}
        return Outcome(texts, self.flooded, finished)
