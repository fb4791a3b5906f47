# SPDX-License-Identifier: Apache-2.0
r"""Units of measure behind, or currency signs before, a value: cut off, named and converted."""

import re
from collections import Counter
from dataclasses import dataclass, field
from fractions import Fraction
from functools import lru_cache

_TABLE: dict[str, dict[str, Fraction | int]] = {
    "length": {
        "nm": Fraction(1, 10**9), "mm millimeter millimetre": Fraction(1, 1000),
        "cm centimeter centimetre": Fraction(1, 100), "dm decimeter decimetre": Fraction(1, 10),
        "m meter metre": 1, "km kilometer kilometre": 1000,
        "in inch inche": Fraction(254, 10000), "ft foot feet": Fraction(3048, 10000),
        "yd yard": Fraction(9144, 10000), "mi mile": Fraction(1609344, 1000),
    },
    "time": {
        "ms millisecond": Fraction(1, 1000), "s sec second": 1, "min minute": 60,
        "h hr hour": 3600, "day": 86400, "week wk": 604800,
    },
    "month": {"month": 1, "year yr": 12},
    "mass": {
        "mg milligram": Fraction(1, 1000), "g gram": 1, "kg kilogram": 1000,
        "t ton tonne": 1_000_000, "lb pound": Fraction(45359237, 100000),
        "oz ounce": Fraction(45359237, 1600000),
    },
    "volume": {"ml milliliter millilitre": Fraction(1, 1000), "l liter litre": 1,
               "gal gallon": Fraction(3785411784, 10**9)},
    "dollar": {"dollar usd $": 1, "cent ¢": Fraction(1, 100)},
    "euro": {"euro eur €": 1},
    "sterling": {"gbp £": 1},
    "yen": {"yen ¥": 1},
    "yuan": {"yuan rmb": 1},
    "rupee": {"rupee ₹": 1},
    "degree": {"degree deg": 1},
    "radian": {"radian rad": 1},
}  # fmt: skip
_UNITS = {
    name: (dimension, Fraction(factor))
    for dimension, entries in _TABLE.items()
    for names, factor in entries.items()
    for name in names.split()
}
_SPEEDS = {"mph": "mile per hour", "kph": "km per hour", "kmh": "km per hour"}
_COMPOUND = {"square": 2, "sq": 2, "squared": 2, "cubic": 3, "cubed": 3, "cu": 3}
_NAMES = frozenset(
    ["sin", "cos", "tan", "cot", "sec", "csc", "ln", "log", "exp", "arcsin", "arccos", "arctan"]
)
_IDLE = frozenset(
    ["the", "a", "an", "of", "in", "total", "units", "unit", "exactly", "only", "each"]
)
_SINGLE = frozenset("msghLl")  # a letter that is a unit where the gold answer has no letters
HEDGES = re.compile(
    r"\b(?:not|or|maybe|perhaps|possibly|either|neither|nor|except|than|least|most|more|less"
    r"|between|under|over|above|below|wrong|incorrect|false|but|instead|unless|if|never|no)\b"
)
_TEXT_TAIL = re.compile(
    r"(?P<body>.*?[^\s])\s*(?P<unit>(?:(?:\\cdot|/|\\,|\s)*\\text\{[^{}]*\}(?:\^\{?-?\d\}?)?)+)",
    re.DOTALL,
)
_WORD_TAIL = re.compile(
    r"(?P<body>.*[\d)}°!])(?P<gap> ?)"
    r"(?P<unit>[A-Za-z]+(?:\^\{?\d\}?)?(?:(?: |/| per )[A-Za-z]+(?:\^\{?\d\}?)?)*\.?)",
    re.DOTALL,
)
_CURRENCY = re.compile(
    r"(?P<sign>-?)(?P<unit>US\$|[$€£¥₹])\s?(?P<body>(?:\d|\.|\\frac|-).*)", re.DOTALL
)
_UNIT_WORD = re.compile(
    r"(?P<per>\bper\b|/)|(?P<word>[^\W\d_]+|[$€£¥₹¢])(?:\^\{?(?P<power>-?\d)\}?)?"
)
_ORDINAL = re.compile(r"(\d)(?:st|nd|rd|th)\b")


@dataclass(frozen=True)
class Unit:
    """A unit: its factor to the base units, their exponents, and the words no table knows."""

    factor: Fraction = Fraction(1)
    dimensions: tuple[tuple[str, int], ...] = ()
    words: frozenset[str] = field(default_factory=frozenset)

    @property
    def empty(self) -> bool:
        """Whether there is no unit at all."""
        return not self.dimensions and not self.words


NO_UNIT = Unit()


@lru_cache(maxsize=4096)
def split_unit(text: str) -> tuple[str, Unit | None]:
    r"""Cut a unit off a normalised value.

    Returns:
        The value without its unit, and the unit; `None` as unit if the words behind the value take
        it back or leave it open (`4\text{ or more}`).

    Example:
        >>> body, unit = split_unit(r"15\text{ cm}^{2}")
        >>> body, unit.dimensions, str(unit.factor)
        ('15', (('length', 2),), '1/10000')
    """
    money = _CURRENCY.fullmatch(text)
    if money is not None:
        body, unit = split_unit(money["body"])
        return money["sign"] + body, unit and _joined(read_unit(money["unit"]), unit)
    tail = _TEXT_TAIL.fullmatch(text)
    if tail is not None:
        words = re.sub(r"\\text\{\s*([^{}]*?)\s*\}", r" \1", tail["unit"]).strip()
        letter = len(words) == 1 and words not in _UNITS
        if letter or words in _NAMES or not re.search(r"[\w$€£¢]", words):
            return text, NO_UNIT
        if tail["body"].count("{") != tail["body"].count("}"):
            return text, NO_UNIT
        return tail["body"], read_unit(words)
    plain = _WORD_TAIL.fullmatch(_ORDINAL.sub(r"\1", text))
    if plain is None:
        return text, NO_UNIT
    first = re.split(r"[ ^/]", plain["unit"])[0].rstrip(".")
    known = _singular(first) in _UNITS or first in _SPEEDS or first.lower() in _COMPOUND
    if (known and len(first) > 1) or (plain["gap"] and len(first) > 3):
        return plain["body"], read_unit(plain["unit"])
    return (plain["body"], NO_UNIT) if text != _ORDINAL.sub(r"\1", text) else (text, NO_UNIT)


def letters_unit(text: str) -> tuple[str, Unit]:
    """Cut a unit of few letters off, as in `5 m`; only where no letter can be a variable."""
    match = re.fullmatch(r"(-?[\d./]+|-?\\frac\{\d+\}\{\d+\}) ?([A-Za-z]{1,3})(\^\{[23]\})?", text)
    if match is None or match[2] not in _UNITS or (len(match[2]) == 1 and match[2] not in _SINGLE):
        return text, NO_UNIT
    return match[1], read_unit(match[2] + (match[3] or "")) or NO_UNIT


def read_unit(words: str) -> Unit | None:
    """Read the words of a unit; `None` if one of them is a hedge."""
    if HEDGES.search(words.lower()) or re.search(r"\d", re.sub(r"\^\{?-?\d\}?", "", words)):
        return None
    for name, long in _SPEEDS.items():
        words = re.sub(rf"\b{name}\b", long, words)
    factor, dimensions, unknown = Fraction(1), Counter[str](), set[str]()
    sign, ahead, last = 1, 1, ""
    for match in _UNIT_WORD.finditer(words.replace(".", "").replace("$", " $ ")):
        word = match["word"] or ""
        if match["per"]:
            sign = -1
        elif word.lower() in {"square", "sq", "cubic", "cu"}:
            ahead = _COMPOUND[word.lower()]
        elif word.lower() in {"squared", "cubed"} and last in _UNITS:
            power = sign * (_COMPOUND[word.lower()] - 1)
            dimensions[_UNITS[last][0]] += power
            factor *= _UNITS[last][1] ** power
        elif (last := _singular(word)) in _UNITS:
            power = sign * ahead * int(match["power"] or 1)
            dimensions[_UNITS[last][0]] += power
            factor *= _UNITS[last][1] ** power
            ahead = 1
        elif last not in _IDLE:
            unknown.add(last)
    kept = tuple(sorted((name, power) for name, power in dimensions.items() if power))
    return Unit(factor, kept, frozenset(unknown))


def conversion(gold: Unit, answer: Unit) -> Fraction | None:
    """Return what one unit of the answer is in units of the gold, or `None` if they differ in kind.

    A missing unit fits any: the question names it. So does a word for what is counted, if one of
    the two names contains the other.

    Example:
        >>> str(conversion(read_unit("m"), read_unit("cm")))
        '1/100'
        >>> conversion(read_unit("m"), read_unit("s")) is None
        True
    """
    if gold.empty or answer.empty:
        return Fraction(1)
    if gold.dimensions == answer.dimensions:
        nested = gold.words <= answer.words or answer.words <= gold.words
        return answer.factor / gold.factor if nested or gold.dimensions != () else None
    if gold.words and answer.words and gold.words & answer.words:
        return Fraction(1)
    return None


def _joined(first: Unit | None, second: Unit) -> Unit | None:
    if first is None:
        return None
    powers = Counter(dict(first.dimensions))
    if first.dimensions != second.dimensions:  # $5 dollars is $5
        powers.update(dict(second.dimensions))
    else:
        return second if second.factor == first.factor else None
    kept = tuple(sorted((name, power) for name, power in powers.items() if power))
    return Unit(first.factor * second.factor, kept, first.words | second.words)


def _singular(word: str) -> str:
    if word in _UNITS:
        return word
    word = word.lower()
    if word in _UNITS or word in _IDLE:
        return word
    for ending in ("es", "s"):
        if word.endswith(ending) and word[: -len(ending)] in _UNITS:
            return word[: -len(ending)]
    return word[:-1] if word.endswith("s") and len(word) > 3 else word
