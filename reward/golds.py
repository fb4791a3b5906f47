# SPDX-License-Identifier: Apache-2.0
"""Gold answers as a dataset gives them: text, numbers or lists, and which of them can be graded."""

import re
from collections.abc import Iterable, Iterator, Mapping
from decimal import Decimal
from fractions import Fraction
from math import isfinite
from numbers import Integral, Real
from typing import Any

from reward.extract import GSM8K, extract_answer
from reward.normalize import MAX_CHARACTERS, normalize_answer, plain_text

_GOLD_BOX = re.compile(r"\\(?:boxed|fbox)\s*\{")
_READABLE = re.compile(r"\w|\\emptyset|\\infty|\\\{\\\}")
_BRACE = re.compile(r"\\.|([{}])", re.DOTALL)


def read_golds(gold: object) -> Iterator[tuple[str, str]]:
    r"""Yield each gold answer as text, with the reason why it cannot be graded, or "".

    Example:
        >>> list(read_golds([r"$x=5$", "", 24, r"so \boxed{7}"]))
        [('$x=5$', ''), ('', 'an empty text'), ('24', ''), ('7', '')]
    """
    items = gold if isinstance(gold, list | tuple) else [gold]
    for item in items:
        text = _gold_text(item)
        if text is None:
            yield "", f"a gold of type {type(item).__name__}, need text or a finite number"
        else:
            yield text, _unreadable(text)


def validate_golds(
    dataset: Iterable[Mapping[str, Any]], column: str = "answer"
) -> list[tuple[int, str]]:
    """Find the rows whose gold answer cannot be graded, before training starts.

    Args:
        dataset: Rows as mappings, such as a `datasets.Dataset` or a list of dicts.
        column: The column with the gold answers.

    Returns:
        The number of each such row, with the reason.

    Example:
        >>> validate_golds([{"answer": "5"}, {"answer": ""}, {"answer": []}])
        [(1, 'an empty text'), (2, 'an empty list')]
    """
    problems = []
    for number, row in enumerate(dataset):
        if column not in row:
            raise ValueError(
                f"got row {number} with {', '.join(map(str, row))}, need {column!r}: name one"
            )
        reasons = [reason for _, reason in read_golds(row[column])] or ["an empty list"]
        if all(reasons):
            problems.append((number, reasons[0]))
    return problems


def _gold_text(gold: object) -> str | None:
    if isinstance(gold, bool):
        return None
    if isinstance(gold, Integral):
        return str(int(gold)) if abs(int(gold)) < 10**400 else None
    if isinstance(gold, Decimal | Fraction):
        return str(gold)
    if isinstance(gold, Real):
        value = float(gold)
        whole = isfinite(value) and value == int(value) and abs(value) < 1e16
        return (str(int(value)) if whole else repr(value)) if isfinite(value) else None
    if not isinstance(gold, str):
        return None
    if _GOLD_BOX.search(gold):
        return extract_answer(gold, mode="strict").answer or ""
    if "####" in gold:
        return extract_answer(gold, mode="strict", pattern=GSM8K).answer or ""
    return gold.strip()


def _unreadable(text: str) -> str:
    if len(text) > MAX_CHARACTERS:
        return f"a text of {len(text)} characters, need at most {MAX_CHARACTERS}"
    normal = normalize_answer(text)
    if not normal:
        return "an empty text"
    if not _READABLE.search(plain_text(normal)) and not _READABLE.search(normal):
        return f"the text {text[:80]!r} without a letter or digit"
    braces = [match[1] for match in _BRACE.finditer(text) if match[1]]
    if braces.count("{") != braces.count("}"):
        return f"the text {text[:80]!r} with braces that do not close"
    return ""
