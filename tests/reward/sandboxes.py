"""What tests of the sandbox share: hostile programs, and the demand that namespaces be there."""

import signal
from pathlib import Path

import pytest

from reward.sandbox import isolation_level

HOSTILE = {
    "endless loop": "while True: pass",
    "endless loop in C": "sum(range(10**18))",
    "sleep": "import time; time.sleep(600)",
    "memory": "x = []\nwhile True: x.append(bytearray(1 << 20))",
    "memory in files": """
import os
for number in range(1000):
    fd = os.memfd_create(str(number))
    for _ in range(1000): os.write(fd, bytes(1 << 20))
""",
    "flood of output": "while True: print('x' * 65536)",
    "flood of errors": "import sys\nwhile True: print('x' * 65536, file=sys.stderr)",
    "fork loop": """
import os
while True:
    try: os.fork()
    except OSError: pass
""",
    "threads": """
import threading, time
while True:
    try: threading.Thread(target=time.sleep, args=(600,)).start()
    except RuntimeError: time.sleep(0.01)
""",
    "daemon": """
import os, time
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        for fd in range(3): os.close(fd)
        time.sleep(600)
    os._exit(0)
""",
    "daemon without a death signal": """
import ctypes, os, time
ctypes.CDLL(None).prctl(1, 0, 0, 0, 0)
os.setsid() if os.getpid() != 1 else None
time.sleep(600)
""",
    "network": """
import socket
socket.create_connection(("127.0.0.1", PORT), 5).sendall(b"stolen")
""",
    "abstract socket": """
import socket
s = socket.socket(socket.AF_UNIX); s.connect("\\0MARK"); s.sendall(b"stolen")
""",
    "file outside": """
for path in ("PRECIOUS", "/tmp/MARK", "/dev/shm/MARK", "/MARK", "/usr/lib/MARK", "/root/MARK"):
    try: open(path, "w").write("changed")
    except OSError: pass
""",
    "kill of the parent": """
import os, signal
for pid in (os.getppid(), 1, -1, PARENT, *range(2, 400)):
    try: os.kill(pid, signal.SIGKILL)
    except OSError: pass
""",
    "ignored signals": """
import signal
for number in range(1, 65):
    try: signal.signal(number, signal.SIG_IGN)
    except (OSError, ValueError): pass
while True: pass
""",
    "segmentation fault": "import ctypes; ctypes.string_at(0)",
    "abort": "import os; os.abort()",
    "stdin": "input()",
    "many small files": """
number = 0
while True:
    try: open(str(number), "w").write("x" * 4096)
    except OSError: pass
    number += 1
""",
    "deep directories": """
import os
while True:
    try: os.mkdir("d"); os.chdir("d")
    except OSError: pass
""",
    "new namespaces": """
import ctypes, sys
for flags in (0x10000000, 0x10020000, 0x20000, 0x40000000, 0x20000000):
    if ctypes.CDLL(None).unshare(flags) == 0: sys.exit("a namespace was made")
""",
    "escape from the root": """
import os, sys
for way in (lambda: os.chroot("."), lambda: os.mknod("disk", 0o60666, 0xfe00)):
    try: way()
    except OSError: continue
    sys.exit("it was allowed")
os.chdir("../../../../../..")
if os.path.exists("PRECIOUS") or os.path.exists("/etc/passwd"): sys.exit("outside is there")
""",
    "setuid": """
import os, sys
for user in (0, 1000):
    try: os.setuid(user)
    except OSError: continue
    sys.exit("another user")
""",
}
ENDINGS = {  # those that are no matter of taste
    "endless loop": ("timeout", 0),
    "sleep": ("timeout", 0),
    "flood of output": ("output", 0),
    "fork loop": ("timeout", 0),
    "ignored signals": ("timeout", 0),
    "segmentation fault": ("signal", signal.SIGSEGV),
    "stdin": ("exit", 1),
    "network": ("exit", 1),
    "abstract socket": ("exit", 1),
    "new namespaces": ("exit", 0),
    "escape from the root": ("exit", 0),
    "setuid": ("exit", 0),
    "file outside": ("exit", 0),
    "daemon": ("exit", 0),
}


def asked_for_by_ci() -> bool:
    """Whether the environment pytest was started with has CI; the one of now always has."""
    environment = Path("/proc/self/environ")
    started = environment.read_bytes().split(b"\0") if environment.exists() else []
    return any(entry.startswith(b"CI=") and len(entry) > 3 for entry in started)


def require_namespaces() -> None:
    """Skip where the sandbox cannot be had, but never silently in continuous integration."""
    found = isolation_level()
    if found.level != "namespaces":
        message = f"no namespaces here: {found.reasons}"
        (pytest.fail if asked_for_by_ci() else pytest.skip)(message)


def fenced(program: str) -> str:
    """A completion that gives this program."""
    return f"Here it is:\n```python\n{program}\n```\nDone."
