# SPDX-License-Identifier: Apache-2.0
r"""One value against another, as far as no engine is needed: text, units, exact rationals."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache

from reward.expression import Node, parse_formula
from reward.normalize import plain_text, without_spaces
from reward.rational import exact_value
from reward.strictness import is_constant, leftover_operator, unevaluated
from reward.units import NO_UNIT, Unit, conversion, letters_unit, split_unit

SIGNIFICANT = 3
"""Digits a decimal gold answer needs before a value may be compared at its precision."""

_TIME = re.compile(r"\d{1,2}:\d\d(?::\d\d)?(?: ?(?:\\text\{)?\s*[ap]\.?m\.?\}?)?", re.IGNORECASE)
_ANGLES = ((), (("degree", 1),))
_DECIMAL = re.compile(r"-?(\d*)\.(\d+)")
_PROSE = re.compile(r"\\(?!text)|[\d=<>+*/^_|]")
_CHOICE = re.compile(r"\(?([A-Ja-j])\)?")
_CHOICE_TEXT = re.compile(r"(?:\\text\{)?\s*\(?([A-J])(?:\)|[.:])(?![A-Za-z0-9]).*", re.DOTALL)


@dataclass(frozen=True)
class Value:
    """A value taken apart: its formula, if the grammar covers it, and its unit."""

    text: str
    body: str
    unit: Unit | None
    tree: Node | None

    @property
    def exact(self) -> Fraction | None:
        """The rational value, a percentage as its fraction, degrees as their number."""
        return exact_value(without_degree(self.tree)) if self.tree is not None else None

    @property
    def constant(self) -> bool:
        """Whether it is a formula without letters."""
        return self.tree is not None and is_constant(self.tree)


@lru_cache(maxsize=4096)
def read_value(text: str) -> Value:
    """Read one value from normalised text."""
    tree = parse_formula(text)
    if tree is not None and "\\text" not in text:
        return Value(text, text, NO_UNIT, tree)
    body, unit = split_unit(text)
    if body == text:
        return Value(text, text, unit, tree)
    return Value(text, body, unit, parse_formula(body.strip()))


def _with_letters_unit(value: Value) -> Value:
    body, unit = letters_unit(value.text)
    return value if unit is NO_UNIT else Value(value.text, body, unit, parse_formula(body))


def cheap_equal(gold_text: str, answer_text: str, strict: bool) -> bool | None:
    r"""Compare two values without an engine; `None` if that cannot tell.

    Example:
        >>> cheap_equal("0.5", r"\frac{1}{2}", True), cheap_equal("5", "5+0", True)
        (True, False)
        >>> cheap_equal(r"\sqrt{8}", r"2\sqrt{2}", True) is None
        True
    """
    if without_spaces(gold_text) == without_spaces(answer_text):
        return True
    if _TIME.fullmatch(gold_text) and (strict or _TIME.fullmatch(answer_text) or ":0" in gold_text):
        return False
    gold, answer = read_value(gold_text), read_value(answer_text)
    measured = _with_letters_unit(gold), _with_letters_unit(answer)
    if all(value.constant for value in measured):
        gold, answer = measured
    if answer.unit is None or refusal(gold, answer, strict):
        return False
    factor = conversion(gold.unit or NO_UNIT, answer.unit)
    if factor is None or (is_degree(gold.tree) and answer.unit.dimensions not in _ANGLES):
        return False
    if without_spaces(gold.body) == without_spaces(answer.body):
        return factor == 1
    if gold.tree is None or answer.tree is None:
        return _compare_words(gold, answer, strict)
    return _compare_numbers(gold, answer, factor, strict)


def refusal(gold: Value, answer: Value, strict: bool) -> str | None:
    """Say what an answer may not leave undone in strict mode, or `None`."""
    if not strict:
        return None
    operator = leftover_operator(gold.text, answer.text)
    if operator is not None:
        return f"{operator} is not evaluated"
    return unevaluated(gold.tree, answer.tree) if answer.tree is not None else None


def candidates(gold: Value, answer: Value, strict: bool) -> Iterator[Fraction]:
    """Yield the factors by which the answer's number may be multiplied before it is compared.

    A percentage is its fraction. When lenient, one of the two may also leave the sign out, as if
    the question had asked for the number of per cent: 35% for 35, not 0.5% for 0.5.
    """
    yield Fraction(1)
    if strict:
        return
    gold_percent, answer_percent = _is_percent(gold.tree), _is_percent(answer.tree)
    exact = gold.exact
    if answer_percent and not gold_percent and exact is not None and abs(exact) > 1:
        yield Fraction(100)
    if gold_percent and not answer_percent:
        yield Fraction(1, 100)


def rounds_to(gold: str, value: Fraction, answer_text: str) -> bool:
    r"""Tell whether a value rounds to a decimal gold answer with enough digits.

    Example:
        >>> rounds_to("0.458", Fraction(27, 59), r"\frac{27}{59}")
        True
    """
    match = _DECIMAL.fullmatch(gold.rstrip("%"))
    if match is None or len((match[1] + match[2]).lstrip("0")) < SIGNIFICANT:
        return False
    own = _DECIMAL.fullmatch(answer_text)
    if (own is not None and len(own[2]) <= len(match[2])) or re.fullmatch(r"-?\d+", answer_text):
        return False
    scale = 100 if gold.endswith("%") else 1
    half = Fraction(1, 2 * 10 ** len(match[2]) * scale)
    return abs(Fraction(gold.rstrip("%")) / scale - value) <= half


def without_degree(tree: Node | None) -> Node:
    """Return the formula with the degree sign of its whole taken off."""
    if tree is None:
        return Node("nothing")
    if tree.kind == "degree":
        return tree.children[0]
    if tree.kind == "neg" and tree.children[0].kind == "degree":
        return Node("neg", tree.children[0].children)
    return tree


def is_degree(tree: Node | None) -> bool:
    """Tell whether the whole formula is a number of degrees."""
    return tree is not None and without_degree(tree) != tree


def _is_percent(tree: Node | None) -> bool:
    if tree is None:
        return False
    return tree.kind == "percent" or (tree.kind == "neg" and tree.children[0].kind == "percent")


def _compare_words(gold: Value, answer: Value, strict: bool) -> bool | None:
    first, second = plain_text(gold.text), plain_text(answer.text)
    if first and first == second and not _PROSE.search(gold.text):
        return True
    letter = _CHOICE.fullmatch(first)
    chosen = _CHOICE_TEXT.fullmatch(answer.text)
    if letter is not None and chosen is not None and "\\text" in gold.text:
        return letter[1].casefold() == chosen[1].casefold()
    if letter is not None and _CHOICE.fullmatch(second):
        return letter[1].casefold() == second.strip("()")
    if _PROSE.search(gold.text) is None and _PROSE.search(answer.text) is None:
        return False if len(first) > 1 and len(second) > 1 else None
    if len(first) > 1 and gold.tree is None and not _PROSE.search(gold.text):
        return False  # words as gold, a formula as answer
    if strict and gold.tree is not None:
        return False  # an answer no grammar covers, where the gold is an ordinary formula
    return None


def _compare_numbers(gold: Value, answer: Value, factor: Fraction, strict: bool) -> bool | None:
    if gold.tree is None or answer.tree is None:
        return None
    if "based" in (gold.tree.kind, answer.tree.kind):
        return _compare_bases(gold.tree, answer.tree, strict)
    first, second = gold.exact, answer.exact
    if first is None or second is None:
        if first is not None and not is_constant(answer.tree) and strict:
            return False
        return None
    if is_degree(answer.tree) and not is_degree(gold.tree) and second and first == 0:
        return False
    second *= factor
    if any(first == second * scale for scale in candidates(gold, answer, strict)):
        return True
    return not strict and rounds_to(gold.body, second, answer.body)


def _compare_bases(gold: Node, answer: Node, strict: bool) -> bool | None:
    if gold.kind == answer.kind and gold.value == answer.value:
        return gold.children == answer.children
    if strict:
        return False
    return _in_base(gold) == _in_base(answer) if gold.kind != "based" else False


def _in_base(node: Node) -> Fraction | None:
    if node.kind != "based" or not isinstance(node.value, str):
        return exact_value(node)
    digits = str(exact_value(node.children[0]))
    try:
        return Fraction(int(digits, int(node.value)))
    except ValueError:
        return Fraction(-1)
