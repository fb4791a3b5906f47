# SPDX-License-Identifier: Apache-2.0
"""The parent's end of one worker of `reward.pool`: its process, its socket, what it is doing."""

import os
import pickle
import signal
import socket
import subprocess
import sys
import tempfile
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from time import monotonic, sleep

from reward import worker as child
from reward.batch import Batch

# Not -m: that would look for this package before the path is set. The hash seed is fixed so that
# the order of a set, and with it what a symbolic engine tries first, is the same in every worker.
_BOOT = (
    "import sys; sys.path[:] = sys.argv[3:]; from reward.worker import main; "
    "main(int(sys.argv[1]), int(sys.argv[2]))"
)
_ENVIRONMENT = {"PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1"}
_KILL_SECONDS = 5.0
_READ_BYTES = 1 << 18

Message = tuple[int, int, float, bytes]


class WorkerProcess:
    """A fresh interpreter that runs `reward.worker.main`."""

    def __init__(self, memory_limit: int, preload: Sequence[str]) -> None:
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        # a file, not a pipe: nobody has to empty it
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115 (closed when it is ready)
        path = [os.path.abspath(entry) for entry in sys.path if isinstance(entry, str)]
        command = [sys.executable, "-c", _BOOT, str(theirs.fileno()), str(os.getpid()), *path]
        try:
            # a session of its own: Ctrl-C does not reach it, and what it starts ends with it
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=self._stderr,
                env=os.environ | _ENVIRONMENT,
                pass_fds=[theirs.fileno()],
                start_new_session=True,
            )
        except BaseException:
            ours.close()
            self._stderr.close()
            raise
        finally:
            theirs.close()
        self._socket = ours
        self._outgoing = bytearray()
        self._incoming = bytearray()
        self.pid = self._process.pid
        self.fileno = ours.fileno()
        self.complaint = ""
        self.ready = False
        self.peak_at_start = 0  # not its own: the kernel hands down that of the parent
        self.function = b""  # what it has imported
        self.served = 0
        self.batch: Batch | None = None
        self.chunk: deque[int] = deque()  # items without an answer; the first one runs
        self.begun = False  # whether it has read the chunk and imported the function
        self.expires = 0.0
        start = pickle.dumps((memory_limit, tuple(preload)))
        self.queue(child.frame(child.START, payload=start))

    @property
    def waited_for(self) -> bool:
        """Whether an answer is due."""
        return self.batch is not None or not self.ready

    def started(self, *, peak: int) -> None:
        """Note that it is ready; what it writes from now on is dropped."""
        self.ready = True
        self.peak_at_start = peak
        self._stderr.close()

    def queue(self, message: bytes) -> None:
        """Put a message behind those that wait to be sent."""
        self._outgoing += message

    def send(self) -> bool:
        """Send what the socket takes; return whether something is left."""
        with suppress(BlockingIOError, ConnectionError):  # a dead worker shows when it is read
            while self._outgoing:
                sent = self._socket.send(self._outgoing)
                del self._outgoing[:sent]
            return False
        return bool(self._outgoing)

    def receive(self) -> tuple[list[Message], bool]:
        """Return the messages that are here, and whether more may come."""
        alive = True
        try:
            while data := self._socket.recv(_READ_BYTES):
                self._incoming += data
                if len(data) < _READ_BYTES:
                    break
            else:
                alive = False
        except BlockingIOError:
            pass
        except ConnectionError:  # it left something unread
            alive = False
        messages, sound = self._parse()
        return messages, alive and sound

    def _parse(self) -> tuple[list[Message], bool]:
        messages: list[Message] = []
        start, header = 0, child.HEADER.size
        while len(self._incoming) >= start + header:
            kind, index, seconds, size = child.HEADER.unpack_from(self._incoming, start)
            if size > child.MAX_RESULT:  # not a header: the item wrote to the socket itself
                return messages, False
            end = start + header + size
            if len(self._incoming) < end:
                break
            messages.append((kind, index, seconds, bytes(self._incoming[start + header : end])))
            start = end
        del self._incoming[:start]
        return messages, True

    def end(self, *, patience: float = 0.0) -> tuple[int, int]:
        """Kill and reap it, once it had the time to exit by itself.

        Returns:
            Its exit code, negative for a signal, and its peak memory in bytes.
        """
        code, peak = -signal.SIGKILL, 0
        self._socket.close()
        with suppress(ChildProcessError, ProcessLookupError):  # the host reaped it
            self._wait(patience)
            os.killpg(self.pid, signal.SIGKILL)
            # one that the kernel does not let go, on a dead file system say, stays a zombie
            if self._wait(_KILL_SECONDS):
                _, status, usage = os.wait4(self.pid, 0)
                code, peak = os.waitstatus_to_exitcode(status), usage.ru_maxrss << 10
        self._process.returncode = code  # else the object would warn and wait for it again
        self._read_complaint()
        return code, peak

    def _wait(self, seconds: float) -> bool:
        """Return whether it has exited, before it is reaped."""
        until = monotonic() + seconds
        while os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
            if monotonic() >= until:
                return False
            sleep(0.001)
        return True

    def _read_complaint(self) -> None:
        """Keep the last line that it wrote before it was ready."""
        if not self._stderr.closed:
            self._stderr.seek(0)
            lines = self._stderr.read()[-2000:].decode(errors="replace").split("\n")
            self.complaint = next((line for line in reversed(lines) if line.strip()), "")
            self._stderr.close()
