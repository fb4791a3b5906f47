# SPDX-License-Identifier: Apache-2.0
r"""What may not be paid in training: an answer that leaves the work undone, or that is too large.

An answer counts as evaluated if nothing is left to do that its notation announces. Numbers have
their usual notations: signs, fractions, mixed numbers, decimals, percentages, powers (`2^{10}` for
1024), roots, factorials, binomials, scientific notation and products of powers. Not evaluated, and
refused unless the gold answer itself has something of the same kind, are

- sums, products, integrals, limits and derivatives as operators, dots that stand for left-out
  terms, maxima, suprema, greatest common divisors, remainders, determinants;
- sums of like terms: `3+4`, `3a+a`, `50\sqrt{2}+20\sqrt{2}`;
- products of two plain numbers: `3\cdot 5`, `\frac{1}{2}\cdot\frac{3}{4}`;
- quotients of numbers that are whole, `48/2`, or of fractions;
- elementary functions of numbers, floors and absolute values: `\sin 30°`, `\log_2 8`.
"""

import re
from collections import Counter
from collections.abc import Iterator
from fractions import Fraction

from reward.expression import MAX_DIGITS, Node

MAX_CHARACTERS = 2000
MAX_GROUPS = 100
MAX_EXPONENT = 10_000
MAX_FACTORIAL = 1000
MAX_TOWER = 2

_OPERATORS = re.compile(
    r"\\(?:sum|prod|coprod|i{0,3}nt|oint|lim(?:sup|inf)?|ldots|max|min|sup|inf|arg(?:max|min)|gcd"
    r"|lcm|bmod|pmod|mod|det|partial|nabla|bigcup|bigcap|bigoplus)(?![A-Za-z])"
    r"|\\text\{(?:lcm|gcd|mod|max|min|lim|sum|det|tr|rank|Re|Im)\}|\.\.\.|\\frac\{d\}|\\frac\{d[^{}]{0,9}\}\{d[a-z]"
    r"|\b(?:sum|prod|product|integral|limit|gcd|lcm|mod)\b"
)
_DIGITS = re.compile(rf"\d{{{MAX_DIGITS + 1}}}")
_BIG_POWER = re.compile(r"(?:\^|\*\*)\s*[{(]?\s*[+-]?\s*(\d+)")
_FACTORIAL = re.compile(r"(\d+)\s*[})]?\s*!|\\binom\{?(\d+)")
_NESTING = re.compile(r"[({\[]|[)}\]]")


def too_large(text: str) -> str | None:
    """Say why an answer is not worth handing to an engine, or return `None` if it is.

    Example:
        >>> too_large("9^{9^{9^{9}}}"), too_large("2^{10}")
        ('powers nested 3 deep, at most 2', None)
    """
    if len(text) > MAX_CHARACTERS:
        return f"{len(text)} characters, at most {MAX_CHARACTERS}"
    if _DIGITS.search(text):
        return f"a number of more than {MAX_DIGITS} digits"
    depth = tower = 0
    powers: list[bool] = []
    for match in _NESTING.finditer(text):
        if match.group() in "({[":
            powers.append(text[: match.start()][-2:].rstrip().endswith(("^", "**")))
            depth, tower = max(depth, len(powers)), max(tower, sum(powers))
        elif powers:
            powers.pop()
    if depth > MAX_GROUPS:
        return f"groups nested {depth} deep, at most {MAX_GROUPS}"
    if tower > MAX_TOWER:
        return f"powers nested {tower} deep, at most {MAX_TOWER}"
    if any(_over(power, MAX_EXPONENT) for power in _BIG_POWER.findall(text)):
        return f"an exponent over {MAX_EXPONENT}"
    if any(_over(one or two, MAX_FACTORIAL) for one, two in _FACTORIAL.findall(text)):
        return f"a factorial over {MAX_FACTORIAL}"
    return None


def _over(digits: str, limit: int) -> bool:
    return len(digits) > len(str(limit)) or int(digits) > limit


def leftover_operator(gold: str, answer: str) -> str | None:
    r"""Return an operator of the answer that the gold answer has not, or `None`.

    Example:
        >>> leftover_operator("5050", r"\sum_{k=1}^{100}k")
        '\\sum'
    """
    known = set(_OPERATORS.findall(gold))
    return next((found for found in _OPERATORS.findall(answer) if found not in known), None)


def unevaluated(gold: Node | None, answer: Node) -> str | None:
    """Say what an answer leaves to be computed that the gold answer does not, or `None`.

    Example:
        >>> from reward.expression import parse_formula
        >>> unevaluated(parse_formula("7"), parse_formula("3+4"))
        'a sum of like terms'
    """
    allowed = set(_left_undone(gold)) if gold is not None else set()
    return next((kind for kind in _left_undone(answer) if kind not in allowed), None)


def _left_undone(node: Node) -> Iterator[str]:
    if node.kind == "add" and _like_terms(node):
        yield "a sum of like terms"
    if node.kind == "mul" and sum(map(_is_plain, node.children)) > 1:
        yield "a product of numbers"
    if node.kind == "div" and any(
        _is_plain(c) and _unsigned(c).kind == "div" for c in node.children
    ):
        yield "a quotient of fractions"
    if node.kind == "div" and _is_whole(node):
        yield "a quotient that is whole"
    if node.kind in {"function", "abs", "floor", "ceil"} and is_constant(node):
        yield "a function of a number"
    for child in node.children:
        yield from _left_undone(child)


def is_constant(node: Node) -> bool:
    """Tell whether a formula is without letters."""
    return node.kind not in {"symbol", "call"} and all(map(is_constant, node.children))


def _is_whole(node: Node) -> bool:
    """Tell whether digits over digits is a whole number, as in `48/2`."""
    top, bottom = (_unsigned(child).value for child in node.children)
    if not isinstance(top, Fraction) or not isinstance(bottom, Fraction) or not bottom:
        return False
    return bottom != 1 and (top / bottom).denominator == 1


def _unsigned(node: Node) -> Node:
    return node.children[0] if node.kind == "neg" else node


def _is_plain(node: Node) -> bool:
    """Tell whether a factor is a number as such: digits, or a fraction of digits."""
    node = _unsigned(node)
    if node.kind == "div":
        return all(_unsigned(child).kind == "number" for child in node.children)
    return node.kind == "number"


def _like_terms(node: Node) -> bool:
    counts = Counter(_without_coefficient(_unsigned(term)) for term in node.children)
    return max(counts.values()) > 1


def _without_coefficient(term: Node) -> Node:
    """Return what a term is a multiple of: `1` for a number, `x` for `3x`."""
    one = Node("number")
    if _is_plain(term) or term.kind == "percent":
        return one
    if term.kind == "div" and _is_plain(term.children[1]):
        return _without_coefficient(_unsigned(term.children[0]))
    if term.kind == "mul":
        rest = [factor for factor in term.children if not _is_plain(factor)]
        return rest[0] if len(rest) == 1 else Node("mul", tuple(sorted(rest, key=repr)))
    if term.kind in {"pow", "factorial", "binomial"} and is_constant(term):
        return one if all(map(_is_plain, term.children)) else term
    return term
