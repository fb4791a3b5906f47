"""Hostile programs in the sandbox: each contained, ended in time, with nothing left behind."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from reward import sandbox, sandbox_process
from reward.sandbox import Limits, Sandbox, SandboxUnavailable, isolation_level
from tests.reward.sandboxes import ENDINGS, HOSTILE, require_namespaces

ROOT = Path(__file__).resolve().parent.parent.parent
TIMEOUT = 0.6
NOBODY = 65534


@pytest.fixture(scope="module")
def mark() -> Iterator[str]:
    """A word in the environment of every process of the sandbox, and of nothing else."""
    word = f"mark-{os.getpid()}-{time.monotonic_ns()}"
    sandbox_process.close_servers()
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sandbox_process._ENVIRONMENT, "MARK", word)
        yield word
        sandbox_process.close_servers()


def marked(word: str) -> list[int]:
    """Processes of the sandbox below the server."""
    found = []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if entry.name.isdigit() and word.encode() in (entry / "environ").read_bytes():
                found.append(int(entry.name))
    servers = [server._process.pid for server in sandbox_process._servers.values()]
    return [pid for pid in found if pid not in servers]


def left_over(word: str) -> list[int]:
    """Processes still there after the kernel had a moment to end them."""
    for _ in range(20):
        if not marked(word):
            return []
        time.sleep(0.05)
    return marked(word)


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_program_is_contained(name: str, mark: str, tmp_path: Path) -> None:
    require_namespaces()
    precious = tmp_path / "precious"
    precious.write_text("mine")
    precious.chmod(0o666)
    with socket.create_server(("127.0.0.1", 0)) as server, socket.socket(socket.AF_UNIX) as local:
        local.bind(f"\0{mark}")
        local.listen()
        server.settimeout(0)
        local.settimeout(0)
        values = {
            "PORT": server.getsockname()[1],
            "MARK": mark,
            "PRECIOUS": precious,
            "PARENT": os.getpid(),
        }
        program = HOSTILE[name]
        for key, value in values.items():
            program = program.replace(key, str(value))
        ends_by_itself = ENDINGS.get(name, ("timeout", 0))[0] != "timeout"
        timeout = 5.0 if ends_by_itself else TIMEOUT
        start = time.monotonic()
        run = Sandbox().run(program, timeout=timeout)
        seconds = time.monotonic() - start
        for listener in (server, local):
            with pytest.raises(BlockingIOError):
                listener.accept()
    assert seconds < timeout + 1
    assert left_over(mark) == []
    assert precious.read_text() == "mine"
    places = ("/tmp", "/dev/shm", "/", "/usr/lib", "/root")
    assert not [place for place in places if os.path.exists(f"{place}/{mark}")]
    assert run.level == "namespaces"
    assert len(run.stdout) <= 65536 >= len(run.stderr)
    if name in ENDINGS:
        assert (run.ended, run.code) == ENDINGS[name], run


def test_the_check_for_left_over_processes_sees_a_running_program(mark: str) -> None:
    require_namespaces()
    with ThreadPoolExecutor(1) as executor:
        job = executor.submit(Sandbox().run, "import time; time.sleep(600)", timeout=1.5)
        time.sleep(0.5)
        assert len(marked(mark)) == 2  # a launcher and its program
        assert job.result().ended == "timeout"
    assert left_over(mark) == []


def test_a_program_sees_little_of_the_machine() -> None:
    require_namespaces()
    program = "import os; print(os.getpid(), os.getppid(), sorted(os.environ), os.listdir())"
    run = Sandbox().run(program)
    environment = "['HOME', 'LANG', 'OMP_NUM_THREADS', 'OPENBLAS_NUM_THREADS', 'PATH', "
    environment += "'PYTHONHASHSEED', 'TMPDIR']"
    assert run.stdout.replace("'MARK', ", "") == f"1 0 {environment} []\n"
    assert (run.ended, run.code, run.stderr) == ("exit", 0, "")


def test_a_program_has_no_privileges_and_no_descriptors_but_its_three() -> None:
    require_namespaces()
    program = """
import ctypes, os
libc = ctypes.CDLL(None)
data = (ctypes.c_uint32 * 6)()
header = (ctypes.c_uint32 * 2)(0x20080522, 0)
print(libc.capget(header, data), list(data), libc.prctl(39, 0, 0, 0, 0), 0 in os.getresuid())
def is_open(fd):
    try: os.fstat(fd)
    except OSError: return False
    return True
print([fd for fd in range(64) if is_open(fd)])
"""
    assert Sandbox().run(program).stdout.split("\n")[:2] == [
        "0 [0, 0, 0, 0, 0, 0] 1 False",
        "[0, 1, 2]",
    ]


def test_output_is_cut_where_it_is_too_much_and_reports_are_not() -> None:
    require_namespaces()
    small = Sandbox(limits=Limits(output_bytes=10))
    run = small.run("print('x' * 10, end='')")
    assert (run.ended, run.stdout) == ("exit", "x" * 10)
    run = small.run("import time; print('x' * 11, flush=True); time.sleep(9)", timeout=9.0)
    assert (run.ended, run.stdout, run.seconds < 5) == ("output", "x" * 10, True)
    assert '"passed": 1' in small.judge("def f(): return 1", "assert f() == 1", ["f"]).verdict


def test_input_and_output_pass_through() -> None:
    require_namespaces()
    text = "line é\n" * 50_000  # more than a pipe holds
    run = Sandbox().run("import sys; print(len(sys.stdin.read())); sys.exit(3)", stdin=text)
    assert (run.stdout, run.ended, run.code) == (f"{len(text)}\n", "exit", 3)


def test_hashes_of_strings_are_the_same_in_every_run() -> None:
    require_namespaces()
    assert len({Sandbox().run("print(hash('a'))").stdout for _ in range(3)}) == 1


def test_the_scratch_directory_is_empty_and_limited() -> None:
    require_namespaces()
    program = """
import os
open("kept", "w").write("x")
try:
    with open("large", "wb") as file:
        while True: file.write(bytes(1 << 20))
except OSError as error:
    print(error.errno, os.path.getsize("large") <= 2 << 20, sorted(os.listdir()))
"""
    small = Sandbox(limits=Limits(scratch_bytes=2 << 20))
    assert [small.run(program).stdout for _ in range(2)] == ["28 True ['kept', 'large']\n"] * 2


def test_a_directory_can_be_made_readable(tmp_path: Path) -> None:
    require_namespaces()
    tmp_path.chmod(0o755)  # those above it may stay closed: it is mounted, not walked to
    (tmp_path / "extra_module.py").write_text("value = 7\n")
    program = "import extra_module; print(extra_module.value)"
    readable = Sandbox(readable=(str(tmp_path),))
    assert readable.run(program).stdout == "7\n"
    assert Sandbox().run(program).code == 1
    assert readable.run(f"open({str(tmp_path / 'new')!r}, 'w')").code == 1


def test_runs_at_once_do_not_share_limits_or_files() -> None:
    require_namespaces()
    program = """
import os, time
children = 0
try:
    while True:
        if os.fork() == 0: time.sleep(5); os._exit(0)
        children += 1
except OSError: pass
open("mine", "w").close()
print(children, os.listdir())
"""
    with ThreadPoolExecutor(4) as executor:
        runs = list(executor.map(lambda _: Sandbox().run(program), range(4)))
    expected = "15 ['mine']\n" if os.geteuid() == 0 else runs[0].stdout
    assert [run.stdout for run in runs] == [expected] * 4


def test_the_probe_says_which_level_holds() -> None:
    require_namespaces()
    found = isolation_level()
    assert (found.level, found.reasons) == ("namespaces", {})


def test_where_namespaces_are_missing_it_says_so_and_refuses(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = {"namespaces": "unshare pid: Operation not permitted", "rlimit": ""}
    monkeypatch.setattr(sandbox, "_missing", found.get)
    monkeypatch.setattr(sandbox, "isolation_level", isolation_level.__wrapped__)
    assert sandbox.isolation_level().level == "rlimit"
    assert sandbox.isolation_level().reasons == {"namespaces": found["namespaces"]}
    with pytest.raises(SandboxUnavailable, match=r"does not hold here \(unshare pid: Op.*by name"):
        Sandbox().run("pass")


def test_an_unknown_level_is_refused() -> None:
    with pytest.raises(ValueError, match="got isolation='docker', need one of namespaces"):
        Sandbox(isolation="docker")  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("level", ["rlimit", "none"])
def test_a_weak_level_warns_once(level: sandbox.Level, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "_warned", set())
    if level == "rlimit" and sandbox._missing(level):
        pytest.skip(f"no rlimit here: {sandbox._missing(level)}")
    weak = Sandbox(isolation=level)
    with pytest.warns(RuntimeWarning, match=f"isolation level '{level}'"):
        first = weak.run("print(input())", stdin="1")
    second = weak.run("print(input())", stdin="2")
    assert (first.stdout, second.stdout, second.level) == ("1\n", "2\n", level)


@pytest.mark.filterwarnings("ignore:programs run at isolation level:RuntimeWarning")
@pytest.mark.parametrize("name", ["daemon", "fork loop", "ignored signals"])
def test_without_namespaces_nothing_is_left_either(name: str, mark: str) -> None:
    if sandbox._missing("rlimit"):
        pytest.skip(f"no rlimit here: {sandbox._missing('rlimit')}")
    start = time.monotonic()
    Sandbox(isolation="rlimit").run(HOSTILE[name], timeout=TIMEOUT)
    assert time.monotonic() - start < TIMEOUT + 1
    assert left_over(mark) == []


def test_a_server_that_was_killed_is_replaced(mark: str) -> None:
    require_namespaces()
    Sandbox().run("pass")
    for server in sandbox_process._servers.values():
        os.kill(server._process.pid, signal.SIGKILL)
    time.sleep(0.1)
    assert Sandbox().run("print(1)").stdout == "1\n"


def test_a_fork_of_this_process_gets_a_server_of_its_own(mark: str) -> None:
    require_namespaces()
    script = """
import os, sys
from reward.sandbox import Sandbox
print(Sandbox().run("print(1)").stdout.strip(), flush=True)
child = os.fork()
print(Sandbox().run("print(2)").stdout.strip(), flush=True)
if child: os.waitpid(child, 0)
"""
    run = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert (sorted(run.stdout.split()), run.stderr) == (["1", "2", "2"], "")


def test_nothing_outlives_a_parent_that_is_killed(mark: str) -> None:
    require_namespaces()
    script = """
from reward import sandbox_process
from reward.sandbox import Sandbox
sandbox_process._ENVIRONMENT["MARK"] = "WORD"
print("started", flush=True)
Sandbox().run("import ctypes, time; ctypes.CDLL(None).prctl(1, 0); time.sleep(600)", timeout=60)
"""
    command = [sys.executable, "-c", script.replace("WORD", f"{mark}-child")]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        parent.stdout.readline()
        for _ in range(100):
            if len(marked(f"{mark}-child")) == 3:  # a server, a launcher and a program
                break
            time.sleep(0.05)
        assert len(marked(f"{mark}-child")) == 3
        parent.kill()
    time.sleep(0.5)
    assert left_over(f"{mark}-child") == []


@pytest.fixture
def public_path() -> Iterator[Path]:
    """A directory that every user can read; those of pytest are its own user's."""
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        yield Path(name)


def test_an_ordinary_user_gets_namespaces_too(public_path: Path) -> None:
    require_namespaces()
    interpreter = "/usr/bin/python3"
    script = """
import sys
sys.path.insert(0, sys.argv[1])
from reward.sandbox import Sandbox, isolation_level
found = isolation_level()
print(found.level, found.reasons.get("namespaces", ""))
if found.level == "namespaces":
    print(Sandbox().run("import os; print(os.getpid(), os.getuid())").stdout)
    print(Sandbox().judge("def f(x): return x", "assert f(1) == 1", ["f"]).verdict)
"""
    check = "import sys; sys.exit(sys.version_info < (3, 11))"
    if os.geteuid() != 0 or subprocess.run([interpreter, "-c", check], check=False).returncode:
        pytest.skip("needs root to become another user, and an interpreter all can read")
    package = public_path / "reward"
    package.mkdir()
    for path in (ROOT / "reward").glob("*.py"):
        if path.stem.startswith("sandbox") or path.stem in ("judge", "solution_runner"):
            (package / path.name).write_bytes(path.read_bytes())
    (package / "__init__.py").touch()
    run = subprocess.run(
        [interpreter, "-B", "-c", script, str(public_path)],
        capture_output=True,
        text=True,
        user=NOBODY,
        group=NOBODY,
        extra_groups=[],
        cwd="/",
        check=False,
    )
    lines = run.stdout.split("\n")
    assert run.stderr == ""
    if "user" in lines[0] and lines[0].startswith(("rlimit", "none")):
        pytest.skip(f"ordinary users get none: {lines[0]}")
    assert lines[:2] == ["namespaces ", f"1 {NOBODY}"]
    assert '"passed": 1' in run.stdout


def test_threads_may_run_programs_at_once_and_fast_enough() -> None:
    require_namespaces()
    Sandbox().run("pass")
    cores = len(os.sched_getaffinity(0))
    rates: list[float] = []
    while len(rates) < 6 and max(rates, default=0) < 40:
        start = time.monotonic()
        with ThreadPoolExecutor(min(4, cores)) as executor:
            runs = list(executor.map(lambda n: Sandbox().run(f"print({n})"), range(60)))
        rates.append(60 / (time.monotonic() - start))
        assert [run.stdout for run in runs] == [f"{n}\n" for n in range(60)]
    assert max(rates) >= 40  # the best of six: others may use the machine
