# SPDX-License-Identifier: Apache-2.0
r"""Mathematical answers: extracted, compared in layers, and never at the cost of the run.

Two modes, to be named with every number. *Strict* is for training: only the last box counts, and an
answer has to be evaluated. *Lenient* is for evaluation: an answer is sought in other places too, an
unevaluated one is taken for its value, a gold decimal with three digits or more is matched at its
own precision, and per cent may be left out.

What counts as evaluated, in strict mode: what is left has to be a usual notation of a value, that
is signs, fractions, mixed numbers, decimals, percentages, powers, roots, factorials, binomials,
scientific notation, products with a power or a root, and sums of unlike terms. `2^{10}` is paid for
1024, a sum over 100 terms is not paid for 5050. Refused are, unless the gold answer has something
of the same kind: operators (sum, product, integral, limit, derivative, maximum, greatest common
divisor, remainder, determinant) and dots; sums of like terms (`3+4`, `3a+a`); products of plain
numbers (`3\cdot 5`) and quotients that are whole (`48/2`); elementary functions, floors and
absolute values of numbers (`\sin 30°`). `reward.strictness` holds the rule.

In both modes an equation counts for its last side and its sides must not be different numbers
(`5=4`), several candidates never match one gold answer, and a unit must fit that of the gold answer
if it has one. A sign of per cent is a factor of 1/100. A completion that is bad, slow or hostile
scores 0.0; `None` is for gold answers that cannot be graded.
"""

import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib.util import find_spec
from itertools import chain
from time import perf_counter
from typing import Any

from reward.base import LogExtra, LogMetric, completion_text, log_verdicts
from reward.cache import VerdictCache
from reward.compare import decide
from reward.engine import equal_by_math_verify
from reward.extract import Mode, extract_answer
from reward.golds import read_golds
from reward.golds import validate_golds as validate_golds
from reward.normalize import MAX_CHARACTERS
from reward.pool import Outcome, WorkerPool, shared_pool
from reward.types import Status, Verdict

VERSION = "1"
"""Part of the key of every kept verdict: raise it when verdicts change."""

TIMEOUT_RATE = 0.05
"""Share of timeouts in a batch above which a warning is issued."""


@dataclass
class _Job:
    """One answer against its gold answers: decided, or waiting for the engine."""

    golds: tuple[str, ...]
    answer: str
    rule: str
    verdict: Verdict | None = None
    items: list[int] = field(default_factory=list)


@dataclass
class _Plan:
    """A batch: verdicts that are there, and for the others the key of a job."""

    verdicts: list[Verdict | tuple[str, ...]]
    jobs: dict[tuple[str, ...], _Job]
    items: list[tuple[str, str, bool]]


@dataclass(frozen=True)
class MathVerifier:
    r"""Grades a completion by its mathematical answer.

    Only what text and exact arithmetic cannot decide goes to the worker processes; the result of
    everything but accidents is kept in the cache.

    Args:
        mode: "strict" for training, "lenient" for evaluation; see `reward.math`.
        pattern: A regular expression that finds the answer in place of the box, such as
            `reward.extract.GSM8K`; the last match counts.
        deadline: Seconds for one comparison, in its worker.
        cache: Verdicts to reuse.
        pool: The workers; by default those all verifiers of this process share. Not pickled.

    Raises:
        ValueError: If the mode is unknown or the pattern is no regular expression.

    Example:
        >>> verifier = MathVerifier()
        >>> verifier.verify(r"\frac{1}{2}", r"So it is \boxed{0.5}.").status
        'correct'
        >>> verifier.verify("5050", r"\boxed{\sum_{k=1}^{100} k}").detail
        'box: \\sum is not evaluated'
    """

    mode: Mode = "strict"
    pattern: str | None = None
    deadline: float = 2.0
    cache: VerdictCache = field(default_factory=VerdictCache, repr=False, compare=False)
    pool: WorkerPool | None = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Refuse what would fail later, in the middle of a run."""
        if self.mode not in ("strict", "lenient"):
            raise ValueError(f"mode must be 'strict' or 'lenient', got {self.mode!r}; use one")
        if not self.deadline > 0:
            raise ValueError(f"deadline must be above 0 s, got {self.deadline!r}; raise it")
        try:
            re.compile(self.pattern or "")
        except re.error as error:
            raise ValueError(
                f"got the pattern {self.pattern!r}, need a regular expression ({error}): mend it"
            ) from error

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "pool": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)

    def verify(self, gold: object, completion: str, *, truncated: bool = False) -> Verdict:
        """Grade one completion.

        Args:
            gold: The answer: text or a number, or a list of those of which any may be matched. Text
                with a box, or with `####`, is a solution: its answer is taken.
            completion: The text to grade.
            truncated: Whether the completion was cut at the length limit; it then scores 0.0.

        Returns:
            The verdict; `None` as score only for a gold answer that cannot be graded.
        """
        plan = self._plan([gold], [completion], [truncated])
        return self._finished(plan, self._map(plan))[0]

    def verify_batch(
        self,
        golds: Sequence[object],
        completions: Sequence[object],
        truncated: Sequence[bool] | None = None,
    ) -> list[Verdict]:
        """Grade every completion against its own gold answer.

        Args:
            golds: One gold answer for each completion.
            completions: Completions, plain or conversational.
            truncated: Whether each was cut at the length limit.

        Returns:
            One verdict for each completion, in order.

        Raises:
            ValueError: If the lists differ in length.
            ModuleNotFoundError: If math_verify is not installed.
        """
        plan = self._plan(golds, completions, truncated)
        verdicts = self._finished(plan, self._map(plan))
        _warn_of_timeouts(verdicts)
        return verdicts

    async def averify_batch(
        self,
        golds: Sequence[object],
        completions: Sequence[object],
        truncated: Sequence[bool] | None = None,
    ) -> list[Verdict]:
        """Do as `verify_batch` does and leave the event loop free while workers compute."""
        plan = self._plan(golds, completions, truncated)
        outcomes: list[Outcome] = []
        if plan.items:
            pool = self.pool or shared_pool()
            outcomes = await pool.amap(equal_by_math_verify, plan.items, deadline=self.deadline)
        verdicts = self._finished(plan, outcomes)
        _warn_of_timeouts(verdicts)
        return verdicts

    def _map(self, plan: _Plan) -> list[Outcome]:
        if not plan.items:
            return []
        pool = self.pool or shared_pool()
        return pool.map(equal_by_math_verify, plan.items, deadline=self.deadline)

    def _plan(
        self,
        golds: Sequence[object],
        completions: Sequence[object],
        truncated: Sequence[bool] | None,
    ) -> _Plan:
        _need_math_verify()
        cut = [False] * len(completions) if truncated is None else truncated
        if not len(golds) == len(completions) == len(cut):
            raise ValueError(
                f"got {len(completions)} completions, {len(golds)} gold answers and {len(cut)} "
                "marks of truncation; need one of each per completion: repeat the columns of a "
                "prompt for each of its completions"
            )
        plan = _Plan([], {}, [])
        for gold, completion, is_cut in zip(golds, completions, cut, strict=True):
            start = perf_counter()
            read = self._read(gold, completion_text(completion), is_cut)
            if isinstance(read, Verdict):
                plan.verdicts.append(_timed(read, start))
                continue
            key = ("math", VERSION, self.mode, *read.golds, "\x00", read.answer)
            if key not in plan.jobs:
                read.verdict = self.cache.get(key)
                if read.verdict is None:
                    self._decide(read, plan, start)
                plan.jobs[key] = read
            plan.verdicts.append((*key, read.rule))
        return plan

    def _read(self, gold: object, text: str, truncated: bool) -> Verdict | _Job:
        golds = tuple(text for text, reason in read_golds(gold) if not reason)
        if not golds:
            reasons = [reason for _, reason in read_golds(gold)] or ["an empty list"]
            return Verdict(None, "gold_unparsable", None, reasons[0])
        if truncated:
            return Verdict(0.0, "truncated", None, "cut at the length limit")
        found = extract_answer(text, mode=self.mode, pattern=self.pattern)
        if found.answer is None:
            status: Status = "truncated" if found.truncated else "no_answer"
            return Verdict(0.0, status, None, found.rule)
        if len(found.answer) > MAX_CHARACTERS:
            detail = f"{found.rule}: {len(found.answer)} characters, at most {MAX_CHARACTERS}"
            return Verdict(0.0, "too_long", found.answer[:200], detail)
        return _Job(golds, found.answer, found.rule)

    def _decide(self, job: _Job, plan: _Plan, start: float) -> None:
        """Set the verdict, or put the comparisons that are open on the plan."""
        strict = self.mode == "strict"
        decisions = [decide(gold, job.answer, strict=strict) for gold in job.golds]
        known = [decision for decision in decisions if decision is not None]
        right = next((decision for decision in known if decision.correct), None)
        if right is None and len(known) < len(decisions):
            for gold, decision in zip(job.golds, decisions, strict=True):
                if decision is None:
                    job.items.append(len(plan.items))
                    plan.items.append((gold, job.answer, strict))
            return
        last = right or known[0]
        verdict = Verdict(float(last.correct), last.status, job.answer, last.rule)
        job.verdict = _timed(verdict, start)

    def _finished(self, plan: _Plan, outcomes: Sequence[Outcome]) -> list[Verdict]:
        for key, job in plan.jobs.items():
            if job.verdict is None:
                job.verdict = _judged(job, [outcomes[index] for index in job.items])
            self.cache.put(key, job.verdict)
        return [
            verdict if isinstance(verdict, Verdict) else _by_rule(plan.jobs, verdict)
            for verdict in plan.verdicts
        ]


@dataclass(frozen=True)
class MathReward:
    r"""A reward function with TRL's signature, its column of gold answers and mode by choice.

    Args:
        column: Name of the dataset column with the gold answers.
        mode: "strict" for training, "lenient" for evaluation.
        pattern: Finds the answer in place of the box; see `MathVerifier`.
        deadline: Seconds for one comparison.
        name: The function's name in logs.

    Example:
        >>> reward = MathReward(column="target")
        >>> reward(["1/2+1/2="], [r"It is \boxed{1}."], target=["1"])
        [1.0]
        >>> reward.__name__
        'math_reward'
    """

    column: str = "answer"
    mode: Mode = "strict"
    pattern: str | None = None
    deadline: float = 2.0
    name: str = "math_reward"
    verifier: MathVerifier = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Make the verifier."""
        verifier = MathVerifier(self.mode, self.pattern, self.deadline)
        object.__setattr__(self, "verifier", verifier)

    @property
    def __name__(self) -> str:
        return self.name

    def validate(self, dataset: Iterable[Mapping[str, Any]]) -> list[tuple[int, str]]:
        """Find the rows whose gold answer cannot be graded; a trainer asks before it starts."""
        return validate_golds(dataset, self.column)

    def __call__(
        self,
        prompts: Sequence[object],
        completions: Sequence[object],
        completion_ids: Sequence[Sequence[int]] | None = None,
        *,
        finish_reasons: Sequence[str] | None = None,
        trainer_state: object = None,
        log_extra: LogExtra | None = None,
        log_metric: LogMetric | None = None,
        **columns: Any,
    ) -> list[float | None]:
        """Reward 1.0 for a right answer, else 0.0; see `math_reward`."""
        golds = columns.get(self.column)
        if golds is None:
            raise ValueError(
                f"got the columns {', '.join(sorted(columns)) or '(none)'}, need {self.column!r} "
                "with the gold answers: rename the column, or use MathReward(column=...)"
            )
        cut = None if finish_reasons is None else [reason == "length" for reason in finish_reasons]
        verdicts = self.verifier.verify_batch(golds, completions, cut)
        log_verdicts(verdicts, name="math", log_metric=log_metric, log_extra=log_extra)
        return [verdict.score for verdict in verdicts]


_BY_COLUMN = {column: MathReward(column=column) for column in ("answer", "solution")}


def _validate(dataset: Iterable[Mapping[str, Any]]) -> list[tuple[int, str]]:
    rows = iter(dataset)
    first = next(rows, None)
    if first is None:
        return []
    named = [column for column in _BY_COLUMN if column in first]
    if not named:
        raise ValueError(
            f"got rows with {', '.join(map(str, first))}, need answer or solution with the gold "
            "answers: rename the column, or use MathReward(column=...)"
        )
    return validate_golds(chain([first], rows), named[0])


def math_reward(
    prompts: Sequence[object],
    completions: Sequence[object],
    completion_ids: Sequence[Sequence[int]] | None = None,
    *,
    answer: Sequence[object] | None = None,
    solution: Sequence[object] | None = None,
    finish_reasons: Sequence[str] | None = None,
    trainer_state: object = None,
    log_extra: LogExtra | None = None,
    log_metric: LogMetric | None = None,
    **columns: object,
) -> list[float | None]:
    r"""Reward 1.0 for a completion whose last box holds the gold answer, else 0.0 (strict mode).

    Args:
        prompts: Unused; part of the signature.
        completions: Strings, or lists of messages of which the last one is graded.
        completion_ids: Unused; part of the signature.
        answer: The gold answer of each completion.
        solution: A worked solution of each completion, its answer boxed; used without `answer`.
        finish_reasons: "stop" or "length" for each completion where the caller knows it; one that
            was cut at the length limit scores 0.0.
        trainer_state: Unused; part of the signature.
        log_extra: Receives the columns `math_status` and `math_extracted`.
        log_metric: Receives the rate of each status, as `math/{status}_rate`.
        columns: Other dataset columns; unused.

    Returns:
        One reward for each completion, in order; `None` only where the gold cannot be graded.

    Raises:
        ValueError: If the lists differ in length, or there is no gold answer.

    Example:
        >>> math_reward(["2+2=", "2+2="], [r"\boxed{4}", r"\boxed{5=4}"], answer=["4", "4"])
        [1.0, 0.0]
    """
    column = "answer" if answer is not None or solution is None else "solution"
    golds = {"answer": answer, "solution": solution}[column]
    return _BY_COLUMN[column](
        prompts,
        completions,
        completion_ids,
        finish_reasons=finish_reasons,
        trainer_state=trainer_state,
        log_extra=log_extra,
        log_metric=log_metric,
        **({column: golds} if golds is not None else dict.fromkeys(columns)),
    )


lenient_math_reward = MathReward(mode="lenient", name="lenient_math_reward")
"""The same for evaluation: in lenient mode, with the gold answers in the column `answer`."""

math_reward.validate = _validate  # pyright: ignore[reportFunctionMemberAccess]


def _judged(job: _Job, outcomes: Sequence[Outcome]) -> Verdict:
    """Sum up what the engine said of one answer against each of its gold answers."""
    seconds = sum(outcome.seconds for outcome in outcomes)
    if any(outcome.status == "ok" and outcome.value is True for outcome in outcomes):
        return Verdict(1.0, "correct", job.answer, "equal by the engine", seconds)
    for outcome in outcomes:
        if outcome.status != "ok":
            return Verdict(0.0, outcome.status, job.answer, outcome.detail, seconds)
    return Verdict(0.0, "wrong", job.answer, "different by the engine", seconds)


def _by_rule(jobs: Mapping[tuple[str, ...], _Job], key: tuple[str, ...]) -> Verdict:
    verdict = jobs[key[:-1]].verdict
    if verdict is None:  # every job was judged; this is for the type checker
        return Verdict(0.0, "crash", None, "no verdict")
    detail = f"{key[-1]}: {verdict.detail}"
    return Verdict(verdict.score, verdict.status, verdict.extracted, detail, verdict.seconds)


def _timed(verdict: Verdict, start: float) -> Verdict:
    seconds = perf_counter() - start
    return Verdict(verdict.score, verdict.status, verdict.extracted, verdict.detail, seconds)


def _warn_of_timeouts(verdicts: Sequence[Verdict]) -> None:
    late = sum(verdict.status == "timeout" for verdict in verdicts)
    if late > TIMEOUT_RATE * len(verdicts):
        warnings.warn(
            f"{late} of {len(verdicts)} comparisons ran into their deadline and scored 0.0: use "
            "more workers or a longer deadline, and look at the extracted answers",
            RuntimeWarning,
            stacklevel=3,
        )


@cache
def _need_math_verify() -> None:
    if find_spec("math_verify") is None:
        raise ModuleNotFoundError(
            "got no math_verify, which compares the answers that exact arithmetic cannot: run "
            'pip install "llm-xrisk[math]"'
        )
