# SPDX-License-Identifier: Apache-2.0
r"""Are two formulas the same function? Their values at fixed points, with error bounds.

Runs in a worker, since a value may take long to compute. A value is a pair: the number and a bound
of its error in units of the working precision, so that `10^{50}+\sqrt{2}` and `10^{50}` are told
apart and `\sqrt{2}^2-2` and 0 are not. Two formulas are different if they differ by more than
their errors at one point; they are equal if they don't at any, at two precisions. mpmath comes
with math_verify; it is imported at the first call.
"""

import random
from collections.abc import Callable
from fractions import Fraction
from typing import Any, NamedTuple

from reward.expression import Node

DIGITS = 40
MAX_WORKING_DIGITS = 12_000
POINTS = 4
_SLACK = 1e6


class _Undefined(Exception):
    """The formula has no value at this point, or none that can be had here."""


class _Ball(NamedTuple):
    value: Any
    error: Any  # in units of the last place


def same_function(gold: Node, answer: Node, factors: tuple[Fraction, ...] = ()) -> bool | None:
    r"""Compare two formulas as functions of their letters.

    Args:
        gold: One formula.
        answer: The other.
        factors: Numbers by which the answer may be multiplied, one if there are none.

    Returns:
        `None` if there were not enough points at which both have a value.

    Example:
        >>> from reward.expression import parse_formula
        >>> same_function(parse_formula(r"\sqrt{8}x"), parse_formula(r"2\sqrt{2}x"))
        True
    """
    names = sorted(letters(gold) | letters(answer))
    return _agree(gold, answer, names, factors or (Fraction(1),))


def letters(node: Node) -> set[str]:
    """Return the names a formula depends on."""
    found = {str(node.value)} if node.kind == "symbol" else set()
    for child in node.children:
        found |= letters(child)
    return found


def same_equation(
    gold: tuple[Node, Node], answer: tuple[Node, Node], ordered: bool = False
) -> bool | None:
    """Tell whether two equations differ by a constant factor only, two inequalities by a positive.

    Args:
        gold: The two sides of one relation.
        answer: The two sides of the other.
        ordered: Whether the relations are inequalities.
    """
    first = Node("add", (gold[0], Node("neg", (gold[1],))))
    second = Node("add", (answer[0], Node("neg", (answer[1],))))
    names = letters(first)
    if names != letters(second) or not names:
        return None
    ratios = []
    for point in _points(sorted(names), POINTS):
        pair = _values(first, second, point, DIGITS)
        if pair is None or not pair[0].value or not pair[1].value:
            continue
        ratios.append(pair[0].value / pair[1].value)
    if len(ratios) < 2:
        return None
    if ordered and not all(ratio > 0 for ratio in ratios):
        return False
    return all(abs(ratio - ratios[0]) <= abs(ratios[0]) * 10 ** (10 - DIGITS) for ratio in ratios)


def _agree(
    gold: Node, answer: Node, names: list[str], factors: tuple[Fraction, ...]
) -> bool | None:
    left = list(factors)
    seen = 0
    for point in _points(names, POINTS if names else 1):
        for digits in (DIGITS, 0):
            digits = digits or _enough_digits(gold, answer, point)
            pair = _values(gold, answer, point, digits)
            if pair is None:
                break
            left = [factor for factor in left if _near(pair[0], pair[1], factor, digits)]
            if not left:
                return False
        else:
            seen += 1
    return True if seen >= (2 if names else 1) else None


def _points(names: list[str], count: int) -> list[dict[str, Fraction]]:
    """Return fixed points; the last are positive, for roots and logarithms."""
    source = random.Random(20240229)
    points = []
    for index in range(count):
        sign = -1 if index == 1 else 1
        values = [Fraction(source.randint(1100, 4900), 1009) for _ in names]
        points.append({name: sign * value for name, value in zip(names, values, strict=True)})
    return points


def _values(
    gold: Node, answer: Node, point: dict[str, Fraction], digits: int
) -> tuple[_Ball, _Ball] | None:
    import mpmath

    with mpmath.workdps(digits):
        try:
            evaluation = _Evaluation(mpmath.mp, point)
            first, second = evaluation.ball(gold), evaluation.ball(answer)
        except (_Undefined, ArithmeticError, ValueError, TypeError, NotImplementedError):
            return None
        if not all(mpmath.isfinite(ball.value) for ball in (first, second)):
            return None
        return first, second


def _near(gold: _Ball, answer: _Ball, factor: Fraction, digits: int) -> bool:
    import mpmath

    with mpmath.workdps(digits):
        scale = mpmath.mpf(factor.numerator) / factor.denominator
        error = (gold.error + answer.error * scale + abs(gold.value)) * mpmath.eps * _SLACK
        return bool(abs(gold.value - answer.value * scale) <= error)


def _enough_digits(gold: Node, answer: Node, point: dict[str, Fraction]) -> int:
    """Return a precision at which the smallest number inside still shows beside the largest."""
    import mpmath

    with mpmath.workdps(15):
        evaluation = _Evaluation(mpmath.mp, point)
        try:
            evaluation.ball(gold)
            evaluation.ball(answer)
        except (_Undefined, ArithmeticError, ValueError, TypeError, NotImplementedError):
            return 3 * DIGITS
        return min(3 * DIGITS + evaluation.spread, MAX_WORKING_DIGITS)


class _Evaluation:
    def __init__(self, mp: Any, point: dict[str, Fraction]) -> None:
        self.mp = mp
        self.point = point
        self.spread = 0
        self.known: dict[Node, _Ball] = {}

    def ball(self, node: Node) -> _Ball:
        if node not in self.known:
            result = self.compute(node)
            self.known[node] = _Ball(result.value, result.error + abs(result.value))
            if result.value:
                size = abs(result.value)
                self.spread = max(self.spread, abs(int(self.mp.mag(size) * 0.302)) * 2)
        return self.known[node]

    def compute(self, node: Node) -> _Ball:
        if node.kind in {"number", "symbol"}:
            value = node.value if node.kind == "number" else self.point[str(node.value)]
            if not isinstance(value, Fraction):
                raise _Undefined
            return _Ball(self.mp.mpf(value.numerator) / value.denominator, 0)
        if node.kind == "constant":
            return _Ball(self.constant(str(node.value)), 0)
        rule = _RULES.get(node.kind)
        if rule is None:
            raise _Undefined
        return rule(self, node, *(self.ball(child) for child in node.children))

    def constant(self, name: str) -> Any:
        known = {"pi": +self.mp.pi, "e": +self.mp.e, "i": self.mp.mpc(0, 1)}
        if name not in known:
            raise _Undefined
        return known[name]

    def total(self, node: Node, *balls: _Ball) -> _Ball:
        return _Ball(sum(ball.value for ball in balls), sum(ball.error for ball in balls))

    def product(self, node: Node, *balls: _Ball) -> _Ball:
        result = _Ball(self.mp.mpf(1), 0)
        for ball in balls:
            error = result.error * abs(ball.value) + ball.error * abs(result.value)
            result = _Ball(result.value * ball.value, error)
        return result

    def quotient(self, node: Node, top: _Ball, bottom: _Ball) -> _Ball:
        if abs(bottom.value) <= bottom.error * self.mp.eps * _SLACK:
            raise _Undefined
        value = top.value / bottom.value
        return _Ball(value, (top.error + abs(value) * bottom.error) / abs(bottom.value))

    def negative(self, node: Node, ball: _Ball) -> _Ball:
        return _Ball(-ball.value, ball.error)

    def percent(self, node: Node, ball: _Ball) -> _Ball:
        return _Ball(ball.value / 100, ball.error / 100)

    def degree(self, node: Node, ball: _Ball) -> _Ball:
        return _Ball(ball.value * self.mp.pi / 180, ball.error / 50)

    def power(self, node: Node, base: _Ball, exponent: _Ball) -> _Ball:
        if not base.value:
            if self.mp.re(exponent.value) <= 0:
                raise _Undefined
            return _Ball(self.mp.mpf(0), base.error)
        if self.mp.mag(exponent.value) > 64:
            raise _Undefined
        if exponent.value == int(self.mp.re(exponent.value)):
            value = base.value ** int(self.mp.re(exponent.value))
        else:
            value = self.mp.power(base.value, exponent.value)
        slope = abs(exponent.value) * base.error / abs(base.value)
        return _Ball(value, abs(value) * (slope + abs(self.mp.log(base.value)) * exponent.error))

    def root(self, node: Node, base: _Ball, index: _Ball) -> _Ball:
        if not index.value:
            raise _Undefined
        odd = index.value == int(self.mp.re(index.value)) and int(self.mp.re(index.value)) % 2
        if odd and not self.mp.im(base.value) and base.value < 0:
            return self.negative(node, self.root(node, _Ball(-base.value, base.error), index))
        if not base.value:
            return _Ball(self.mp.mpf(0), self.mp.sqrt(base.error))
        value = self.mp.power(base.value, 1 / index.value)
        error = base.error / abs(base.value) + index.error
        return _Ball(value, abs(value) * error)

    def factorial(self, node: Node, ball: _Ball) -> _Ball:
        if self.mp.mag(ball.value) > 20:
            raise _Undefined
        value = self.mp.factorial(ball.value)
        return _Ball(value, abs(value) * ball.error * 20)

    def binomial(self, node: Node, top: _Ball, bottom: _Ball) -> _Ball:
        if max(self.mp.mag(top.value), self.mp.mag(bottom.value)) > 20:
            raise _Undefined
        value = self.mp.binomial(top.value, bottom.value)
        return _Ball(value, abs(value) * (top.error + bottom.error + 100) * 40)

    def rounded(self, node: Node, ball: _Ball) -> _Ball:
        slack = ball.error * self.mp.eps * _SLACK
        nearest = self.mp.nint(ball.value)
        if abs(ball.value - nearest) <= slack:
            return _Ball(nearest, 0)  # an integer, up to rounding
        return _Ball(self.mp.floor(ball.value) + (node.kind == "ceil"), 0)

    def absolute(self, node: Node, ball: _Ball) -> _Ball:
        return _Ball(abs(ball.value), ball.error)

    def application(self, node: Node, *balls: _Ball) -> _Ball:
        """Evaluate an unknown function as some smooth function that depends on its name."""
        shift = self.mp.mpf(sum(map(ord, str(node.value)))) / 97
        value, error = shift, self.mp.mpf(0)
        for place, ball in enumerate(balls, 2):
            value += self.mp.sin(ball.value * place + shift) + ball.value**2 / (7 * place)
            error += ball.error * (place + abs(ball.value))
        return _Ball(value, error)

    def function(self, node: Node, ball: _Ball) -> _Ball:
        name = str(node.value)
        if self.mp.mag(ball.value) > 4000 or (name == "ln" and not ball.value):
            raise _Undefined
        value = _FUNCTIONS[name](self.mp)(ball.value)
        step = self.mp.mpf(10) ** -8
        moved = _FUNCTIONS[name](self.mp)(ball.value * (1 + step) + step * step)
        slope = abs((moved - value) / (ball.value * step + step * step)) + 1
        return _Ball(value, ball.error * slope * 2)


def _named(name: str) -> Callable[[Any], Callable[[Any], Any]]:
    return lambda mp: getattr(mp, name)


_FUNCTIONS = {
    name: _named(name)
    for name in ["sin", "cos", "tan", "cot", "sec", "csc", "asin", "acos", "atan"]
}
_FUNCTIONS |= {name: _named(name) for name in ["sinh", "cosh", "tanh", "coth"]}
_FUNCTIONS |= {"ln": _named("log"), "log": _named("log")}
_RULES: dict[str, Callable[..., _Ball]] = {
    "add": _Evaluation.total,
    "mul": _Evaluation.product,
    "div": _Evaluation.quotient,
    "neg": _Evaluation.negative,
    "pow": _Evaluation.power,
    "root": _Evaluation.root,
    "percent": _Evaluation.percent,
    "degree": _Evaluation.degree,
    "factorial": _Evaluation.factorial,
    "binomial": _Evaluation.binomial,
    "floor": _Evaluation.rounded,
    "ceil": _Evaluation.rounded,
    "abs": _Evaluation.absolute,
    "call": _Evaluation.application,
    "function": _Evaluation.function,
}
