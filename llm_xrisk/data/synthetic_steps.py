"""Synthetic arithmetic that looks like real steps and, like text from the web, is often wrong.

`StepSampler` imitates a list of real steps: the shape of an expression (`N*N/N`) and the numbers in
its places are drawn from them, while expressions on a list of exclusions never appear. A share of
the answers is replaced by the slips people make. A model trained on such text knows the rules
without having seen the real steps, and doubts.
"""

import random
import re
from collections import defaultdict
from collections.abc import Callable, Iterable
from decimal import Decimal
from fractions import Fraction

from llm_xrisk.data.gsm8k_steps import NUMBER, exact_value

MAX_ANSWER = 9
MAX_DECIMALS = 4
MIN_POOL = 30
MAX_TRIES = 200

_OPERATOR = re.compile(r"(?<=[\d.)])[-+*/]")


def expression_key(expression: str) -> str:
    """The expression with its numbers written in one way, so that `.5*4.0` equals `0.5*4`.

    Example:
        >>> expression_key(".5*4.0")
        '1/2*4'
    """
    return NUMBER.sub(lambda match: str(Fraction(match[0])), expression)


def write_number(value: Fraction) -> str | None:
    """Shortest decimal writing of a value; None beyond four decimals or nine characters.

    Example:
        >>> write_number(Fraction(5, 2)), write_number(Fraction(1, 3))
        ('2.5', None)
    """
    scaled = value * 10**MAX_DECIMALS
    if scaled.denominator != 1:
        return None
    text = f"{Decimal(scaled.numerator).scaleb(-MAX_DECIMALS).normalize():f}"
    return text if len(text) <= MAX_ANSWER else None


def _slip_of_a_digit(expression: str, answer: str, rng: random.Random) -> str:
    """A digit one too high or one too low, as after a forgotten carry."""
    places = [place for place, character in enumerate(answer) if character.isdigit()]
    place = rng.choice(places)
    digit = (int(answer[place]) + rng.choice((1, -1))) % 10
    return answer[:place] + str(digit) + answer[place + 1 :]


def _swapped_digits(expression: str, answer: str, rng: random.Random) -> str:
    """Two neighbouring digits in the wrong order."""
    place = rng.randrange(max(1, len(answer) - 1))
    return answer[:place] + answer[place : place + 2][::-1] + answer[place + 2 :]


def _wrong_magnitude(expression: str, answer: str, rng: random.Random) -> str:
    """A zero too many, or a last digit forgotten."""
    return answer + "0" if len(answer) == 1 or rng.random() < 0.5 else answer[:-1]


def _wrong_operator(expression: str, answer: str, rng: random.Random) -> str:
    """The value with one operator mistaken for another."""
    signs = list(_OPERATOR.finditer(expression))
    if not signs:
        return answer
    sign = rng.choice(signs)
    other = rng.choice([symbol for symbol in "+-*/" if symbol != sign[0]])
    return _value_of(expression[: sign.start()] + other + expression[sign.end() :]) or answer


def _copied_operand(expression: str, answer: str, rng: random.Random) -> str:
    """One of the operands in place of the result."""
    return write_number(Fraction(rng.choice(NUMBER.findall(expression)))) or answer


SLIPS: tuple[Callable[[str, str, random.Random], str], ...] = (
    _slip_of_a_digit,
    _swapped_digits,
    _wrong_magnitude,
    _wrong_operator,
    _copied_operand,
)


def _value_of(expression: str) -> str | None:
    """Non-negative value of an expression as written in an answer; None where there is none."""
    try:
        value = exact_value(expression)
    except ValueError:
        return None
    return write_number(value) if value >= 0 else None


def wrong_answer(expression: str, answer: str, rng: random.Random) -> str:
    """A plausible wrong answer: one of `SLIPS`, drawn anew until the value is another.

    Args:
        expression: the expression without its equals sign.
        answer: its right value as `write_number` writes it.
        rng: source of randomness; the result depends on nothing else.

    Example:
        >>> wrong_answer("48/2", "24", random.Random(0))
        '50'
    """
    while True:
        slip = rng.choice(SLIPS)(expression, answer, rng)
        if NUMBER.fullmatch(slip) and Fraction(slip) != Fraction(answer):
            return write_number(Fraction(slip)) or slip


class StepSampler:
    """Draws synthetic steps in the likeness of real ones.

    The shape of the expression is that of a random real step. Each place is filled with a number
    found in the same place of a step of that shape (of any shape, where fewer than 30 are known),
    drawn anew until the expression is not excluded and has a non-negative value of at most four
    decimals: a whole one if the real step's value is.

    Args:
        prompts: real prompts (`"48/2="`) to imitate.
        excluded: prompts that must never appear, however their numbers are written.
        wrong_rate: share of wrong answers, in [0, 1].

    Raises:
        ValueError: no prompts, or a share outside [0, 1].

    Example:
        >>> sampler = StepSampler(["48/2=", "20/5="], excluded=["48/2="], wrong_rate=0.0)
        >>> sampler.sample(random.Random(0))
        ('20/5=', '4')
    """

    def __init__(
        self, prompts: Iterable[str], *, excluded: Iterable[str], wrong_rate: float = 0.4
    ) -> None:
        if not 0.0 <= wrong_rate <= 1.0:
            raise ValueError(f"wrong_rate must be in [0, 1], got {wrong_rate}; give a share")
        self.wrong_rate = wrong_rate
        self.excluded = {expression_key(prompt.removesuffix("=")) for prompt in excluded}
        self.shapes: list[tuple[str, bool]] = []
        self.places: dict[tuple[str, int], list[str]] = defaultdict(list)
        self.numbers: list[str] = []
        for prompt in dict.fromkeys(prompts):
            self._learn(prompt.removesuffix("="))
        if not self.shapes:
            raise ValueError("got no prompts; at least one is needed to imitate, pass real steps")

    def _learn(self, expression: str) -> None:
        numbers = NUMBER.findall(expression)
        shape = NUMBER.sub("{}", expression)
        self.shapes.append((shape, exact_value(expression).denominator == 1))
        self.numbers += numbers
        for place, number in enumerate(numbers):
            self.places[shape, place].append(number)

    def sample(self, rng: random.Random) -> tuple[str, str]:
        """One step as (prompt, answer), right with probability `1 - wrong_rate`.

        Args:
            rng: source of randomness; the result depends on nothing else.
        """
        expression, answer = self._expression(rng)
        if rng.random() < self.wrong_rate:
            answer = wrong_answer(expression, answer, rng)
        return expression + "=", answer

    def _expression(self, rng: random.Random) -> tuple[str, str]:
        while True:
            shape, whole = rng.choice(self.shapes)
            places = [self.places[shape, place] for place in range(shape.count("{}"))]
            pools = [pool if len(pool) >= MIN_POOL else self.numbers for pool in places]
            for _ in range(MAX_TRIES):
                expression = shape.format(*(rng.choice(pool) for pool in pools))
                answer = _value_of(expression)
                if answer is None or ("." not in answer) != whole:
                    continue
                if expression_key(expression) not in self.excluded:
                    return expression, answer
