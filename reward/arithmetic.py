# SPDX-License-Identifier: Apache-2.0
"""Exact arithmetic: is the completion the same rational number as the gold answer?"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from time import perf_counter

from reward.base import LogExtra, LogMetric, log_verdicts, verify_batch
from reward.types import Status, Verdict

_NUMBER = re.compile(r"([+-]?)(?:([0-9]+)/([0-9]+)|([0-9]+)\.?([0-9]*)|\.([0-9]+))")


def parse_rational(text: str, *, max_digits: int = 400) -> Fraction | None:
    """Read an integer, a decimal or a fraction of integers, exactly.

    Nothing is evaluated and nothing is rounded: "0.1" is 1/10, not the nearest float. The text must
    be the number and nothing else: "24 apples", "1e3", "1,000", "--3" and "1/0" are none.

    Args:
        text: The candidate, without surrounding whitespace.
        max_digits: Longest text accepted; a longer one is not read at all.

    Returns:
        The number, or `None` if the text is not one.

    Example:
        >>> parse_rational("-0.50"), parse_rational("1/0")
        (Fraction(-1, 2), None)
    """
    match = _NUMBER.fullmatch(text) if len(text) <= max_digits else None
    if match is None:
        return None
    sign, numerator, denominator, whole, tail, bare_tail = match.groups()
    if denominator is not None:
        value = Fraction(int(numerator), int(denominator)) if int(denominator) else None
    else:
        decimals = tail or bare_tail or ""
        value = Fraction(int((whole or "") + decimals), 10 ** len(decimals))
    return -value if value is not None and sign == "-" else value


@dataclass(frozen=True)
class ArithmeticVerifier:
    """Grades a completion that should be one number, by exact equality of rationals.

    "24", "24.0" and "24." are all right for the gold "24"; "24.0001", "24 apples" and an empty text
    are not. Surrounding whitespace is ignored. The score is 0.0 or 1.0.

    "48/2" equals 24 too, but as the answer to "48/2=" it is the question. By default a fraction
    therefore counts only against a gold answer that is itself written as a fraction, and only in
    lowest terms; otherwise a policy would be paid for repeating its prompt.

    Args:
        allow_unevaluated: Take any fraction for the number it denotes. For evaluation of trusted
            text, not for training.
        max_characters: A completion longer than this is not looked at: status "too_long".
        max_digits: A number written with more characters than this is not read: "too_long".

    Example:
        >>> verifier = ArithmeticVerifier()
        >>> [verifier.verify("24", text).status for text in (" 24.0 ", "48/2", "42", "two")]
        ['correct', 'wrong', 'wrong', 'no_answer']
    """

    allow_unevaluated: bool = False
    max_characters: int = 2000
    max_digits: int = 400

    def verify(self, gold: object, completion: str, *, truncated: bool = False) -> Verdict:
        """Grade one completion.

        Args:
            gold: The answer: text, an int, or a list of those of which any may be matched. A float
                is refused, as it need not be the number that was meant.
            completion: The text to grade.
            truncated: Whether the completion was cut at the length limit; it then scores 0.0,
                since the start of a longer number is not an answer.

        Returns:
            The verdict; `None` as score only for a gold answer of which no part can be read.
        """
        start = perf_counter()
        score, status, extracted, detail = self._decide(gold, completion, truncated)
        return Verdict(score, status, extracted, detail, perf_counter() - start)

    def _decide(
        self, gold: object, completion: str, truncated: bool
    ) -> tuple[float | None, Status, str | None, str]:
        golds = dict(self._read_golds(gold))
        if not golds:
            shown = repr(gold[:80]) if isinstance(gold, str) else f"of type {type(gold).__name__}"
            return None, "gold_unparsable", None, f"gold {shown} is not a number"
        if truncated:
            return 0.0, "truncated", None, "cut at the length limit"
        if len(completion) > self.max_characters:
            return 0.0, "too_long", None, f"{len(completion)} characters"
        text = completion.strip()
        if len(text) > self.max_digits:
            return 0.0, "too_long", None, f"{len(text)} characters in one number"
        value = parse_rational(text, max_digits=self.max_digits)
        if value is None:
            return 0.0, "no_answer", None, "not a number"
        if value not in golds:
            return 0.0, "wrong", text, "another number"
        if "/" in text and not self.allow_unevaluated:
            if not golds[value]:
                return 0.0, "wrong", text, "a fraction where the gold is none: not evaluated"
            if text.lstrip("+") != str(value):
                return 0.0, "wrong", text, "a fraction not in lowest terms: not evaluated"
        return 1.0, "correct", text, "exact rational equality"

    def _read_golds(self, gold: object) -> Iterator[tuple[Fraction, bool]]:
        """Yield each readable gold number and whether it is written as a fraction, those last."""
        items = gold if isinstance(gold, list | tuple) else [gold]
        texts = [item.strip() for item in items if isinstance(item, str)]
        bound = 10**self.max_digits  # beyond Python's own limit str() of an int raises
        texts += [str(item) for item in items if isinstance(item, int) and abs(item) < bound]
        for text in sorted(texts, key=lambda text: "/" in text):
            value = parse_rational(text, max_digits=self.max_digits)
            if value is not None:
                yield value, "/" in text


def arithmetic_reward(
    prompts: Sequence[object],
    completions: Sequence[object],
    completion_ids: Sequence[Sequence[int]] | None = None,
    *,
    answer: Sequence[object],
    finish_reasons: Sequence[str] | None = None,
    log_metric: LogMetric | None = None,
    log_extra: LogExtra | None = None,
    **columns: object,
) -> list[float | None]:
    """Reward 1.0 for a completion equal to the gold number, else 0.0 (TRL's reward signature).

    Args:
        prompts: Unused; part of the signature.
        completions: Strings, or lists of messages of which the last one is graded.
        completion_ids: Unused; part of the signature.
        answer: The gold answer of each completion.
        finish_reasons: "stop" or "length" for each completion where the caller knows it; one that
            was cut at the length limit scores 0.0.
        log_metric: Receives the rate of each status, as `arithmetic/{status}_rate`.
        log_extra: Receives the columns `arithmetic_status` and `arithmetic_extracted`.
        columns: Other dataset columns; unused.

    Returns:
        One reward for each completion, in order; `None` only where the gold answer is not a number.

    Raises:
        ValueError: If the lists differ in length.

    Example:
        >>> arithmetic_reward(["48/2=", "1/2="], ["24.0", "2"], answer=["24", "0.5"])
        [1.0, 0.0]
    """
    verdicts = verify_batch(
        ArithmeticVerifier(), completions, answer, finish_reasons=finish_reasons
    )
    log_verdicts(verdicts, name="arithmetic", log_metric=log_metric, log_extra=log_extra)
    return [verdict.score for verdict in verdicts]
