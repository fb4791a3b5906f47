# SPDX-License-Identifier: Apache-2.0
"""Programs as answers: run in a sandbox, judged by tests in another process."""

import json
import os
import threading
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from signal import Signals
from time import perf_counter
from typing import Any, Literal

from reward.base import LogExtra, LogMetric, completion_text, log_verdicts
from reward.code_task import Task, extract_code, read_task, same_output, whole_program
from reward.sandbox import Level, Limits, Run, Sandbox, SandboxUnavailable
from reward.types import Status, Verdict

MANY_TIMEOUTS = 0.05
_warned: set[str] = set()
_warning_lock = threading.Lock()


@dataclass(frozen=True)
class CodeVerifier:
    """Grades a program by running it in a sandbox against the tests of its row.

    For tests of functions the program and its judge are two processes. The tests run in the judge;
    a call of the candidate sends the arguments to the program's process as literals, and its result
    comes back as one, of at most 1 MiB. The program sees neither the tests nor the judge, and
    nothing but the values it returns has a say: not its exit code, what it prints, objects equal to
    everything, or builtins it has changed. For scripts the outputs are compared in this process.

    What the tests cannot see, because only literals cross: a change the candidate makes to its
    arguments, and results of other types than None, numbers, texts and the built-in containers
    (a subclass arrives as the built-in type). Tests whose functions need that score 0.0 for every
    program, so verify a reference solution of each row first.

    See `reward.sandbox` for what the levels of isolation protect from, and what they do not.

    Args:
        timeout: Seconds of wall time for one completion with all of its tests.
        isolation: Level of the sandbox. Where it does not hold, nothing runs: the status is
            "unavailable" and the score None. Weaker levels must be asked for by name.
        scoring: "all": 1.0 if every test passes, else 0.0. "fraction": the share that passes:
            asserts, not counting those of constants, or pairs of input and output.
        workers: Programs at once in `verify_batch`; by default one for each core.
        max_characters: A longer program is not run: "too_long".
        tolerance: For outputs of scripts, see `same_output`.
        limits: What a program may use.
        readable: Directories a program may import from beside the standard library.

    Raises:
        ValueError: If an option has no meaning.

    Example:
        >>> verifier = CodeVerifier()
        >>> gold = {"test": "assert add(1, 2) == 3", "entry_point": "add"}
        >>> verifier.verify(gold, "I cannot do that.").status
        'no_answer'
    """

    timeout: float = 5.0
    isolation: Level = "namespaces"
    scoring: Literal["all", "fraction"] = "all"
    workers: int | None = None
    max_characters: int = 65_536
    tolerance: float | None = None
    limits: Limits = field(default_factory=Limits)
    readable: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Check the options."""
        if self.scoring not in ("all", "fraction"):
            raise ValueError(f"got scoring={self.scoring!r}, need 'all' or 'fraction'")
        if not (0 < self.timeout <= 600):
            raise ValueError(f"got timeout={self.timeout!r}, need seconds in (0, 600]")
        if self.workers is not None and self.workers < 1:
            raise ValueError(f"got workers={self.workers}, need at least 1, or None for one a core")
        self._sandbox()

    def _sandbox(self) -> Sandbox:
        return Sandbox(self.isolation, self.limits, self.readable)

    def verify(self, gold: object, completion: str, *, truncated: bool = False) -> Verdict:
        """Grade one completion.

        Args:
            gold: The tests, see `read_task`.
            completion: The text that holds the program.
            truncated: Whether it was cut at the length limit; it then scores 0.0.

        Returns:
            The verdict; `None` as score only for tests that cannot be read or fail by themselves,
            and where the sandbox is not available.
        """
        start = perf_counter()
        score, status, extracted, detail = self._decide(gold, completion, truncated)
        return Verdict(score, status, extracted, detail, perf_counter() - start)

    def verify_batch(
        self,
        golds: Sequence[object],
        completions: Sequence[str],
        truncated: Sequence[bool] | None = None,
    ) -> list[Verdict]:
        """Grade many completions, several at once.

        Args:
            golds: The tests of each completion.
            completions: The completions.
            truncated: Whether each was cut at the length limit.

        Returns:
            One verdict for each completion, in order.

        Raises:
            ValueError: If the lists differ in length.
        """
        cut = [False] * len(completions) if truncated is None else truncated
        if not len(golds) == len(completions) == len(cut):
            raise ValueError(
                f"got {len(golds)} golds, {len(completions)} completions and {len(cut)} flags; "
                "need one of each per completion: repeat the columns of a prompt for each of its "
                "completions"
            )
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        workers = self.workers or cores or 1
        with ThreadPoolExecutor(workers, thread_name_prefix="code-verifier") as executor:
            jobs = [
                executor.submit(self.verify, gold, completion, truncated=flag)
                for gold, completion, flag in zip(golds, completions, cut, strict=True)
            ]
            return [job.result() for job in jobs]

    def _decide(
        self, gold: object, completion: str, truncated: bool
    ) -> tuple[float | None, Status, str | None, str]:
        try:
            task = read_task(gold)
        except ValueError as error:
            return None, "gold_unparsable", None, str(error)[:400]
        if truncated:
            return 0.0, "truncated", None, "cut at the length limit"
        program = extract_code(completion)
        if program is None or not program.strip():
            return 0.0, "no_answer", None, "no closed block of Python after the reasoning"
        if len(program) > self.max_characters:
            return 0.0, "too_long", None, f"a program of {len(program)} characters"
        try:
            run = self._run_script if task.inputs else self._run_function
            score, status, detail = run(task, program)
        except (
            SandboxUnavailable,
            OSError,
        ) as error:  # OSError: no descriptors or memory left here
            _warn_once("unavailable", f"programs are not run and have no score: {error}")
            return None, "unavailable", program, str(error)[:400]
        return score, status, program, f"{detail}; isolation {self.isolation}"

    def _run_function(self, task: Task, program: str) -> tuple[float | None, Status, str]:
        run = self._sandbox().judge(
            whole_program(task, program),
            task.tests,
            task.names,
            prelude=task.prelude,
            every=self.scoring == "fraction",
            timeout=self.timeout,
        )
        if run.verdict:
            return self._read_verdict(json.loads(run.verdict))
        if run.ended == "timeout":
            return 0.0, "timeout", f"over {self.timeout:g} s"
        return 0.0, "crash", f"the judge gave no verdict: {_ending(run.ended, run.code)}"

    def _read_verdict(self, found: dict[str, Any]) -> tuple[float | None, Status, str]:
        passed, total, error = found["passed"], found["total"], found["error"]
        if found["calls"] == 0 and not error.startswith(("MemoryError", "OSError", "Blocking")):
            # Nothing of the program has reached the judge, so this is no doing of the program.
            return None, "gold_unparsable", f"the tests never called the candidate; {error}"
        detail = f"{passed} of {total} passed" + (f"; {error}" if error else "")
        score = passed / total if self.scoring == "fraction" else float(passed == total)
        if passed == total:
            return 1.0, "correct", detail
        if found["out_of_memory"]:
            return score, "oom", detail
        kind, _, code = found["ended"].partition(" ")
        if kind in ("signal", "exit"):
            return score, "crash", f"{_ending(kind, int(code))}; {detail}"
        return score, "wrong", detail

    def _run_script(self, task: Task, program: str) -> tuple[float | None, Status, str]:
        end = perf_counter() + self.timeout
        passed = 0
        worst: tuple[Status, str] = ("correct", "")
        for stdin, expected in zip(task.inputs, task.outputs, strict=True):
            left = end - perf_counter()
            status, detail = "timeout", f"over {self.timeout:g} s"
            if left > 0:
                run = self._sandbox().run(program, stdin=stdin, timeout=left)
                status, detail = self._judge_output(run, expected)
            passed += status == "correct"
            if worst[0] == "correct":
                worst = status, detail
            if status == "timeout" or (status != "correct" and self.scoring == "all"):
                break
        total = len(task.inputs)
        score = passed / total if self.scoring == "fraction" else float(passed == total)
        return score, worst[0], f"{passed} of {total} passed; {worst[1]}".rstrip("; ")

    def _judge_output(self, run: Run, expected: str) -> tuple[Status, str]:
        last = run.stderr.strip().rpartition("\n")[2][:200]
        if run.ended == "timeout":
            return "timeout", f"over {self.timeout:g} s"
        if run.ended == "output":
            return "wrong", f"more than {self.limits.output_bytes} bytes of output"
        if run.ended == "signal":
            return "crash", _ending("signal", run.code)
        if run.code != 0:
            return ("oom" if last.startswith("MemoryError") else "wrong"), last or "exit code not 0"
        right = same_output(expected, run.stdout, tolerance=self.tolerance)
        return ("correct", "") if right else ("wrong", "another output")


def _ending(kind: str, code: int) -> str:
    if kind != "signal":
        return f"ended with {kind} {code}"
    names = {int(number): number.name for number in Signals}
    return f"ended by {names.get(code, f'signal {code}')}"


def _warn_once(key: str, message: str) -> None:
    with _warning_lock:
        if key in _warned:
            return
        _warned.add(key)
    warnings.warn(message, RuntimeWarning, stacklevel=3)


def code_reward(
    prompts: Sequence[object],
    completions: Sequence[object],
    completion_ids: Sequence[Sequence[int]] | None = None,
    *,
    test: Sequence[object] | None = None,
    entry_point: Sequence[object] | None = None,
    inputs: Sequence[object] | None = None,
    outputs: Sequence[object] | None = None,
    verifier: CodeVerifier | None = None,
    finish_reasons: Sequence[str] | None = None,
    log_metric: LogMetric | None = None,
    log_extra: LogExtra | None = None,
    **columns: object,
) -> list[float | None]:
    """Reward 1.0 for a program that passes the tests of its row, else 0.0 (TRL's signature).

    Args:
        prompts: Strings, or lists of messages; what is Python in one, plain or in a block, is
            what the program may continue, and its helpers are there for the tests.
        completions: Strings, or lists of messages of which the last one is graded.
        completion_ids: Unused; part of the signature.
        test: Tests of each completion, see `read_task`.
        entry_point: The function they call.
        inputs: In place of tests, the list of standard inputs of each completion.
        outputs: What the program must write for each of them.
        verifier: The options; by default those of `CodeVerifier()`.
        finish_reasons: "stop" or "length" for each completion where the caller knows it; one that
            was cut at the length limit scores 0.0.
        log_metric: Receives the rate of each status, as `code/{status}_rate`.
        log_extra: Receives the columns `code_status` and `code_extracted`.
        columns: Other dataset columns; unused.

    Returns:
        One reward for each completion, in order; `None` only where the tests cannot be read or the
        sandbox is not available.

    Raises:
        ValueError: If the lists differ in length, or there are no tests at all.

    Example:
        >>> code_reward([""], ["no program"], test=["assert f() == 1"], entry_point=["f"])
        [0.0]
    """
    given = {"test": test, "entry_point": entry_point, "inputs": inputs, "outputs": outputs}
    found = {name: column for name, column in given.items() if column is not None}
    if not ({"test", "entry_point"} <= set(found) or {"inputs", "outputs"} <= set(found)):
        raise ValueError(
            f"got the columns {sorted(found)}, need test and entry_point, or inputs and outputs: "
            "add them to the dataset, or rename its own to these"
        )
    found["prompt"] = [completion_text(prompt) for prompt in prompts]
    lengths = {name: len(column) for name, column in found.items()}
    if set(lengths.values()) != {len(completions)}:
        raise ValueError(
            f"got {len(completions)} completions and columns of {lengths} rows; need one row per "
            "completion: repeat the columns of a prompt for each of its completions"
        )
    reasons = ["stop"] * len(completions) if finish_reasons is None else finish_reasons
    verdicts = (verifier or CodeVerifier()).verify_batch(
        [{name: column[row] for name, column in found.items()} for row in range(len(completions))],
        [completion_text(completion) for completion in completions],
        [reason == "length" for reason in reasons],
    )
    late = sum(verdict.status == "timeout" for verdict in verdicts)
    if late > MANY_TIMEOUTS * len(verdicts):
        _warn_once(
            "timeouts",
            f"{late} of {len(verdicts)} programs ran out of time: the limit may be too short for "
            "this machine, or more programs run at once than it has cores",
        )
    log_verdicts(verdicts, name="code", log_metric=log_metric, log_extra=log_extra)
    return [verdict.score for verdict in verdicts]
