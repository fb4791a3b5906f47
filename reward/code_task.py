# SPDX-License-Identifier: Apache-2.0
"""What a code task is: the program in a completion, and the tests of a row."""

import ast
import json
import math
import re
import threading
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache

_OPENING = re.compile(r"[ \t]*(`{3,})[ \t]*([A-Za-z0-9_+-]*)[^`\n]*")
_PYTHON = {"python", "python3", "py"}
_parsing = threading.Lock()


def extract_code(text: str) -> str | None:
    r"""Return the last Python block of a completion, after its reasoning.

    The block is fenced by three backticks or more and labelled python, python3 or py; if there is
    no such block, the last one without a label. A block that is not closed is no answer, and
    neither is what stands inside `<think>`.

    Args:
        text: The completion.

    Returns:
        The program, or `None` if there is none.

    Example:
        >>> extract_code("So:\n```python\ndef f():\n    return 1\n```")
        'def f():\n    return 1\n'
    """
    _, closed, after = text.rpartition("</think>")
    text = after if closed else text
    if "<think>" in text:
        return None  # the reasoning did not come to an end
    labelled: str | None = None
    bare: str | None = None
    fence, label, lines = "", "", []
    for line in text.splitlines(keepends=True):
        if not fence:
            opening = _OPENING.fullmatch(line.rstrip("\r\n"))
            if opening:
                fence, label, lines = opening[1], opening[2].lower(), []
        elif line.strip() and not line.strip().strip("`") and len(line.strip()) >= len(fence):
            if label in _PYTHON:
                labelled = "".join(lines)
            elif not label:
                bare = "".join(lines)
            fence = ""
        else:
            lines.append(line)
    return labelled if labelled is not None else bare


@dataclass(frozen=True)
class Task:
    """The gold of one row: tests of a function, or inputs and outputs of a script.

    Args:
        tests: Asserts, or a function `check(candidate)` of them, which calls the candidate.
        names: Functions of the program that the tests may call; the first is the candidate.
        prompt: What the program completes; its helpers are there for the program and the tests.
        prelude: Imports and helpers of the prompt.
        inputs: Standard inputs of a script.
        outputs: What the script must write for each.
    """

    tests: str = ""
    names: tuple[str, ...] = ()
    prompt: str = ""
    prelude: str = ""
    inputs: tuple[str, ...] = ()
    outputs: tuple[str, ...] = ()


def read_task(gold: object) -> Task:
    """Read the gold of a row, without running anything.

    Args:
        gold: A mapping, or one as JSON. With `test` (source, or a list of asserts), `entry_point`
            (a name, or several of which the first is the candidate) and, optionally, `prompt`; or
            with `inputs` and `outputs`, lists of equal length. The tests are trusted, the prompt
            too: definitions in it are at hand in the tests.

    Raises:
        ValueError: If it is none of that.

    Example:
        >>> read_task({"test": ["assert add(1, 2) == 3"], "entry_point": "add"}).names
        ('add',)
    """
    if isinstance(gold, str):
        try:
            gold = json.loads(gold)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"the gold is no JSON: {error}") from None
    if not isinstance(gold, Mapping):
        raise ValueError(f"got a gold of type {type(gold).__name__}, need a mapping with 'test'")
    inputs, outputs = _texts(gold.get("inputs")), _texts(gold.get("outputs"))
    if inputs or outputs:
        if len(inputs) != len(outputs):
            raise ValueError(f"got {len(inputs)} inputs and {len(outputs)} outputs; need pairs")
        return Task(inputs=inputs, outputs=outputs)
    tests, names = "\n".join(_texts(gold.get("test"))), _texts(gold.get("entry_point"))
    if not tests.strip() or not names or not all(name.isidentifier() for name in names):
        raise ValueError("the gold has no 'test' or no 'entry_point', the name of a function")
    prompt = gold.get("prompt")
    return _function_task(tests, names, prompt if isinstance(prompt, str) else "")


def _texts(value: object) -> tuple[str, ...]:
    items = value if isinstance(value, list | tuple) else [value]
    return tuple(item for item in items if isinstance(item, str))


def _parse(source: str) -> ast.Module:
    # Two threads that parse at once may raise SystemError in Python 3.11, through no fault of the
    # text: https://github.com/python/cpython/issues/106905. The lock is for our threads, the
    # repetition for those of others.
    for _ in range(20):
        with suppress(SystemError), _parsing:
            return ast.parse(source)
    raise ValueError("the parser is busy in other threads; call the verifier from fewer")


@lru_cache(maxsize=4096)
def _function_task(tests: str, names: tuple[str, ...], prompt: str) -> Task:
    try:
        tree = _parse(tests)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise ValueError(f"the tests are no Python: {error}") from None
    if not any(isinstance(node, ast.Assert | ast.Raise | ast.Call) for node in ast.walk(tree)):
        raise ValueError("the tests test nothing: no assert and no call")
    fenced = extract_code(prompt)
    prompt = prompt if fenced is None else fenced
    return Task(tests, names, prompt, _prelude(prompt, names))


def _prelude(prompt: str, names: tuple[str, ...]) -> str:
    """The imports and definitions of a prompt that is Python, without those asked for."""
    try:
        body = _parse(prompt).body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return ""
    kept = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef, ast.Assign, ast.AnnAssign)
    nodes = [node for node in body if isinstance(node, kept)]
    return "\n".join(ast.unparse(n) for n in nodes if getattr(n, "name", None) not in names)


def whole_program(task: Task, program: str) -> str:
    r"""Put the prompt before a program that only continues it.

    Args:
        task: The gold of the row.
        program: What `extract_code` found.

    Returns:
        The program itself if it binds the candidate's name at the left margin, else both.

    Example:
        >>> task = Task(names=("one",), prompt="def one():\n")
        >>> whole_program(task, "    return 1\n")
        'def one():\n    return 1\n'
    """
    name = re.escape(task.names[0])
    bound = "|".join(
        (
            rf"(?:async[ \t]+)?def[ \t]+{name}\b",
            rf"class[ \t]+{name}\b",
            rf"{name}[ \t]*[=:]",
            rf"(?:from|import)\b.*\b{name}\b",
        )
    )
    if not task.prompt or any(re.match(bound, line) for line in program.splitlines()):
        return program
    return task.prompt + program


def same_output(expected: str, actual: str, *, tolerance: float | None = None) -> bool:
    r"""Compare two outputs word by word, as judges of programming contests do.

    Args:
        expected: The right output.
        actual: What the program wrote.
        tolerance: Let words that are both finite decimal numbers differ by this much, absolutely
            or relative to the expected one; by default words must be equal.

    Example:
        >>> same_output("1 2\n", "1\n2"), same_output("0.5", "0.50001", tolerance=1e-3)
        (True, True)
    """
    wanted, got = expected.split(), actual.split()
    if tolerance is None or len(wanted) != len(got):
        return wanted == got
    return all(a == b or _close(a, b, tolerance) for a, b in zip(wanted, got, strict=True))


def _close(expected: str, actual: str, tolerance: float) -> bool:
    try:
        a, b = float(expected), float(actual)
    except ValueError:
        return False
    finite = math.isfinite(a) and math.isfinite(b)
    return finite and abs(a - b) <= tolerance * max(1.0, abs(a))
