# SPDX-License-Identifier: Apache-2.0
r"""The answer inside of a completion: the last box after the thinking, and for evaluation more.

Everything is linear in the length of the text, and what is found is a part of it, never the whole:
text without an answer must not be graded as one.
"""

import re
from collections import deque
from dataclasses import dataclass
from typing import Literal

Mode = Literal["strict", "lenient"]

GSM8K = r"####[ \t]*([^\n]+)"
"""Pattern of the answers in GSM8K's own solutions."""

WINDOW = 4000
"""Characters at the end of the text in which the markers of the lenient mode are looked for."""

_BOX = re.compile(r"\\(?:boxed|fbox|framebox)\s*\{")
_BRACE = re.compile(r"\\(?:boxed|fbox|framebox)\s*\{|\\.|[{}]", re.DOTALL)
_BARE_BOX = re.compile(r"\\boxed\s+(\\[A-Za-z]+|[^\s$\\{}]+)")
_MARKER = re.compile(
    r"(?:^|\n)[ \t>*#_-]{0,9}(?:the )?(?:final )?(?:answer|ans|a)(?: is)?[ \t*_]{0,9}[:=][ \t*_]*"
    r"([^\n]*)",
    re.IGNORECASE,
)
_SENTENCE = re.compile(
    r"\b(?:answer|result|solution)(?: [^\n.:$\\]{0,60}?)? (?:is|are|=|equals)[ \t*:_]*([^\n]*)"
    r"|\banswer[ \t*_]*:[ \t*_]*([^\n]*)",
    re.IGNORECASE,
)
_FORMULA = re.compile(
    r"\$\$([^$]+)\$\$|\$([^$\n]+)\$|\\\(([^\n]{0,400}?)\\\)|\\\[(.{0,800}?)\\\]", re.DOTALL
)
_NUMBER = re.compile(r"-?\$?(?:\d[\d,]*(?:\.\d+)?|\.\d+)(?:/\d+)?%?")
_DENIED = re.compile(
    r"(?:\bnot|n't|\bnever|\bwrong|\bincorrect)\s*[:*$(\\]{0,4}\s*$", re.IGNORECASE
)
_STOP = re.compile(r"[.!?](?=\s+[A-Z]|\s*$)|\s+(?:because|since|as)\s|\\\)\s*\.\s")


@dataclass(frozen=True)
class Extraction:
    r"""What was found, by which rule.

    Args:
        answer: The answer as written; `None` if there is none.
        rule: The rule that found it, or why nothing was found.
        truncated: Whether the text ends inside of its thinking.

    Example:
        >>> Extraction("5", "box").answer
        '5'
    """

    answer: str | None
    rule: str
    truncated: bool = False


def extract_answer(text: str, *, mode: Mode, pattern: str | None = None) -> Extraction:
    r"""Find the answer of a completion.

    In both modes only what follows the last `</think>` counts; a `<think>` that is never closed has
    no answer. In strict mode the answer is the last complete `\boxed{...}` or `\fbox{...}`; a last
    box that is empty or never closed means that there is none. In lenient mode, if there is no box
    at all, the answer is sought in `<answer>...</answer>`, after `####`, after "Answer:" or "the
    answer is", in the last formula between dollars, and at last it is the last number.

    Args:
        text: The completion.
        mode: "strict" for training, "lenient" for evaluation.
        pattern: A regular expression that replaces the box; its first group, or its whole match, is
            the answer, and the last match counts.

    Example:
        >>> extract_answer(r"\boxed{3}, no, \boxed{\frac{1}{2}}.", mode="strict").answer
        '\\frac{1}{2}'
        >>> extract_answer("#### 18", mode="strict", pattern=GSM8K).answer
        '18'
    """
    opened, closed = text.rfind("<think>"), text.rfind("</think>")
    if opened > closed:
        return Extraction(None, "the thinking is not closed", truncated=True)
    text = text[closed + len("</think>") :] if closed >= 0 else text
    if pattern is not None:
        found = _last_match(pattern, text)
        if found is not None or mode == "strict":
            return _found(found, "pattern")
    boxed = _last_box(text)
    if boxed is not None or mode == "strict":
        return _found(boxed, "box")
    return _by_marker(text)


def _found(answer: str | None, rule: str) -> Extraction:
    stripped = answer.strip() if answer is not None else ""
    if not stripped.strip("${} \\.") and "\\{" not in stripped:
        return Extraction(None, f"no {rule}" if answer is None else f"empty {rule}")
    return Extraction(stripped, rule)


def _last_match(pattern: str, text: str) -> str | None:
    last = next(iter(deque(re.finditer(pattern, text), maxlen=1)), None)
    if last is None:
        return None
    return last.group(1) if last.re.groups else last.group()


def _last_box(text: str) -> str | None:
    """Return the content of the last box, "" if it is not complete, `None` if there is no box.

    One pass with a stack: a box inside of a box is a part of the outer one, unless the outer one is
    never closed.
    """
    first = _BOX.search(text)
    if first is None:
        bare = next(iter(deque(_BARE_BOX.finditer(text), maxlen=1)), None)
        return bare.group(1) if bare is not None else None
    stack: list[tuple[int, int]] = []  # start and start of the content; -1 for another brace
    best = (-1, -1, -1)
    for match in _BRACE.finditer(text, first.start()):
        token = match.group()
        if token == "{":
            stack.append((match.start(), -1))
        elif token[-1] == "{" and len(token) > 2:
            stack.append((match.start(), match.end()))
        elif token == "}" and stack:
            start, content = stack.pop()
            if content >= 0:
                best = (start, content, match.start())
    unfinished = max((start for start, content in stack if content >= 0), default=-1)
    start, content, end = best
    return text[content:end] if start > unfinished else ""


def _by_marker(text: str) -> Extraction:
    text = text[-WINDOW:]
    tag = text.lower().rfind("<answer>")
    if tag >= 0:
        inside = text[tag + len("<answer>") :]
        return _found(inside[:end] if (end := inside.lower().find("</answer>")) >= 0 else "", "tag")
    hashes = _last_match(GSM8K, text)
    if hashes is not None:
        return _found(hashes, "####")
    for rule, pattern in (("marker", _MARKER), ("sentence", _SENTENCE)):
        matches = [match for match in pattern.finditer(text) if any(match.groups())]
        if matches:
            said = next(group for group in matches[-1].groups() if group)
            if re.match(r"\W*(?:not|never|n't)\b", said, re.IGNORECASE):
                return Extraction(None, "the answer is denied")
            return _found(_first_part(said), rule)
    formulas = list(_FORMULA.finditer(text))
    if formulas:
        if _DENIED.search(text[: formulas[-1].start()]):
            return Extraction(None, "the answer is denied")
        return _found(
            next(group for group in formulas[-1].groups() if group is not None), "formula"
        )
    numbers = list(_NUMBER.finditer(text))
    if numbers and _DENIED.search(text[: numbers[-1].start()]):
        return Extraction(None, "the answer is denied")
    return _found(numbers[-1].group().rstrip(",") if numbers else None, "number")


def _first_part(said: str) -> str:
    """Cut a sentence after its answer: at its formula, or at its full stop."""
    formula = _FORMULA.match(said.strip(" *_"))
    if formula is not None:
        return next(group for group in formula.groups() if group is not None)
    return _STOP.split(said, maxsplit=1)[0].strip(" *_.")
