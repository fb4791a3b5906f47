# SPDX-License-Identifier: Apache-2.0
"""Run a program nobody has read: isolation levels, limits, and a probe that says what holds.

Levels, strongest first:

- `namespaces`: PID, network, mount, IPC and UTS namespaces of its own (and a user namespace where
  the caller is not root), an unprivileged uid, no capabilities, no-new-privs, resource limits. The
  program sees shared libraries and Python's standard library, read-only, and one small writable
  directory in memory that ends with it. When it ends, or its time does, the kernel ends every
  process it started.
- `rlimit`: the limits, and for root the unprivileged uid, without namespaces. The program can use
  the network, read what that user can read and write where that user can write; started by an
  ordinary user, it can send signals to every process of that user.
- `none`: a fresh process with a time limit, and nothing else.

What `namespaces` protects from: use of the network, reading or changing files outside, signals to
and traces of other processes, processes left over, the end of memory, disk or process numbers, by
one program at a time. What it does not protect from: a fault in the kernel, whose system calls are
all reachable, side channels such as timing and load, and a machine whose memory is smaller than
what the limits add up to (processes x memory, and the scratch directory, for each program at once).
For code written to break out of sandboxes, put a virtual machine around it.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from signal import SIGKILL
from typing import Literal, get_args

from reward.sandbox_process import Outcome, Request, SandboxUnavailable, run_request

Level = Literal["namespaces", "rlimit", "none"]
LEVELS: tuple[Level, ...] = get_args(Level)

_MIB = 1 << 20
_warned: set[str] = set()


@dataclass(frozen=True)
class Limits:
    """What one program may use.

    Args:
        memory: Address space of each of its processes, in bytes.
        processes: Processes and threads at once.
        open_files: Descriptors of each process.
        file_bytes: Size of the largest file.
        scratch_bytes: Size of the writable directory.
        scratch_files: Files and directories in it.
        output_bytes: Standard output kept; a program that writes more is ended.
        judge_memory: Address space of the process that runs the tests, if there is one.
    """

    memory: int = 512 * _MIB
    processes: int = 16
    open_files: int = 64
    file_bytes: int = 16 * _MIB
    scratch_bytes: int = 16 * _MIB
    scratch_files: int = 1024
    output_bytes: int = 64 * 1024
    judge_memory: int = 1024 * _MIB


@dataclass(frozen=True)
class Run:
    """How a program ended.

    Args:
        ended: "exit" or "signal" of its own, "timeout", or "output" for more output than allowed.
        code: Exit code, or number of the signal; 0 where it was ended.
        stdout: What it wrote, cut at the limit.
        stderr: The same of standard error.
        seconds: Wall time, with the start.
        level: The isolation it ran under.
        verdict: What the judge wrote, if there was one.
    """

    ended: Literal["exit", "signal", "timeout", "output"]
    code: int
    stdout: str
    stderr: str
    seconds: float
    level: Level
    verdict: str = ""


@dataclass(frozen=True)
class Isolation:
    """What the probe found: the strongest level that holds, and why no stronger one does."""

    level: Level
    reasons: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Sandbox:
    """Runs Python programs under one level of isolation, or refuses to.

    Nothing weaker than what was asked for is used: where the level does not hold, `run` raises and
    says why. A level below `namespaces` is used if it is asked for by name, with one warning.

    Args:
        isolation: The level.
        limits: What a program may use.
        readable: Further directories a program may read and import from, such as a site-packages.
            Each must itself be readable by all; at `namespaces` the path to it need not be.

    Raises:
        ValueError: If the level is not one of `LEVELS`.

    Example:
        >>> sandbox = Sandbox()
        >>> if isolation_level().level == "namespaces":
        ...     run = sandbox.run("import os; print(int(input()) + 1, os.listdir())", stdin="41")
        ... else:
        ...     run = Run("exit", 0, "42 []", "", 0.0, "none")
        >>> run.stdout.strip(), run.code
        ('42 []', 0)
    """

    isolation: Level = "namespaces"
    limits: Limits = field(default_factory=Limits)
    readable: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Refuse a level nobody has defined."""
        if self.isolation not in LEVELS:
            raise ValueError(
                f"got isolation={self.isolation!r}, need one of {', '.join(LEVELS)}: use "
                "'namespaces' for programs that a model wrote"
            )

    def require(self) -> None:
        """Check that the level holds; warn once if it is a weak one.

        Raises:
            SandboxUnavailable: It does not hold on this machine.
        """
        reason = _missing(self.isolation)
        if reason:
            raise SandboxUnavailable(
                f"isolation {self.isolation!r} does not hold here ({reason}), and programs must "
                "not run without it: run as root or allow user namespaces, or ask for a weaker "
                "level by name, as in isolation='rlimit'"
            )
        if self.isolation != "namespaces":
            _warn_once(
                f"programs run at isolation level {self.isolation!r}: they can use the network "
                "and read files of this machine; use 'namespaces' for code you have not read"
            )

    def run(self, program: str, *, stdin: str = "", timeout: float = 5.0) -> Run:
        """Run a program as a script.

        Args:
            program: Python source.
            stdin: Its standard input.
            timeout: Seconds of wall time, the start of the interpreter included.

        Raises:
            SandboxUnavailable: The level does not hold on this machine.
        """
        self.require()
        return self._execute(repr((program, "")), None, stdin, timeout)

    def judge(
        self,
        program: str,
        tests: str,
        names: Sequence[str],
        *,
        prelude: str = "",
        every: bool = False,
        timeout: float = 5.0,
    ) -> Run:
        """Run trusted tests against the functions of a program, each in a process of its own.

        Args:
            program: Python source that defines the functions.
            tests: Source of the tests: asserts, or a function `check(candidate)`.
            names: Functions that the tests may call; the first is the candidate.
            prelude: Trusted definitions that both sides see.
            every: Count every assert, instead of stopping at the first that fails.
            timeout: Seconds of wall time for everything.

        Returns:
            The run, of which `verdict` is what the judge found, or "" if it did not come to an end.

        Raises:
            SandboxUnavailable: The level does not hold on this machine.
        """
        self.require()
        tested = repr((tests, prelude, list(names), every))
        return self._execute(repr((program, prelude)), tested, "", timeout)

    def _execute(self, program: str, tests: str | None, stdin: str, timeout: float) -> Run:
        start = time.monotonic()
        interpreter = _interpreter() if self.isolation == "rlimit" else _own_interpreter()
        with _scratch(self.isolation) as scratch:
            options: dict[str, object] = {
                "level": self.isolation,
                "deadline": start + timeout,
                "scratch": scratch,
                "scratch_bytes": self.limits.scratch_bytes,
                "scratch_files": self.limits.scratch_files,
                "readable": [str(Path(path).resolve()) for path in self.readable],
                **_resources(self.limits, timeout),
            }
            request = Request(options, program, tests, stdin, self.limits.output_bytes)
            outcome = run_request(interpreter, request, start + timeout)
        return _read(outcome, self.isolation, time.monotonic() - start)


def _read(outcome: Outcome, level: Level, seconds: float) -> Run:
    """Say in words what the launcher reported."""
    kind, _, rest = outcome.texts["status"].partition(" ")
    if kind == "setup":
        raise SandboxUnavailable(f"the sandbox could not be set up: {rest}")
    code = int(rest) if kind == "ended" and rest != "timeout" else None
    if not kind and outcome.finished:
        code = -int(SIGKILL)  # the launcher itself was ended, which a program can do at weak levels
    ended = "timeout" if code is None else "signal" if code < 0 else "exit"
    return Run(
        "output" if outcome.flooded else ended,
        0 if code is None or outcome.flooded else abs(code),
        outcome.texts["stdout"],
        outcome.texts["stderr"],
        seconds,
        level,
        outcome.texts["verdict"],
    )


def _resources(limits: Limits, timeout: float) -> dict[str, object]:
    cpu = int(timeout) + 2  # a second net: wall time ends first
    shared = {"CPU": cpu, "CORE": 0, "FSIZE": limits.file_bytes, "NOFILE": limits.open_files}
    judge = {"AS": limits.judge_memory, "NPROC": 64}
    # In a user namespace the launcher and the judge count as processes of the same user.
    program = {"AS": limits.memory, "NPROC": limits.processes + (0 if os.geteuid() == 0 else 2)}
    return {"limits": {**shared, **program}, "judge_limits": {**shared, **judge}}


@contextmanager
def _scratch(level: Level) -> Iterator[str]:
    """A temporary directory, for the levels that cannot have a file system of their own."""
    if level == "namespaces":
        yield ""
        return
    path = tempfile.mkdtemp(prefix="sandbox-")
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


def _own_interpreter() -> list[str]:
    """The interpreter below any virtual environment, told to read nothing of this one."""
    path = os.path.realpath(getattr(sys, "_base_executable", "") or sys.executable)
    return [path, "-s", "-S", "-P", "-B", "-X", "utf8"]


@lru_cache(maxsize=1)
def _interpreter() -> list[str]:
    """An interpreter whose library an unprivileged user can read, as `rlimit` mounts nothing."""
    own = _own_interpreter()
    if os.geteuid() != 0 or _readable_by_all(os.__file__):
        return own
    for path in ("/usr/local/bin/python3", "/usr/bin/python3"):
        command = [path, "-c", "import sys; print(sys.version_info >= (3, 11))"]
        if not os.path.exists(path):
            continue
        found = subprocess.run(command, capture_output=True, text=True, check=False, timeout=20)
        if found.stdout.strip() == "True":
            return [path, *own[1:]]
    return own


def _readable_by_all(path: str) -> bool:
    parents = Path(path).resolve().parents
    return bool(os.stat(path).st_mode & 0o004) and all(p.stat().st_mode & 0o001 for p in parents)


_PROBE = """
import ctypes, json, os, resource, socket
libc = ctypes.CDLL(None)
def fails(function):
    try:
        function()
    except OSError:
        return True
    return False
print(json.dumps({
    "pid": os.getpid(),
    "uids": sorted({*os.getresuid(), *os.getresgid(), *os.getgroups()}),
    "no new privileges": libc.prctl(39, 0, 0, 0, 0) == 1,
    "no user namespaces": libc.unshare(0x10000000) != 0,
    "no network": [name for _, name in socket.if_nameindex()] == ["lo"]
        and fails(lambda: socket.create_connection(("127.0.0.1", 9), 1))
        and fails(lambda: socket.create_connection(("192.0.2.1", 9), 1)),
    "no files of the machine": not any(map(os.path.exists, ("/etc", "/proc", "/home", "/bin"))),
    "no writing outside": all(
        fails(lambda: open(f"{place}/file", "w")) for place in ("", "/usr", "/usr/lib", "/dev")
    ),
    "scratch directory": os.listdir() == [] and not fails(lambda: open("file", "w").close()),
    "memory limit": resource.getrlimit(resource.RLIMIT_AS)[1] > 0,
    "process limit": resource.getrlimit(resource.RLIMIT_NPROC)[1] > 0,
}))
"""
_LIMITED = ("no new privileges", "scratch directory", "memory limit", "process limit")


@lru_cache(maxsize=len(LEVELS))
def _missing(level: Level) -> str:
    """Return why a level does not hold here, or "" if it does; asked once for each process."""
    if not sys.platform.startswith("linux"):
        return f"it needs Linux, and this is {sys.platform}"
    if level == "none":
        return ""
    # Twice, as the answer is kept: a machine too busy for one probe must not lose every reward.
    return _probe(level) and _probe(level)


def _probe(level: Level) -> str:
    """Run a program that looks for what must not be there; return what it found, or ""."""
    try:
        run = Sandbox(level)._execute(repr((_PROBE, "")), None, "", 20.0)
        facts = json.loads(run.stdout)
    except (SandboxUnavailable, OSError) as error:
        return str(error)
    except ValueError:
        return f"the probe ended with {run.ended} {run.code}: {run.stderr.strip()[-300:]}"
    wanted = [name for name in facts if facts[name] is False]
    if level == "rlimit":
        wanted = [name for name in wanted if name in _LIMITED]
    if level == "namespaces" and facts["pid"] != 1:
        wanted.append("a process namespace")
    if os.geteuid() == 0 and 0 in facts["uids"]:
        wanted.append("an unprivileged user")
    return f"the probe found missing: {', '.join(wanted)}" if wanted else ""


@lru_cache(maxsize=1)
def isolation_level() -> Isolation:
    """Find out which isolation holds here, by running a probe at each level from the strongest.

    Returns:
        The strongest level whose probe found nothing missing, and for each stronger one the reason
        it does not hold. The result is kept for the life of the process.

    Example:
        >>> found = isolation_level()
        >>> found.level == "namespaces" or "namespaces" in found.reasons
        True
    """
    reasons: dict[str, str] = {}
    for level in ("namespaces", "rlimit"):
        reason = _missing(level)
        if not reason:
            return Isolation(level, reasons)
        reasons[level] = reason
    return Isolation("none", reasons)


_warning_lock = threading.Lock()


def _warn_once(message: str) -> None:
    with _warning_lock:
        if message in _warned:
            return
        _warned.add(message)
    warnings.warn(message, RuntimeWarning, stacklevel=4)
