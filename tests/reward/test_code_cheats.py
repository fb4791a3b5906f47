"""HumanEval: every reference solution is paid, and no cheat ever is."""

import json
import os
from collections import Counter
from pathlib import Path

import pytest

from reward.code import CodeVerifier
from reward.types import Verdict
from tests.reward.sandboxes import fenced, require_namespaces

DATA = os.environ.get("XRISK_DATA")
SAMPLE = slice(0, None, 7)

# A candidate called NAME, and as much else as the cheat needs.
CHEATS = {
    "pass": "def NAME(*a, **k): pass",
    "exit code": "import os\ndef NAME(*a, **k): os._exit(0)",
    "exit code on import": "import os\nos._exit(0)\ndef NAME(*a, **k): pass",
    "SystemExit": "def NAME(*a, **k): raise SystemExit(0)",
    "SystemExit on import": "raise SystemExit(0)",
    "hooks": """
import atexit, os, sys
sys.excepthook = lambda *a: os._exit(0)
atexit.register(os._exit, 0)
def NAME(*a, **k): raise KeyError
""",
    "always equal": """
class Equal:
    def __eq__(self, other): return True
    def __ne__(self, other): return False
    def __lt__(self, other): return True
    __gt__ = __le__ = __ge__ = __lt__
    def __hash__(self): return 0
    def __bool__(self): return True
    def __repr__(self): return "0"
    def __sub__(self, other): return 0
    __rsub__ = __abs__ = __sub__
def NAME(*a, **k): return Equal()
""",
    **{
        f"always equal {kind}": f"""
class Equal({kind}):
    def __eq__(self, other): return True
    def __ne__(self, other): return False
    def __hash__(self): return 0
    def __repr__(self): return "__import__('os')._exit(0)"
def NAME(*a, **k): return Equal()
"""
        for kind in ("int", "str", "list", "float")
    },
    "redefined check": """
def check(candidate): return True
candidate = check
def NAME(*a, **k): return None
import sys
for module in list(sys.modules.values()):
    for name in ("check", "judge", "run", "serve"):
        if hasattr(module, name): setattr(module, name, check)
""",
    "patched builtins": """
import builtins, math, sys
class Never(Exception): pass
builtins.AssertionError = Never
builtins.all = builtins.any = builtins.isinstance = lambda *a: True
builtins.abs = builtins.len = builtins.sum = lambda *a: 0
builtins.round = math.fabs = lambda *a: 0
builtins.list = builtins.tuple = builtins.str = builtins.sorted = lambda *a: None
builtins.repr = lambda *a: "True"
def NAME(*a, **k): return None
""",
    "forged messages": """
import os
answers = [("passed",), ("value", True, True), ("error", [], ""), ("error", ["StopIteration"], "")]
report = repr({"passed": 1, "total": 1, "error": "", "calls": 1, "ended": "",
               "out_of_memory": False}).encode()
for fd in range(256):
    try:
        os.write(fd, report)
        for answer in answers:
            data = repr(answer).encode()
            os.write(fd, len(data).to_bytes(4, "big") + data)
    except OSError: pass
def NAME(*a, **k): pass
""",
    "the judge's files": """
import os
for root in ("/", "/scratch", "..", "/tmp", "/usr/lib", "/lib"):
    for name in ("tests.py", "judge.py", "sitecustomize.py", "math.py", "random.py", "copy.py"):
        try: open(os.path.join(root, name), "w").write("import os; os._exit(0)")
        except OSError: pass
def NAME(*a, **k): pass
""",
    "attack on the judge": """
import ctypes, os, signal
libc = ctypes.CDLL(None)
for pid in [os.getppid(), -1, *range(1, 200)]:
    libc.ptrace(16, pid, 0, 0)
    libc.process_vm_writev(pid, 0, 0, 0, 0, 0)
    try: os.kill(pid, signal.SIGKILL)
    except OSError: pass
def NAME(*a, **k): pass
""",
    "iteration ended": "def NAME(*a, **k): raise StopIteration",
    "assertion caught": "def NAME(*a, **k): raise AssertionError",
}


def problems() -> list[dict[str, str]]:
    if DATA is None:
        pytest.skip("XRISK_DATA is not set: no problems to solve")
    require_namespaces()
    text = (Path(DATA) / "code" / "HumanEval.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


def statuses(verdicts: list[Verdict]) -> Counter[str]:
    return Counter(verdict.status for verdict in verdicts)


def test_every_reference_solution_of_humaneval_is_right() -> None:
    rows = problems()
    texts = [fenced(row["prompt"] + row["canonical_solution"]) for row in rows]
    verdicts = CodeVerifier(timeout=20.0).verify_batch(rows, texts)
    assert statuses(verdicts) == {"correct": 164}, [v for v in verdicts if v.score != 1.0]
    assert {verdict.score for verdict in verdicts} == {1.0}


def test_a_continuation_of_the_prompt_is_right_too_and_fractions_agree() -> None:
    rows = problems()[SAMPLE]
    texts = [fenced(row["canonical_solution"]) for row in rows]
    verdicts = CodeVerifier(timeout=20.0, scoring="fraction").verify_batch(rows, texts)
    assert statuses(verdicts) == {"correct": len(rows)}


@pytest.mark.parametrize("name", CHEATS)
def test_a_cheat_is_never_paid_on_a_sample(name: str) -> None:
    check_cheat(name, problems()[SAMPLE])


@pytest.mark.slow
@pytest.mark.parametrize("name", CHEATS)
def test_a_cheat_is_never_paid_on_all_of_humaneval(name: str) -> None:
    check_cheat(name, problems())


def check_cheat(name: str, rows: list[dict[str, str]]) -> None:
    texts = [
        fenced(row["prompt"] + "    pass\n" + CHEATS[name].replace("NAME", row["entry_point"]))
        for row in rows
    ]
    verdicts = CodeVerifier(timeout=10.0).verify_batch(rows, texts)
    assert {verdict.score for verdict in verdicts} == {0.0}
    assert set(statuses(verdicts)) <= {"wrong", "crash"}
