"""What the tests of the pool have workers do; apart, so that a worker imports nothing else."""

import ctypes
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress

from reward import worker


def double(number: int) -> int:
    return 2 * number


def act(kind: str, number: int) -> object:
    """Behave as told; the number comes back doubled if anything does."""
    if kind == "hang":
        while True:
            pass
    if kind == "sleep":
        time.sleep(60)
    if kind == "exit":
        os._exit(number % 5)
    if kind == "segfault":
        ctypes.string_at(0)
    if kind == "raise":
        raise ValueError(f"number {number}")
    if kind == "tower":
        return 9 ** (20 ** (10**number)) % 7
    if kind == "swell":
        return len([bytearray(64 << 20) for _ in range(1000)])
    return 2 * number


def slow_double(seconds: float, number: int) -> int:
    time.sleep(seconds)
    return 2 * number


def who(_: int) -> int:
    return os.getpid()


def write_everywhere(number: int) -> int:
    """Write to the standard streams, below Python too, and read the input."""
    sys.stdout.write("stdout" * 5000)
    sys.stderr.write("stderr" * 5000)
    os.write(1, b"\x00" * 4096)
    os.write(2, b"\xff" * 4096)
    return number + len(sys.stdin.read())


def exit_python(number: int) -> None:
    sys.exit(f"item {number}")


def interrupt(number: int) -> None:
    raise KeyboardInterrupt(number)


def interrupt_itself(number: int) -> int:
    os.kill(os.getpid(), signal.SIGINT)
    return number


class Awkward(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no text")


def raise_awkward(number: int) -> None:
    raise Awkward(number)


def unpicklable(number: int) -> object:
    return threading.Lock() if number % 2 else number


class OpensBadly:
    """Pickles well, and raises as it is unpickled."""

    def __setstate__(self, state: object) -> None:
        raise ValueError("cannot be opened")


def opens_badly(number: int) -> object:
    value = OpensBadly()
    value.number = number
    return value


def huge(number: int) -> bytes:
    return b"x" * number


def fork(number: int) -> tuple[int, bool]:
    return number, os.fork() == 0


def start_a_process(number: int) -> int:
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    if number:
        time.sleep(60)
    return process.pid


def write_into_the_socket(content: bytes) -> int:
    """Answer in the worker's name."""
    for descriptor in range(3, 30):
        with suppress(OSError):
            os.write(descriptor, content)
    return 1


def cpu_limits(seconds: float) -> tuple[int, int]:
    """Return the limits of two items of one chunk, with CPU time spent between."""
    limit = worker._CpuLimit(0.5)
    limit.arm()
    first = resource.getrlimit(resource.RLIMIT_CPU)[0]
    until = time.process_time() + seconds
    while time.process_time() < until:
        pass
    limit.arm()
    return first, resource.getrlimit(resource.RLIMIT_CPU)[0]


def swell_and_shrink(megabytes: int) -> int:
    keep.append(bytearray(megabytes << 20))
    return os.getpid()


def swell_and_die(megabytes: int) -> None:
    """End as the kernel ends a process when the machine has no memory left."""
    keep.append(bytearray(b"x") * (megabytes << 20))
    os.kill(os.getpid(), signal.SIGKILL)


keep: list[bytearray] = []


def hash_of(text: str) -> int:
    return hash(text)


def loaded(_: int) -> list[str]:
    return [name for name in ("torch", "transformers", "numpy", "asyncio") if name in sys.modules]


def main_module(_: int) -> list[str]:
    return sorted(name for name in vars(sys.modules["__main__"]) if not name.startswith("__"))


def make_a_pool(_: int) -> None:
    from reward.pool import WorkerPool

    WorkerPool(1)


def spin(seconds: float) -> bool:
    until = time.perf_counter() + seconds
    while time.perf_counter() < until:
        pass
    return True
