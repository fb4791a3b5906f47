"""Programs as answers: right ones are paid, cheats are not, and every ending has its status."""

import json
import pickle

import pytest

from reward import code, sandbox
from reward.code import CodeVerifier, code_reward
from tests.reward.sandboxes import fenced, require_namespaces

ADD = {
    "test": "def check(f):\n    assert f(1, 2) == 3\n    assert f(2, 2) == 4",
    "entry_point": "add",
}


@pytest.mark.parametrize(
    ("program", "status", "detail"),
    [
        ("def add(a, b): return a + b", "correct", "1 of 1 passed; isolation namespaces"),
        ("def add(a, b): return 3", "wrong", "AssertionError"),
        ("def add(a, b): return 1 / 0", "wrong", "ZeroDivisionError: division by zero"),
        ("def other(): pass", "wrong", "NameError: the program defines no add"),
        ("def add(a, b) return", "wrong", "SyntaxError"),
        ("def add(a, b):\n    while True: pass", "timeout", "over 1 s"),
        ("while True: pass", "timeout", "over 1 s"),
        ("import time; time.sleep(99)", "timeout", "over 1 s"),
        ("def add(a, b): return bytearray(1 << 40)", "oom", "MemoryError"),
        ("import ctypes; ctypes.string_at(0)", "crash", "SIGSEGV"),
        ("import os\ndef add(a, b): os._exit(0)", "crash", "ended with exit 0"),
        ("def add(a, b): return 'x' * (1 << 20)", "wrong", "TooLarge: a value of 1048"),
        ("def add(a, b): return object()", "wrong", "NotLiteral: a value of type object"),
        ("x = add = lambda a, b: a + b\nx = [x]; x.append(x)", "correct", ""),
        ("def add(a, b):\n    x = []\n    x.append(x)\n    return x", "wrong", "nested more"),
        ("print('noise' * 10**6)\ndef add(a, b): print('x'); return a + b", "correct", ""),
        ("def add(a, b): raise type('Mine', (ValueError,), {})('no')", "wrong", "Mine: no"),
        ("#" * 70_000, "too_long", "70001 characters"),
        ("", "no_answer", "no closed block"),
        ("x = '\0'", "wrong", ""),
        ("x = '\ud800'\ndef add(a, b): return a + b", "wrong", "Unicode"),
    ],
)
def test_every_ending_has_its_status(program: str, status: str, detail: str) -> None:
    require_namespaces()
    verdict = CodeVerifier(timeout=1.0).verify(ADD, fenced(program))
    assert (verdict.status, verdict.score) == (status, float(status == "correct")), verdict
    assert detail in verdict.detail
    assert verdict.seconds < 2.0


def test_only_the_values_cross_and_equal_ones_are_equal() -> None:
    require_namespaces()
    program = """
from collections import Counter, OrderedDict, namedtuple, defaultdict
from enum import IntEnum
def f(kind):
    class Colour(IntEnum): RED = 3
    return {
        "counter": Counter("aab"), "ordered": OrderedDict(a=1),
        "point": namedtuple("P", "x y")(1, 2),
        "default": defaultdict(list, a=[1]), "frozen": frozenset({1}), "enum": Colour.RED,
        "huge": 10**5000, "nan": float("nan"), "inf": [-float("inf")], "bytes": bytearray(b"x"),
        "complex": 1+2j, "empty": (set(), {}, (), []), "text": "é\\x00\\ud800",
    }[kind]
"""
    tests = """
assert f("counter") == {"a": 2, "b": 1}
assert f("ordered") == {"a": 1} and f("point") == (1, 2) and f("default") == {"a": [1]}
assert f("frozen") == {1} and f("enum") == 3 and type(f("enum")) is int
assert f("huge") == 10**5000 and f("nan") != f("nan") and f("inf") == [-float("inf")]
assert f("bytes") == b"x" and f("complex") == 1+2j and f("empty") == (set(), {}, (), [])
assert f("text") == "é\\x00\\ud800"
"""
    verdict = CodeVerifier().verify({"test": tests, "entry_point": "f"}, fenced(program))
    assert verdict.score == 1.0, verdict.detail


def test_the_program_does_not_have_the_tests() -> None:
    require_namespaces()
    program = """
import gc, sys
def f():
    frames, frame = [], sys._getframe()
    while frame: frames.append(repr(frame.f_locals)); frame = frame.f_back
    seen = [x for x in map(str, gc.get_objects() + frames) if "4711" in x and "_getframe" not in x]
    return len(seen)
"""
    gold = {"test": "assert f() == 0, 'secret 4711'", "entry_point": "f"}
    assert CodeVerifier().verify(gold, fenced(program)).status == "correct"


def test_the_program_has_no_descriptor_of_the_judge() -> None:
    require_namespaces()
    program = """
import os, stat
def f():
    found = []
    for fd in range(64):
        try: found.append(stat.S_IFMT(os.fstat(fd).st_mode))
        except OSError: pass
    return [stat.S_ISSOCK(kind) for kind in found]
"""
    gold = {"test": "assert f() == [False, False, False, True]", "entry_point": "f"}
    assert CodeVerifier().verify(gold, fenced(program)).status == "correct"


def test_the_tests_use_helpers_of_the_prompt_and_not_of_the_program() -> None:
    require_namespaces()
    prompt = "def double(x):\n    return 2 * x\n\ndef halve(x):\n    '''Undo double.'''\n"
    gold = {
        "prompt": prompt,
        "entry_point": "halve",
        "test": "def check(f):\n    assert f(double(4)) == 4",
    }
    right = "def halve(x): return x // double(1)"
    forged = "def double(x): return 4\ndef halve(x): return 4 if x == 4 else 0"
    verdicts = CodeVerifier().verify_batch([gold] * 2, [fenced(right), fenced(forged)])
    assert [verdict.score for verdict in verdicts] == [1.0, 0.0]


def test_several_functions_may_be_tested() -> None:
    require_namespaces()
    gold = {"test": "assert decode(encode('a')) == 'a'", "entry_point": ["decode", "encode"]}
    program = "def encode(x): return x + 'x'\ndef decode(x): return x[:-1]"
    assert CodeVerifier().verify(gold, fenced(program)).score == 1.0


def test_exceptions_keep_their_class_where_tests_expect_one() -> None:
    require_namespaces()
    tests = "try:\n    f()\nexcept ValueError as e:\n    assert str(e) == 'no'\nelse:\n    assert 0"
    gold = {"test": tests, "entry_point": "f"}
    texts = [f"def f(): {body}" for body in ("raise ValueError('no')", "pass", "raise KeyError")]
    verdicts = CodeVerifier().verify_batch([gold] * 3, [fenced(text) for text in texts])
    assert [verdict.score for verdict in verdicts] == [1.0, 0.0, 0.0]


def test_a_test_that_swallows_everything_does_not_pay_a_program_that_is_gone() -> None:
    require_namespaces()
    gold = {"test": "try:\n    f()\nexcept:\n    pass\nassert True", "entry_point": "f"}
    texts = [fenced("import os\ndef f(): os._exit(0)"), fenced("def f(): pass")]
    verdicts = CodeVerifier().verify_batch([gold] * 2, texts)
    assert [verdict.status for verdict in verdicts] == ["crash", "correct"]


def test_a_stop_of_iteration_does_not_skip_what_remains() -> None:
    require_namespaces()
    gold = {"test": "assert all(map(f, range(3)))", "entry_point": "f"}
    program = "def f(x):\n    raise StopIteration"
    assert CodeVerifier().verify(gold, fenced(program)).score == 0.0


def test_fractions_count_asserts_but_not_constant_ones() -> None:
    require_namespaces()
    tests = """
def check(f):
    assert True
    assert f(1) == 1
    assert f(2) == 2, "message"
    for x in range(3):
        assert f(x) == x
    assert f(4) == 4
"""
    gold = {"test": tests, "entry_point": "f"}
    bodies = {
        "return x": 1.0,
        "return 1": 0.25,
        "return x if x else 7": 0.75,
        "return x if x != 2 else [][0]": 0.5,
        "import os; os._exit(0)": 0.0,
        "import os; return x if x < 2 else os._exit(0)": 0.25,
    }
    texts = [fenced(f"def f(x):\n    {body}") for body in bodies]
    verdicts = CodeVerifier(scoring="fraction").verify_batch([gold] * len(texts), texts)
    assert [verdict.score for verdict in verdicts] == list(bodies.values())
    strict = CodeVerifier().verify_batch([gold] * len(texts), texts)
    assert [verdict.score for verdict in strict] == [1.0, 0.0, 0.0, 0.0, 0.0, 0.0]


@pytest.mark.parametrize(
    ("gold", "message"),
    [
        (None, "type NoneType"),
        ("not json", "no JSON"),
        ({}, "has no 'test'"),
        ({"test": "assert f() == 1"}, "no 'entry_point'"),
        ({"test": "assert f( == 1", "entry_point": "f"}, "no Python"),
        ({"test": "x = 1", "entry_point": "f"}, "test nothing"),
        ({"test": "assert f() == 1", "entry_point": "f g"}, "no 'entry_point'"),
        ({"inputs": ["1"], "outputs": []}, "1 inputs and 0 outputs"),
        ({"test": "assert len('')", "entry_point": "f"}, "never called"),
        ({"test": "import no_such_module\nassert f()", "entry_point": "f"}, "never called"),
        ({"test": "def check(g):\n    pass\nprint()", "entry_point": "f"}, "never called"),
    ],
)
def test_tests_that_cannot_be_read_have_no_score(gold: object, message: str) -> None:
    require_namespaces()
    verdict = CodeVerifier().verify(gold, fenced("def f(): return 1"))
    assert (verdict.score, verdict.status) == (None, "gold_unparsable")
    assert message in verdict.detail


def test_a_row_may_be_json_and_tests_a_list() -> None:
    require_namespaces()
    gold = {"test": ["assert f(1) == 2", "assert f(2) == 3"], "entry_point": "f"}
    text = fenced("def f(x): return x + 1")
    verifier = CodeVerifier()
    assert verifier.verify(json.dumps(gold), text).score == verifier.verify(gold, text).score == 1.0


def test_scripts_are_compared_by_their_words() -> None:
    require_namespaces()
    gold = {"inputs": ["1 2", "3 4"], "outputs": ["3\n", "7"]}
    programs = {
        "print(sum(map(int, input().split())))": ("correct", 1.0),
        "print(3)": ("wrong", 0.5),
        "if __name__ == '__main__': print(sum(map(int, input().split())), end='  ')": (
            "correct",
            1.0,
        ),
        "print(3); raise SystemExit(1)": ("wrong", 0.0),
        "import os; os._exit(0)": ("wrong", 0.0),
        "import os; os.abort()": ("crash", 0.0),
        "x = bytearray(1 << 40)": ("oom", 0.0),
        "print('3' * 100_000)": ("wrong", 0.0),
        "while True: pass": ("timeout", 0.0),
    }
    texts = [fenced(program) for program in programs]
    verifier = CodeVerifier(scoring="fraction", timeout=1.0)
    verdicts = verifier.verify_batch([gold] * len(texts), texts)
    assert [(verdict.status, verdict.score) for verdict in verdicts] == list(programs.values())
    assert CodeVerifier(timeout=1.0).verify(gold, fenced("print(3)")).score == 0.0


def test_a_missing_sandbox_has_no_score_and_warns_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "_missing", lambda level: "no user namespaces")
    monkeypatch.setattr(code, "_warned", set())
    with pytest.warns(RuntimeWarning, match="have no score: isolation 'namespaces' does not hold"):
        verdict = CodeVerifier().verify(ADD, fenced("x = 1"))
    assert (verdict.score, verdict.status) == (None, "unavailable")
    assert "no user namespaces" in verdict.detail
    second = CodeVerifier().verify_batch([ADD] * 2, [fenced("x = 1"), "nothing"])
    assert [verdict.status for verdict in second] == ["unavailable", "no_answer"]


def test_the_reward_has_the_signature_of_trl() -> None:
    require_namespaces()
    metrics: dict[str, float] = {}
    extra: dict[str, list] = {}
    right = fenced("def add(a, b): return a + b")
    scores = code_reward(
        ["p", [{"role": "user", "content": "p"}], "p", "p", "p"],
        [right, [{"role": "assistant", "content": right}], "none", right, right],
        completion_ids=[[1]] * 5,
        test=[ADD["test"]] * 4 + [""],
        entry_point=["add"] * 5,
        finish_reasons=["stop", "stop", "stop", "length", "stop"],
        trainer_state=None,
        log_metric=metrics.__setitem__,
        log_extra=extra.__setitem__,
        difficulty=[1] * 5,
    )
    assert scores == [1.0, 1.0, 0.0, 0.0, None]
    assert metrics == {
        "code/correct_rate": 0.4,
        "code/gold_unparsable_rate": 0.2,
        "code/no_answer_rate": 0.2,
        "code/truncated_rate": 0.2,
    }
    assert extra["code_status"] == [
        "correct",
        "correct",
        "no_answer",
        "truncated",
        "gold_unparsable",
    ]
    assert extra["code_extracted"][0] == "def add(a, b): return a + b\n"
    assert code_reward.__name__ == "code_reward"
    assert pickle.loads(pickle.dumps(code_reward)) is code_reward
    assert pickle.loads(pickle.dumps(CodeVerifier())) == CodeVerifier()


def test_the_reward_takes_scripts_and_options() -> None:
    require_namespaces()
    scores = code_reward(
        [""] * 2,
        [fenced("print(input())"), fenced("print(0.50001)")],
        inputs=[["1"], ["2"]],
        outputs=[["1"], ["0.5"]],
        verifier=CodeVerifier(tolerance=1e-3),
    )
    assert scores == [1.0, 1.0]


def test_columns_that_are_missing_or_short_are_errors() -> None:
    with pytest.raises(ValueError, match=r"got the columns \[\], need test and entry_point"):
        code_reward([""], [""])
    with pytest.raises(ValueError, match="got 2 completions and columns of"):
        code_reward([""] * 2, [""] * 2, test=["assert f()"], entry_point=["f"] * 2)
    with pytest.raises(ValueError, match="got 1 golds, 2 completions and 2 flags"):
        CodeVerifier().verify_batch([ADD], ["", ""])
    with pytest.raises(ValueError, match="2 completions and 1 flags"):
        code_reward([""] * 2, [""] * 2, test=["a"] * 2, entry_point=["f"] * 2, finish_reasons=["x"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scoring": "half"}, "got scoring='half'"),
        ({"timeout": 0}, "got timeout=0"),
        ({"workers": 0}, "got workers=0"),
        ({"isolation": "docker"}, "got isolation='docker'"),
    ],
)
def test_options_without_a_meaning_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CodeVerifier(**options)


def test_many_timeouts_warn_once(monkeypatch: pytest.MonkeyPatch) -> None:
    require_namespaces()
    monkeypatch.setattr(code, "_warned", set())
    columns = {"test": [ADD["test"]], "entry_point": ["add"]}
    hanging = CodeVerifier(timeout=0.3)
    with pytest.warns(RuntimeWarning, match="1 of 1 programs ran out of time"):
        assert code_reward([""], [fenced("while 1: pass")], **columns, verifier=hanging) == [0.0]
    assert code_reward([""], [fenced("while 1: pass")], **columns, verifier=hanging) == [0.0]


def test_a_batch_keeps_its_order_whatever_its_programs_do() -> None:
    require_namespaces()
    programs = [
        "def add(a, b): return a + b",
        "import os; os._exit(0)",
        "while True: pass",
        "def add(a, b): return 0",
    ] * 4
    texts = [fenced(program) for program in programs]
    verdicts = CodeVerifier(timeout=0.7, workers=4).verify_batch([ADD] * 16, texts)
    assert [verdict.status for verdict in verdicts] == ["correct", "crash", "timeout", "wrong"] * 4
