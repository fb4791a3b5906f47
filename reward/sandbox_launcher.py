# SPDX-License-Identifier: Apache-2.0
"""Child side of `reward.sandbox`: builds the walls, gives up every privilege, runs the program.

Nothing of this file runs in the process that asks for a sandbox. The tree is server -> launcher ->
program, or server -> launcher -> judge -> program:

- the server is a fresh interpreter that only forks launchers, which is faster than starting one for
  each program. It reads neither programs nor tests;
- the launcher keeps the wall-clock limit and ends everything below it. It reads none either;
- the judge, if there is one, is the first process of a PID namespace and runs trusted tests;
- the program is the first process of a PID namespace of its own. It is forked before the judge
  reads its tests, so their text is nowhere in its memory, and it gives up all privileges before it
  reads the first byte of the program.

The processes stay in one interpreter instead of starting another after privileges are gone: an
interpreter under a home directory of mode 700 cannot be started by nobody, but it can be kept.
Modules imported later come from read-only bind mounts, which are made while that is allowed.
"""

import ast
import ctypes
import gc
import os
import platform
import resource
import select
import signal
import socket
import struct
import sys
import time
from collections.abc import Callable
from typing import Any

from reward import judge, solution_runner

CLONE_NEWNS, CLONE_NEWUTS, CLONE_NEWIPC = 0x00020000, 0x04000000, 0x08000000
CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET = 0x10000000, 0x20000000, 0x40000000
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC = 1, 2, 4, 8
MS_REMOUNT, MS_BIND, MS_REC, MS_PRIVATE = 32, 4096, 16384, 1 << 18
MNT_DETACH = 2
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_CHILD_SUBREAPER, PR_SET_NO_NEW_PRIVS = 1, 4, 36, 38
CAPABILITY_VERSION_3 = 0x20080522
MOUNT_SETATTR, AT_RECURSIVE, MOUNT_ATTR_LOCKED = 442, 0x8000, 1 | 2 | 4  # read-only, nosuid, nodev
PIVOT_ROOT = {"x86_64": 155, "aarch64": 41, "riscv64": 41, "ppc64le": 203, "s390x": 217}

NOBODY = 65534
FIRST_UID, UIDS = 1_900_000_000, 2 * 4_194_304  # two for every process number there can be
LIBRARIES = ("/usr/lib", "/usr/lib64", "/lib", "/lib64")
DEVICES = ("/dev/null", "/dev/zero", "/dev/urandom")
MOUNT_POINTS = ("/mnt", "/srv", "/media", "/opt", "/var/tmp", "/tmp", "/proc")
SCRATCH = "/scratch"

Options = dict[str, Any]
_libc = ctypes.CDLL(None, use_errno=True)


def _check(result: int, what: str) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")


def _mount(source: str, target: str, kind: str = "", flags: int = 0, data: str = "") -> None:
    pointers = [text.encode() or None for text in (source, target, kind, data)]
    result = _libc.mount(*pointers[:3], ctypes.c_ulong(flags), pointers[3])
    _check(result, f"mount {kind or source} on {target}")


def _prctl(option: int, value: int) -> None:
    zero = ctypes.c_ulong(0)
    _check(_libc.prctl(option, ctypes.c_ulong(value), zero, zero, zero), f"prctl {option}")


def _unshare(flags: int, what: str) -> None:
    _check(_libc.unshare(flags), f"unshare {what}")


def _enter_user_namespace() -> None:
    """Become 65534 in a new user namespace, with the right to make the other namespaces."""
    uid, gid = os.geteuid(), os.getegid()
    _unshare(CLONE_NEWUSER, "user")
    for name, text in (
        ("setgroups", "deny"),
        ("uid_map", f"{NOBODY} {uid} 1"),
        ("gid_map", f"{NOBODY} {gid} 1"),
    ):
        with open(f"/proc/self/{name}", "w") as file:
            file.write(text)


def _read_only_paths(readable: list[str]) -> list[str]:
    """What a program may read: shared libraries, the standard library, what the caller adds."""
    paths: list[str] = []
    for path in (*LIBRARIES, os.path.join(sys.base_prefix, "lib"), *readable):
        covered = any(path == known or path.startswith(f"{known}/") for known in paths)
        if os.path.exists(path) and not covered:
            paths.append(path)
    return paths


def _bind(path: str, root: str) -> None:
    """Make one path of the machine appear, read-only, under the new root."""
    target = root + path
    if os.path.islink(path):
        os.symlink(os.readlink(path), target)
        return
    if os.path.isdir(path):
        os.makedirs(target, exist_ok=True)
    else:
        os.makedirs(os.path.dirname(target), exist_ok=True)
        open(target, "w").close()
    _mount(path, target, flags=MS_BIND | MS_REC)
    if path in DEVICES:
        return
    attributes = struct.pack("=QQQQ", MOUNT_ATTR_LOCKED, 0, 0, 0)
    if _libc.syscall(MOUNT_SETATTR, -100, target.encode(), AT_RECURSIVE, attributes, 32) != 0:
        _mount("", target, flags=MS_REMOUNT | MS_BIND | MS_RDONLY | MS_NOSUID | MS_NODEV)


def _enter_root(options: Options, uid: int, gid: int) -> None:
    """Replace the file system by read-only libraries and one small writable directory.

    There is no /proc, no /etc, no program to start. The last step is a chroot below the new root:
    the kernel refuses user namespaces to a process whose root is not that of its mount namespace,
    so a program cannot get capabilities back by making one.
    """
    number = PIVOT_ROOT.get(platform.machine())
    if number is None:
        raise OSError(f"pivot_root: its number on {platform.machine()} is not known here")
    paths = _read_only_paths(options["readable"])
    free = [
        place
        for place in MOUNT_POINTS
        if os.path.isdir(place) and not any(f"{path}/".startswith(f"{place}/") for path in paths)
    ]
    if not free:
        raise OSError(f"none of {', '.join(MOUNT_POINTS)} is there to mount a new root on")
    place, flags = free[0], MS_NOSUID | MS_NODEV
    _mount("none", "/", flags=MS_REC | MS_PRIVATE)
    _mount("tmpfs", place, "tmpfs", flags, "size=1m,nr_inodes=256,mode=755")
    inner = f"{place}/root"
    os.mkdir(inner)
    for path in (*paths, *DEVICES):
        _bind(path, inner)
    os.mkdir(inner + SCRATCH)
    size, files = options["scratch_bytes"], options["scratch_files"]
    data = f"size={size},nr_inodes={files},mode=700,uid={uid},gid={gid}"
    _mount("tmpfs", inner + SCRATCH, "tmpfs", flags | MS_NOEXEC, data)
    _mount("", place, flags=MS_REMOUNT | MS_BIND | MS_RDONLY | flags)
    os.chdir(place)
    _check(_libc.syscall(number, b".", b"."), "pivot_root")
    _check(_libc.umount2(b".", MNT_DETACH), "umount of the old root")
    os.chroot("/root")
    os.chdir("/")


def _set_limits(limits: dict[str, int]) -> None:
    for name, value in limits.items():
        kind = getattr(resource, f"RLIMIT_{name}")
        hard = resource.getrlimit(kind)[1]
        bound = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(kind, (bound, bound))


def _drop_privileges(uid: int | None) -> None:
    """Become an unprivileged user without capabilities, and without a way to get any."""
    if uid is not None:
        os.setgroups([])
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)
    _prctl(PR_SET_NO_NEW_PRIVS, 1)
    header, empty = struct.pack("=Ii", CAPABILITY_VERSION_3, 0), bytes(24)
    _check(_libc.capset(header, empty), "capset")
    _prctl(PR_SET_DUMPABLE, 0)
    _prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # after the change of user, which clears it


def _choose_uid() -> int:
    """Two uids that no other sandbox has now, so that limits on processes are not shared.

    In a container whose root is mapped to few uids it is nobody and the one before, for all.
    """
    with open("/proc/self/uid_map") as file:
        ranges = [[int(word) for word in line.split()] for line in file]
    if any(start <= FIRST_UID and start + n >= FIRST_UID + UIDS for start, _, n in ranges):
        return FIRST_UID + 2 * os.getpid()
    return NOBODY - 1


def _read_all(fd: int) -> bytes:
    with os.fdopen(fd, "rb") as file:
        return file.read()


def _be_program(options: Options, setup: int, channel: int | None) -> None:
    """Give up all privileges, then read the program and run it. Does not return."""
    os.chdir(options["scratch"])
    if options["level"] != "none":
        _set_limits(options["limits"])
        _drop_privileges(options["uid"])
    for fd in (options["status"], *(options["judge"] or ())):
        os.close(fd)
    payload = _read_all(options["payload"]).decode("utf-8", "surrogatepass")
    os.environ.update(HOME=options["scratch"], TMPDIR=options["scratch"])
    sys.path[:0] = options["readable"]
    os.close(setup)
    solution_runner.run(payload, channel)


def _be_judge(options: Options, setup: int) -> None:
    """Fork the program into a namespace of its own, then judge it. Does not return."""
    ours, theirs = socket.socketpair()
    if options["level"] == "namespaces":
        _unshare(CLONE_NEWPID, "pid")
    program = os.fork()
    if program == 0:
        ours.close()
        _run_or_report(lambda: _be_program(options, setup, theirs.detach()), setup)
    theirs.close()
    os.close(options["payload"])
    os.close(options["status"])
    null = os.open(os.devnull, os.O_RDWR)
    for fd in (0, 1, 2):
        os.dup2(null, fd)
    if options["level"] != "none":
        _set_limits(options["judge_limits"])
        _drop_privileges(None if options["uid"] is None else options["uid"] + 1)
    payload_fd, verdict_fd = options["judge"]
    payload = _read_all(payload_fd).decode("utf-8", "surrogatepass")
    os.close(setup)
    judge.run(payload, ours.detach(), verdict_fd, program)


def _run_or_report(function: Callable[[], None], setup: int) -> None:
    """Run one process to its end; what fails while the walls are built goes to the launcher."""
    try:
        function()
        code = 0
    except OSError as error:
        code = 125
        try:
            os.write(setup, str(error)[:400].encode())
        except OSError:
            code = 1  # the walls stood: the program itself failed
    except SystemExit:
        raise  # a script has ended: the interpreter flushes, and calls what was registered
    except BaseException as error:
        code = 1
        sys.excepthook(type(error), error, error.__traceback__)
    os._exit(code)  # no second copy of the launcher's own work


def _start(options: Options, setup: int) -> None:
    """Be the first process below the launcher. Does not return."""
    _prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if options["level"] == "namespaces":
        with open("/proc/self/oom_score_adj", "w") as file:
            file.write("1000")  # if memory runs out, the kernel ends this and not the trainer
        _unshare(CLONE_NEWNS | CLONE_NEWNET | CLONE_NEWIPC | CLONE_NEWUTS, "mount, net, ipc, uts")
        _check(_libc.sethostname(b"sandbox", 7), "sethostname")
        uid = NOBODY if options["uid"] is None else options["uid"]
        _enter_root(options, uid, uid)
    if options["judge"] is None:
        _be_program(options, setup, None)
    else:
        _be_judge(options, setup)


def _end_user(uid: int) -> None:
    """End every process of a user, in one system call that no fork loop can outrun."""
    helper = os.fork()
    if helper == 0:
        os.setresuid(uid, uid, uid)
        try:
            os.kill(-1, signal.SIGKILL)  # all that this user may signal, but not this process
        finally:
            os._exit(0)
    os.waitpid(helper, 0)


def _end_descendants(uid: int | None) -> None:
    """Without a PID namespace: end what is left of the program, daemons included."""
    if uid is not None and uid >= FIRST_UID:  # nobody else is one of these two users
        _end_user(uid)
        _end_user(uid + 1)
    me = os.getpid()
    while True:
        with open(f"/proc/{me}/task/{me}/children") as file:
            children = [int(word) for word in file.read().split()]
        if not children:
            return
        for child in children:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)


def _wait(child: int, leash: int, seconds: float) -> str:
    """Wait for the first process; end it, and so its namespace, when its time is over.

    It is over too when the other end of the leash is closed: the parent wants no more of it, or is
    itself gone, however it went.
    """
    handle = os.pidfd_open(child)
    poll = select.poll()
    poll.register(handle, select.POLLIN)
    poll.register(leash, select.POLLIN)
    ready = [fd for fd, _ in poll.poll(max(seconds, 0.0) * 1000)]
    if handle not in ready:
        os.kill(child, signal.SIGKILL)  # it is not reaped yet, so the number is still its own
    _, status = os.waitpid(child, 0)
    return str(os.waitstatus_to_exitcode(status)) if handle in ready else "timeout"


def _begin(options: Options) -> int:
    """Fork the first process; returns its number in the launcher and 0 in itself."""
    _prctl(PR_SET_CHILD_SUBREAPER, 1)
    root = os.geteuid() == 0
    options["uid"] = _choose_uid() if root and options["level"] != "none" else None
    if options["level"] == "namespaces":
        options["scratch"] = SCRATCH
        if not root:
            _enter_user_namespace()
        _unshare(CLONE_NEWPID, "pid")
    elif options["uid"] is not None:
        os.chown(options["scratch"], options["uid"], options["uid"])
    return os.fork()


def launch(options: Options, leash: int) -> None:
    """Run one sandbox to its end and report on the status descriptor.

    Args:
        options: What `reward.sandbox` asks for, and the descriptors.
        leash: Reading end of a pipe; the sandbox is ended when the other end is closed.
    """
    ready, setup = os.pipe()
    try:
        child = _begin(options)
    except OSError as error:
        os.write(options["status"], f"setup {error}".encode())
        return
    if child == 0:
        os.close(ready)
        os.close(leash)
        _run_or_report(lambda: _start(options, setup), setup)
    os.close(setup)
    ended = _wait(child, leash, options["deadline"] - time.monotonic())
    if options["level"] != "namespaces":
        _end_descendants(options["uid"])
    failure = os.read(ready, 1000).decode("utf-8", "replace")
    report = f"setup {failure}" if failure else f"ended {ended}"
    os.write(options["status"], report.encode())


def _serve_one(data: bytes, fds: list[int]) -> None:
    """In a fork of the server: take the descriptors as ours, and launch."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    options: Options = ast.literal_eval(data.decode())
    for number in range(3):
        os.dup2(fds[number], number)
        os.close(fds[number])
    leash, options["status"], options["payload"], *judged = fds[3:]
    options["judge"] = judged or None
    launch(options, leash)


def serve(fd: int) -> None:
    """Fork a launcher for every request, until the parent is gone.

    Args:
        fd: A socket. A request is a dictionary, as a Python literal, with the descriptors of
            standard input, output and error, leash, status, program and, for a judge, of the tests
            and the verdict.
    """
    parent = os.getppid()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # launchers need no reaping
    gc.freeze()
    with socket.socket(fileno=fd) as connection:
        connection.send(b"ready")
        connection.settimeout(2.0)
        while os.getppid() == parent:  # a fork of the parent may hold its end of the socket open
            try:
                data, fds, _, _ = socket.recv_fds(connection, 1 << 16, 8)
            except TimeoutError:
                continue
            if not data:
                return
            if os.fork() == 0:
                connection.close()
                _run_or_report(lambda data=data, fds=fds: _serve_one(data, fds), fds[4])
            for given in fds:
                os.close(given)
