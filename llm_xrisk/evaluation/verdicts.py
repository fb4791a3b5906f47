# SPDX-License-Identifier: Apache-2.0
"""Answers in a file and their verdicts: reading, comparing with labels, tables for the terminal."""

import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from reward.base import completion_text
from reward.types import Verdict

STYLES = (None, "bare", "text")
MAX_RULES = 20
_QUOTED = re.compile(r"'[^']*'|\"[^\"]*\"|\b[0-9]{3,}\b")
OUTCOMES = ("TP", "FP", "TN", "FN")


@dataclass(frozen=True)
class Answer:
    """A line of the file.

    Args:
        number: Of the line, from 1.
        fields: The object as it stands there.
        completion: The text to grade.
        gold: What it is compared with.
        truncated: Whether it was cut at the length limit.
        expected: The label: whether it is right.
    """

    number: int
    fields: dict[str, Any]
    completion: str
    gold: Any
    truncated: bool = False
    expected: bool | None = None

    def outcome(self, verdict: Verdict) -> str:
        """Return TP, FP, TN or FN for a labelled answer; what cannot be graded is not paid."""
        paid = is_paid(verdict)
        return ("T" if paid == self.expected else "F") + ("P" if paid else "N")


def is_paid(verdict: Verdict) -> bool:
    """Whether an answer counts as right.

    Example:
        >>> is_paid(Verdict(1.0, "correct")), is_paid(Verdict(None, "gold_unparsable"))
        (True, False)
    """
    return verdict.score is not None and verdict.score >= 1.0


def read_answers(path: Path, *, box_bare: bool = True) -> list[Answer]:
    r"""Read JSON lines; a blank line is none.

    A line is an object with `completion` (text or messages) and `answer`, or in their place
    `prediction` and `gold`. The tests of a program may be fields of the line: `test` with
    `entry_point`, or `inputs` and `outputs`. `style` is "bare" where the answer stands alone,
    `expected` the label, and `finish_reason` "length" where the completion was cut.

    Args:
        path: The file.
        box_bare: Put a bare answer in `\boxed{}`, as a verifier of mathematics wants it.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If a line is not such an object; the message says which.
    """
    if not path.is_file():
        raise FileNotFoundError(f"got {path}, which is no file; need JSON lines")
    lines = enumerate(path.read_bytes().split(b"\n"), start=1)
    return [_answer(number, line, box_bare) for number, line in lines if line.strip()]


def _answer(number: int, line: bytes, box_bare: bool) -> Answer:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        shown = line[:60].decode("utf-8", "backslashreplace").strip()
        raise ValueError(
            f"line {number} is {shown!r}, which is no JSON; need an object with completion and "
            "answer on every line"
        ) from error
    if not isinstance(row, dict):
        raise ValueError(f"line {number} is {line[:60]!r}; need an object with completion, answer")
    tests = row if {"test", "inputs"} & set(row) else None
    completion = row.get("completion", row.get("prediction"))
    gold = row.get("answer", row.get("gold", tests))
    found = {"completion": completion, "answer": gold}
    missing = [name for name, value in found.items() if value is None]
    if missing:
        raise ValueError(f"line {number} has {sorted(row)} and lacks {missing}")
    if not isinstance(completion, str | list):
        raise ValueError(
            f"line {number} has the completion {completion!r:.60}; need text or a list of messages"
        )
    style, expected = row.get("style"), row.get("expected")
    if style not in STYLES or expected not in (None, True, False):
        raise ValueError(
            f"line {number} has style {style!r} and expected {expected!r}; need bare or text, and "
            "true or false, or neither"
        )
    text = completion_text(completion)
    text = f"\\boxed{{{text}}}" if style == "bare" and box_bare else text
    return Answer(number, row, text, gold, row.get("finish_reason") == "length", expected)


def write_graded(path: Path, answers: Iterable[Answer], verdicts: Iterable[Verdict]) -> None:
    """Write every line with its verdict, so that the file is there in full or not at all."""
    lines = [
        json.dumps(answer.fields | asdict(verdict), ensure_ascii=False) + "\n"
        for answer, verdict in zip(answers, verdicts, strict=True)
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial")
    # half a surrogate pair is no UTF-8; its escape is the same text to JSON
    partial.write_text("".join(lines), encoding="utf-8", errors="backslashreplace", newline="\n")
    os.replace(partial, path)


def tables(
    answers: Sequence[Answer], verdicts: Sequence[Verdict], *, title: str, show: int = 20
) -> Iterator[Table]:
    """Yield tables of statuses, of rules that decided, of latency and, given labels, of errors.

    Args:
        answers: What was graded.
        verdicts: One for each.
        title: Of the first table: with what it was graded.
        show: How many answers that were graded against their label are listed.
    """
    pairs = list(zip(answers, verdicts, strict=True))
    yield _shares(f"{len(pairs)} answers, {title}", "status", [v.status for _, v in pairs])
    yield _rules(pairs)
    yield _latency([verdict.seconds for verdict in verdicts])
    labelled = [(answer, verdict) for answer, verdict in pairs if answer.expected is not None]
    if not labelled:
        return
    yield _confusion(labelled)
    wrong = [(a, v) for a, v in labelled if a.outcome(v)[0] == "F"]
    if wrong and show:
        yield _errors(wrong, show)


def _shares(title: str, name: str, values: Sequence[str]) -> Table:
    table = _table(name, "answers", "share", title=title)
    for value, count in Counter(values).most_common():
        table.add_row(value, str(count), _percent(count, len(values)))
    return table


def _rules(pairs: Sequence[tuple[Answer, Verdict]]) -> Table:
    labelled = any(answer.expected is not None for answer, _ in pairs)
    table = _table("decided by", "answers", "paid", *(OUTCOMES if labelled else ()))
    groups = _grouped(pairs, lambda answer, verdict: _rule(verdict))
    ordered = sorted(groups.items(), key=lambda item: -len(item[1]))
    rare = [pair for _, group in ordered[MAX_RULES:] for pair in group]
    shown = [
        *ordered[:MAX_RULES],
        *([(f"{len(ordered) - MAX_RULES} others", rare)] if rare else []),
    ]
    for rule, group in shown:
        paid = sum(is_paid(verdict) for _, verdict in group)
        table.add_row(
            _shown(rule, 60), str(len(group)), str(paid), *(_counts(group) if labelled else ())
        )
    return table


def _latency(seconds: Sequence[float]) -> Table:
    ordered = sorted(seconds) or [0.0]
    table = _table("milliseconds", "median", "p90", "p99", "max", "sum")
    at = [ordered[round(level * (len(ordered) - 1))] for level in (0.5, 0.9, 0.99, 1.0)]
    table.add_row("for one answer", *(f"{1000 * x:.2f}" for x in [*at, sum(ordered)]))
    return table


def _confusion(labelled: Sequence[tuple[Answer, Verdict]]) -> Table:
    title = f"verdicts on {len(labelled)} labelled answers"
    table = _table("", "answers", *OUTCOMES, "recall", "specificity", title=title)
    for name in ("tier", "source"):
        groups = _grouped(labelled, lambda answer, _, name=name: str(answer.fields.get(name, "")))
        if set(groups) == {""}:
            continue
        for group in sorted(groups):
            table.add_row(_shown(f"{name} {group or 'not given'}", 100), *_rates(groups[group]))
        table.add_section()
    table.add_row("all", *_rates(labelled))
    return table


def _errors(wrong: Sequence[tuple[Answer, Verdict]], show: int) -> Table:
    more = f", the first {show}" if len(wrong) > show else ""
    title = f"{len(wrong)} verdicts against their label{more}"
    table = _table("line", title=title)
    for name in ("", "gold", "answer", "decided by"):
        table.add_column(name)
    for answer, verdict in wrong[:show]:
        what = verdict.extracted if verdict.extracted is not None else answer.completion
        texts = [_shown(str(answer.gold), 60), _shown(what, 60), _shown(verdict.detail, 60)]
        table.add_row(str(answer.number), answer.outcome(verdict), *texts)
    return table


def _rule(verdict: Verdict) -> str:
    """Return the detail without what it quotes of this one answer."""
    return _QUOTED.sub("...", verdict.detail) or verdict.status


def _grouped(
    pairs: Iterable[tuple[Answer, Verdict]], key: Callable[[Answer, Verdict], str]
) -> dict[str, list[tuple[Answer, Verdict]]]:
    groups: dict[str, list[tuple[Answer, Verdict]]] = {}
    for answer, verdict in pairs:
        groups.setdefault(key(answer, verdict), []).append((answer, verdict))
    return groups


def _counts(pairs: Iterable[tuple[Answer, Verdict]]) -> list[str]:
    counts = Counter(a.outcome(v) for a, v in pairs if a.expected is not None)
    return [str(counts[outcome]) for outcome in OUTCOMES]


def _rates(pairs: Sequence[tuple[Answer, Verdict]]) -> list[str]:
    counts = _counts(pairs)
    tp, fp, tn, fn = map(int, counts)
    return [str(len(pairs)), *counts, _percent(tp, tp + fn), _percent(tn, tn + fp)]


def _percent(part: int, whole: int) -> str:
    return f"{100 * part / whole:.1f} %" if whole else "-"


def _shown(text: str, limit: int) -> str:
    """Return text that is safe in a table: nothing of it moves the cursor or is markup."""
    cut = text if len(text) <= limit else f"{text[: limit - 3]}..."
    return escape("".join(c if c.isprintable() else repr(c)[1:-1] for c in cut))


def _table(first: str, *others: str, title: str | None = None) -> Table:
    table = Table(first, title=title, min_width=len(title or "") + 2)
    for name in others:
        table.add_column(name, justify="right")
    return table
