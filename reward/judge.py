# SPDX-License-Identifier: Apache-2.0
"""Child side of `reward.code`: runs trusted tests against functions in another process.

Only literals cross the channel. What the program returns arrives as built-in values made here, so
an object that equals everything cannot, and no class, builtin or exit status of the program's
process has a say in the verdict. That leaves on a descriptor the program's process never had.
"""

import ast
import builtins
import json
import os
import time
from types import CodeType
from typing import Any

from reward.solution_runner import (
    MAX_TEXT,
    NotLiteral,
    TooLarge,
    load,
    names_of,
    parse,
    receive,
    send,
)

# Not those that end an iteration: raised inside `all(map(...))` they would skip what remains.
RAISABLE: dict[str, type[Exception]] = {
    name: kind
    for name, kind in vars(builtins).items()
    if isinstance(kind, type)
    and issubclass(kind, Exception)
    and not issubclass(kind, StopIteration | StopAsyncIteration)
}
LOOPS = (ast.For, ast.While, ast.AsyncFor)


class SolutionEnded(BaseException):  # a test's `except Exception` must not pass over it
    """The program's process is gone, or no longer speaks the protocol."""


class Solution:
    """The program in the other process, and what became of it."""

    def __init__(self, channel: int, process: int) -> None:
        self.channel = channel
        self.process = process
        self.calls = 0
        self.ended = ""
        self.out_of_memory = False

    def call(self, name: str, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
        """Call one of its functions.

        Raises:
            Exception: As the function did, where that class is built in; else RuntimeError.
            SolutionEnded: There is no answer and there will be none.
        """
        if self.ended:
            raise SolutionEnded(self.ended)
        self.calls += 1
        try:
            send(self.channel, (name, arguments, keywords))
            answer = parse(receive(self.channel))
            kind, *rest = answer
        except (NotLiteral, TooLarge) as error:
            raise self._end(f"cannot pass {error}") from None
        except (OSError, EOFError):
            raise self._end(self._how_it_ended()) from None
        except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError) as error:
            raise self._end(f"an answer that is no literal: {type(error).__name__}") from None
        if kind == "value" and len(rest) == 1:
            return rest[0]
        raise self._raised(rest)

    def _raised(self, rest: list[Any]) -> BaseException:
        if len(rest) != 2 or not isinstance(rest[0], list) or not rest[0]:
            return self._end("an answer of another form")
        names, text = [str(name)[:80] for name in rest[0]], str(rest[1])[:MAX_TEXT]
        self.out_of_memory |= "MemoryError" in names
        kind = next((RAISABLE[name] for name in names if name in RAISABLE), RuntimeError)
        shown = text if kind.__name__ == names[0] else f"{names[0]}: {text}"
        try:
            return kind(shown)
        except TypeError:
            return RuntimeError(f"{kind.__name__}: {shown}")

    def _end(self, why: str) -> SolutionEnded:
        self.ended = why
        return SolutionEnded(why)

    def _how_it_ended(self) -> str:
        for _ in range(50):
            process, status = os.waitpid(self.process, os.WNOHANG)
            if process:
                code = os.waitstatus_to_exitcode(status)
                return f"signal {-code}" if code < 0 else f"exit {code}"
            time.sleep(0.002)
        return "the channel was closed"


class Candidate:
    """Stands for one function of the program in the tests."""

    def __init__(self, name: str, solution: Solution) -> None:
        self.__name__ = name
        self._solution = solution

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        """Call the function in the other process."""
        return self._solution.call(self.__name__, arguments, keywords)


class Counter(ast.NodeTransformer):
    """Rewrites tests so that a failed assert is counted and the next one still runs."""

    def __init__(self) -> None:
        self.total = 0
        self.in_loops: set[int] = set()
        self.passed: set[int] = set()
        self.failed: set[int] = set()
        self.first_error = ""
        self._loops = 0

    def visit(self, node: ast.AST) -> Any:
        """Keep track of loops on the way."""
        self._loops += isinstance(node, LOOPS)
        result = super().visit(node)
        self._loops -= isinstance(node, LOOPS)
        return result

    def visit_Assert(self, node: ast.Assert) -> ast.AST:
        """Wrap one assert; one of a constant tests nothing and is not counted."""
        if isinstance(node.test, ast.Constant):
            return node
        number, self.total = self.total, self.total + 1
        if self._loops:
            self.in_loops.add(number)
        wrapped = ast.parse(
            f"try:\n    _passed_({number})\nexcept Exception as _error_:\n"
            f"    _failed_({number}, _error_)"
        ).body[0]
        if isinstance(wrapped, ast.Try):
            wrapped.body.insert(0, node)
        return ast.copy_location(wrapped, node)

    def fail(self, number: int, error: Exception) -> None:
        """Count one failure."""
        self.failed.add(number)
        self.first_error = self.first_error or describe(error)

    def count(self, finished: bool) -> int:
        """How many asserts ran and never failed; a loop that was cut short counts as failed."""
        return len(self.passed - self.failed - (set() if finished else self.in_loops))


def describe(error: BaseException) -> str:
    """One line for a person."""
    return f"{type(error).__name__}: {error}".rstrip(": ")[:MAX_TEXT]


def judge(solution: Solution, tests: str, prelude: str, names: list[str], every: bool) -> Any:
    """Run the tests.

    Args:
        solution: The program.
        tests: Asserts, or a function `check(candidate)` of them.
        prelude: Definitions that the tests and the program share.
        names: Functions of the program that tests may call; the first is the candidate.
        every: Count every assert, instead of stopping at the first that fails.

    Returns:
        Passed and total number of tests, and the first error.
    """
    counter = Counter()
    found = {name: Candidate(name, solution) for name in names}
    hooks = {"_passed_": counter.passed.add, "_failed_": counter.fail}
    error, finished = "", False
    try:
        source: str | CodeType = tests
        if every:
            tree = ast.fix_missing_locations(counter.visit(ast.parse(tests)))
            source = compile(tree, "tests.py", "exec", dont_inherit=True)
        shared = names_of(load("prelude", prelude)) if prelude else {}
        module = load("tests", source, {**shared, **found, **hooks, "candidate": found[names[0]]})
        if callable(vars(module).get("check")):
            module.check(found[names[0]])
        finished = not solution.ended
    except BaseException as raised:
        error = describe(raised)
    if every:
        return counter.count(finished), max(counter.total, 1), counter.first_error or error
    return int(finished), 1, error


def run(payload: str, channel: int, verdict: int, process: int) -> None:
    """Judge one program and write the verdict. Does not return."""
    tests, prelude, names, every = ast.literal_eval(payload)
    solution = Solution(channel, process)
    passed, total, error = judge(solution, tests, prelude, names, every)
    report = {
        "passed": passed,
        "total": total,
        "error": error,
        "calls": solution.calls,
        "ended": solution.ended,
        "out_of_memory": solution.out_of_memory,
    }
    os.write(verdict, json.dumps(report).encode())
    os._exit(0)
