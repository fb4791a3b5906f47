# SPDX-License-Identifier: Apache-2.0
"""Exact values of formulas that are rational numbers, within a budget of bits."""

from collections.abc import Callable
from fractions import Fraction
from math import ceil, comb, factorial, floor

from reward.expression import Node

MAX_BITS = 25_000
"""Size of one number: 2006! has 19,000 bits."""
BUDGET = 400_000
"""Bits of all intermediate numbers of one formula together."""
MAX_EXPONENT = 10_000


class _NotRational(Exception):
    """The value is irrational, depends on a letter, is undefined or too large to have."""


def exact_value(node: Node) -> Fraction | None:
    r"""Return the value of a formula if it is a rational number that can be had cheaply.

    Powers, roots of perfect powers, factorials and binomials are computed; `50%` is 1/2, and
    degrees and bases are not read here.

    Example:
        >>> from reward.expression import parse_formula
        >>> [str(exact_value(parse_formula(t))) for t in (r"1\frac{4}{5}", "2^{10}", "50%", "x")]
        ['9/5', '1024', '1/2', 'None']
    """
    try:
        return _Evaluation().value(node)
    except (_NotRational, RecursionError):
        return None


class _Evaluation:
    def __init__(self) -> None:
        self.budget = BUDGET

    def value(self, node: Node) -> Fraction:
        if node.kind == "number" and isinstance(node.value, Fraction):
            return self.paid(node.value)
        rule = _RULES.get(node.kind)
        if rule is None:
            raise _NotRational(node.kind)
        result = rule(*(self.value(child) for child in node.children))
        return self.paid(result)

    def paid(self, value: Fraction) -> Fraction:
        bits = value.numerator.bit_length() + value.denominator.bit_length()
        self.budget -= bits
        if bits > 2 * MAX_BITS or self.budget < 0:
            raise _NotRational("too large")
        return value


def _total(*terms: Fraction) -> Fraction:
    result = Fraction(0)
    for term in terms:
        result += term
    return result


def _product(*factors: Fraction) -> Fraction:
    result = Fraction(1)
    for factor in factors:
        result *= factor
        if result.numerator.bit_length() + result.denominator.bit_length() > 2 * MAX_BITS:
            raise _NotRational("too large")
    return result


def _quotient(top: Fraction, bottom: Fraction) -> Fraction:
    if not bottom:
        raise _NotRational("division by zero")
    return top / bottom


def _power(base: Fraction, exponent: Fraction) -> Fraction:
    if exponent.denominator != 1:
        return _power(_root(base, Fraction(exponent.denominator)), Fraction(exponent.numerator))
    power = exponent.numerator
    size = base.numerator.bit_length() + base.denominator.bit_length()
    if abs(power) > MAX_EXPONENT or size * abs(power) > 2 * MAX_BITS:
        if abs(base) not in (0, 1):
            raise _NotRational("too large")
        power = power % 2 + 2 if power > 0 else -(power % 2) - 2
    if not base and power <= 0:
        raise _NotRational("zero to a power that is not positive")
    return base**power


def _root(base: Fraction, index: Fraction) -> Fraction:
    if index.denominator != 1 or not 1 <= index.numerator <= 64 or base < 0:
        raise _NotRational("no real root")
    degree = index.numerator
    return Fraction(_whole_root(base.numerator, degree), _whole_root(base.denominator, degree))


def _whole_root(number: int, degree: int) -> int:
    if number.bit_length() > 4000:
        raise _NotRational("too large")
    low, high = 0, 1 << (number.bit_length() // degree + 1)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if middle**degree <= number else (low, middle - 1)
    if low**degree != number:
        raise _NotRational("irrational")
    return low


def _factorial(number: Fraction) -> Fraction:
    if number.denominator != 1 or not 0 <= number <= 2500:
        raise _NotRational("no factorial")
    return Fraction(factorial(number.numerator))


def _binomial(top: Fraction, bottom: Fraction) -> Fraction:
    whole = top.denominator == bottom.denominator == 1
    if not whole or not 0 <= bottom <= top <= 10_000:
        raise _NotRational("no binomial")
    return Fraction(comb(top.numerator, bottom.numerator))


_RULES: dict[str, Callable[..., Fraction]] = {
    "add": _total,
    "mul": _product,
    "div": _quotient,
    "neg": lambda value: -value,
    "pow": _power,
    "root": _root,
    "percent": lambda value: value / 100,
    "factorial": _factorial,
    "binomial": _binomial,
    "abs": lambda value: abs(value),
    "floor": lambda value: Fraction(floor(value)),
    "ceil": lambda value: Fraction(ceil(value)),
}
