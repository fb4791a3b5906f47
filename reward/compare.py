# SPDX-License-Identifier: Apache-2.0
r"""Is this answer the gold answer? The layers that need no engine, and what is refused before one.

The order is: refusals, equal text, equal shapes with equal values. Order matters in `(1,2)` and not
in `\{1,2\}` or `1,2`; how often an item occurs always matters. A single gold answer is never
matched by a list. An inequality as gold is matched by the interval it describes, never the other
way round: a policy could otherwise repeat the inequality of the question.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise, product
from typing import Literal

from reward.normalize import normalize_answer, plain_text, without_spaces
from reward.strictness import leftover_operator, too_large
from reward.structure import Shape, ascending, is_name, read_shape
from reward.types import Status
from reward.values import cheap_equal, read_value

Leaf = Callable[[str, str, bool], bool | None]

MAX_UNORDERED = 40
SLACK = Fraction(1, 20)  # by which rounded numbers may differ

_QUALIFIER = re.compile(
    r"(?:,|;|\\text\{,?)?\s*(?:\\text\{\s*)?[,(]?\s*\b(?:where|with|such that|when|is both|is the"
    r"|for (?:all|some|any|every|each|integers?)|is a|are the)\b"
)
_READABLE = re.compile(r"\w")
_SYMBOLIC = re.compile(r"\\(?:infty|emptyset|pi|mathbb|\{\\\})|\\[A-Za-z]+")
_OTHER_SETS = re.compile(r"\\(?:begin|ldots|setminus|cap|mathbb)")


@dataclass(frozen=True)
class Decision:
    """What was decided, and by which rule.

    Example:
        >>> Decision(True, "equal text").status
        'correct'
    """

    correct: bool
    rule: str
    status: Status = "wrong"

    def __post_init__(self) -> None:
        """Let the status say "correct" where the answer is."""
        if self.correct:
            object.__setattr__(self, "status", "correct")


def decide(gold: str, answer: str, *, strict: bool) -> Decision | None:
    r"""Decide without an engine, or return `None`: then `reward.engine` has to.

    Args:
        gold: The gold answer, as written.
        answer: The extracted answer, as written.
        strict: Refuse what is not evaluated; see `reward.strictness`.

    Example:
        >>> decide(r"$\frac{1}{2}$", "0.50", strict=True).correct
        True
        >>> decide("4", "5=4", strict=True).rule, decide(r"\sqrt{8}", r"2\sqrt{2}", strict=True)
        ('no value matches', None)
    """
    large = too_large(answer)
    if large is not None and answer.strip() != gold.strip():
        return Decision(False, large, "too_long" if "characters" in large else "wrong")
    gold, answer = normalize_answer(gold), normalize_answer(answer)
    if not _READABLE.search(plain_text(answer)) and not _SYMBOLIC.search(answer):
        return Decision(False, "nothing to compare", "no_answer")
    if without_spaces(gold) == without_spaces(answer):
        return Decision(True, "equal text")
    if strict and (operator := leftover_operator(gold, answer)) is not None:
        return Decision(False, f"{operator} is not evaluated")
    verdict = same_answer(gold, answer, cheap_equal, strict)
    if verdict is None:
        return None
    return Decision(verdict, "equal values" if verdict else "no value matches")


def same_answer(gold: str, answer: str, leaf: Leaf, strict: bool) -> bool | None:
    """Compare normalised answers by shape, and their values by `leaf`.

    Args:
        gold: The gold answer.
        answer: The other one; the two are not exchangeable.
        leaf: Compares two values; `None` if it cannot tell.
        strict: Passed on to `leaf`.

    Returns:
        `None` if `leaf` could not tell where it matters, or the shapes are not comparable here.
    """
    verdicts = []
    for thousands in (True, False) if "," in gold + answer else (True,):
        golds, answers = _readings(gold, thousands, True), _readings(answer, thousands, not strict)
        for first, second in product(golds, answers):
            verdicts.append(_Comparison(leaf, strict).same(first, second))
            if verdicts[-1]:
                return True
    return None if None in verdicts else False


def _readings(text: str, thousands: bool, trusted: bool) -> Iterator[Shape]:
    """Yield the answer as it stands and, from a trusted source, without its side remarks."""
    yield read_shape(text, thousands)
    match = _QUALIFIER.search(text) if trusted else None
    if match is not None and match.start() > 0:
        shortened = text[: match.start()].strip(" ,;")
        if shortened.count("{") == shortened.count("}"):
            yield read_shape(shortened, thousands)


class _Comparison:
    def __init__(self, leaf: Leaf, strict: bool) -> None:
        self.leaf = leaf
        self.strict = strict

    def same(self, gold: Shape, answer: Shape) -> bool | None:
        if gold.kind == answer.kind == "relation":
            return self.relations(gold, answer)
        if gold.kind == "relation" and "=" not in gold.signs and answer.kind != "value":
            return self.described(gold, answer)
        if answer.kind == "relation":
            return self.against_relation(gold, answer)
        if gold.kind == "relation":
            return self.from_relation(gold, answer)
        if _labels_differ(gold, answer):
            return False
        answer = _renamed(gold, answer)
        kinds = {gold.kind, answer.kind}
        if kinds == {"value"}:
            return self.leaf(gold.text, answer.text, self.strict)
        if kinds <= {"list", "set"}:
            return self.collections(gold, answer)
        if kinds <= {"tuple", "interval"}:
            if _brackets(gold) != _brackets(answer):
                return False
            return self.in_order(gold.items, answer.items)
        if kinds in ({"union"}, {"matrix"}):
            each = self.in_any_order if kinds == {"union"} else self.in_order
            return each(gold.items, answer.items)
        return self.mixed(gold, answer)

    def mixed(self, gold: Shape, answer: Shape) -> bool | None:
        """Compare shapes of two kinds, where writers use one for the other."""
        kinds = (gold.kind, answer.kind)
        if kinds in {("tuple", "list"), ("list", "tuple")}:
            if kinds[0] == "list" and gold.items and gold.items[0].label and answer.label:
                return self.zipped(gold, answer)
            return self.in_order(gold.items, answer.items)
        if "set" in kinds and "value" in kinds:
            one, other = (gold, answer) if gold.kind == "value" else (answer, gold)
            if len(other.items) == 1:
                item = other.items[0]
                return self.same(one, item) if one is gold else self.same(item, one)
            return None if not other.items else False
        if gold.kind == "matrix" and answer.kind in {"tuple", "list"} and not self.strict:
            cells = [cell for row in gold.items for cell in row.items]
            return self.in_order(cells, answer.items)
        if gold.kind == "list" and answer.kind in {"union", "interval", "tuple"}:
            return self.described(gold, answer)
        if kinds == ("value", "tuple") or kinds == ("tuple", "value"):
            return None if "text" in gold.text + answer.text and not self.strict else False
        if "value" in kinds:
            text = (gold if gold.kind == "value" else answer).text
            return None if _OTHER_SETS.search(text) else False
        return False

    def collections(self, gold: Shape, answer: Shape) -> bool | None:
        """Compare lists and sets; where both label their items alike, by label."""
        if len(gold.items) != len(answer.items):
            return False
        names = [tuple(item.label.replace(" ", "") for item in s.items) for s in (gold, answer)]
        distinct = len(set(names[0])) == len(names[0]) > 1
        if distinct and all(names[0]) and sorted(names[0]) == sorted(names[1]):
            order = [names[1].index(name) for name in names[0]]
            return self.in_order(gold.items, [answer.items[i] for i in order])
        return self.in_any_order(gold.items, answer.items)

    def zipped(self, gold: Shape, answer: Shape) -> bool | None:
        """Compare `f(n)=n, g(n)=1` with `(f(n),g(n))=(n,1)`."""
        names = [item.label.replace(" ", "") for item in gold.items]
        if "(" + ",".join(names) + ")" != answer.label.replace(" ", ""):
            return False
        return self.in_order([_unlabelled(item) for item in gold.items], answer.items)

    def in_order(self, golds: Sequence[Shape], answers: Sequence[Shape]) -> bool | None:
        if len(golds) != len(answers):
            return False
        verdicts = []
        for gold, answer in zip(golds, answers, strict=True):
            verdicts.append(self.same(gold, answer))
            if verdicts[-1] is False:
                return False
        return None if None in verdicts else True

    def in_any_order(self, golds: Sequence[Shape], answers: Sequence[Shape]) -> bool | None:
        """Match every gold item with an item of its own."""
        if len(golds) != len(answers) or len(golds) > MAX_UNORDERED:
            texts = [sorted(item.text for item in items) for items in (golds, answers)]
            return texts[0] == texts[1]
        table = [[self.same(gold, answer) for answer in answers] for gold in golds]
        if _has_matching([[cell is True for cell in row] for row in table]):
            return True
        return (
            None if _has_matching([[cell is not False for cell in row] for row in table]) else False
        )

    def relations(self, gold: Shape, answer: Shape) -> bool | None:
        first, second = ascending(gold), ascending(answer)
        if ("=" in first.signs) != ("=" in second.signs) and r"\approx" not in first.signs:
            return False
        if set(first.signs) == {r"\approx"} or "=" in set(first.signs) | set(second.signs):
            return self.chains(gold, answer)
        if first.signs != second.signs:
            return None if len(first.signs) == len(second.signs) == 1 and not self.strict else False
        verdict = self.in_order(first.items, second.items)
        if verdict is False and first.signs == (r"\ne",):
            verdict = self.in_order(first.items, second.items[::-1])
        return verdict if verdict or len(first.signs) > 1 else None

    def chains(self, gold: Shape, answer: Shape) -> bool | None:
        """Compare equations; a chain that only computes is its last side."""
        if r"\approx" in gold.signs:
            return self.from_relation(gold, answer)
        if len(gold.signs) == 1 and len(answer.signs) == 1 and gold.signs == answer.signs:
            verdict = self.in_order(gold.items, answer.items)
            return True if verdict else None  # an equation, for the engine
        if len(gold.signs) > 1:
            return self.same(gold.items[-1], answer)
        return None

    def against_relation(self, gold: Shape, answer: Shape) -> bool | None:
        r"""Compare a gold value with an answer such as `2+3=5`, `x=3=3` or `\pi\approx 3.14`."""
        if set(answer.signs) - {"=", r"\approx", r"\to"}:
            return None if gold.kind == "value" and not read_value(gold.text).constant else False
        if set(answer.signs) == {"="}:
            last = self.consistent(answer)
            if last is None or last is False:
                return last
            verdict = self.same(gold, last)
            equation = verdict is False and gold.label and len(answer.signs) == 1
            return None if equation else verdict
        if not self.plausible(answer):
            return False
        sides = [side for side in answer.items if not is_name(side.text)] or list(answer.items)
        exact = self.same(gold, sides[0])
        if exact or self.strict or len(sides) == 1:
            return exact
        return self.same(gold, sides[-1])

    def consistent(self, answer: Shape) -> Shape | Literal[False] | None:
        """Return the side that counts; `False` if two sides are different numbers."""
        numbers = [side for side in answer.items if read_value(side.text).constant]
        for one, other in pairwise(numbers):
            verdict = self.leaf(one.text, other.text, False)
            if verdict is not True:
                return None if verdict is None else False
        if len(answer.items) == 2 and is_name(answer.items[1].text) and len(numbers) == 1:
            return answer.items[0]
        return answer.items[-1]

    def plausible(self, answer: Shape) -> bool:
        """Tell whether what is called nearly equal, or follows, is not another number."""
        numbers = [read_value(side.text).exact for side in answer.items]
        near = SLACK if r"\to" not in answer.signs else 0
        pairs = [(a, b) for a, b in pairwise(numbers) if a is not None and b is not None]
        return all(abs(a - b) <= near * abs(a) for a, b in pairs)

    def from_relation(self, gold: Shape, answer: Shape) -> bool | None:
        r"""Compare a gold such as `x=2+3=5` or `\sqrt{2}\approx 1.41` with a value."""
        if set(gold.signs) <= {r"\approx", "="} and r"\approx" in gold.signs:
            sides = (
                gold.items if not self.strict else gold.items[: gold.signs.index(r"\approx") + 1]
            )
            verdicts = [self.same(side, answer) for side in sides if not is_name(side.text)]
            return True if True in verdicts else None if None in verdicts else False
        if set(gold.signs) == {"="} and len(gold.signs) > 1:
            return self.same(gold.items[-1], answer)
        equation = gold.signs == ("=",) and answer.label
        return None if answer.kind == "value" and equation else False

    def described(self, gold: Shape, answer: Shape) -> bool | None:
        """Compare inequalities as gold with intervals."""
        parts = gold.items if gold.kind == "list" else (gold,)
        regions = [region for part in parts for region in _regions(part)]
        if len(regions) < len(parts) or not regions:
            return None if gold.kind == "relation" else False
        answers = answer.items if answer.kind == "union" else (answer,)
        return self.in_any_order(regions, answers)


def _brackets(shape: Shape) -> tuple[str, ...]:
    return shape.signs or ("(", ")")


def _unlabelled(shape: Shape) -> Shape:
    return Shape(shape.kind, shape.text, shape.items, "", shape.signs)


_VARIABLE = re.compile(r"(\\?[A-Za-z]+)(?:_\{?(\w+)\}?)?")
_DEFINED = re.compile(r"(?P<name>\\?[A-Za-z]+)\((?P<arguments>[A-Za-z](?:,[A-Za-z])*)\)")


def _labels_differ(gold: Shape, answer: Shape) -> bool:
    """Tell whether `x=5` meets `y=5`; words as labels are not compared."""
    first, second = gold.label.replace(" ", ""), answer.label.replace(" ", "")
    if not first or not second or first == second:
        return False
    if _DEFINED.fullmatch(first) or _DEFINED.fullmatch(second):
        return first.partition("(")[0] != second.partition("(")[0]
    names = [_VARIABLE.fullmatch(label) for label in (first, second)]
    return all(name is not None and len(name[1].lstrip("\\")) == 1 for name in names)


def _renamed(gold: Shape, answer: Shape) -> Shape:
    """Write `f(m)=2m` with the letter of the gold answer's `f(n)`."""
    first, second = _DEFINED.fullmatch(gold.label), _DEFINED.fullmatch(answer.label)
    if first is None or second is None or first["arguments"] == second["arguments"]:
        return answer
    old, new = second["arguments"].split(","), first["arguments"].split(",")
    if len(old) != len(new) or answer.kind != "value":
        return answer
    names = dict(zip(old, new, strict=True))
    text = re.sub(
        r"\\[A-Za-z]+|[A-Za-z]", lambda match: names.get(match.group(), match.group()), answer.text
    )
    return Shape("value", text, (), gold.label)


def _regions(shape: Shape) -> list[Shape]:
    r"""Return the intervals that an inequality describes; none if it is of another form."""
    if shape.kind in {"interval", "set"}:
        return [shape]
    if shape.kind == "value" and shape.label:
        return [Shape("set", shape.text, (_unlabelled(shape),))]
    if shape.kind != "relation":
        return []
    relation = ascending(shape)
    low, high = (Shape("value", text) for text in (r"-\infty", r"\infty"))
    if relation.signs == (r"\ne",) and is_name(relation.items[0].text):
        point = relation.items[1]
        return [_interval("(", low, point, ")"), _interval("(", point, high, ")")]
    if set(relation.signs) - {"<", r"\le"}:
        return []
    ends = {"<": "()", r"\le": "[]"}
    if len(relation.signs) == 2 and is_name(relation.items[1].text):
        left, right = relation.signs
        return [_interval(ends[left][0], relation.items[0], relation.items[2], ends[right][1])]
    if len(relation.signs) != 1:
        return []
    sign = relation.signs[0]
    if is_name(relation.items[0].text):
        return [_interval("(", low, relation.items[1], ends[sign][1])]
    if is_name(relation.items[1].text):
        return [_interval(ends[sign][0], relation.items[0], high, ")")]
    return []


def _interval(opening: str, low: Shape, high: Shape, closing: str) -> Shape:
    return Shape("interval", "", (low, high), "", (opening, closing))


def _has_matching(table: Sequence[Sequence[bool]]) -> bool:
    """Tell whether every row can have a column of its own (augmenting paths)."""
    owner: dict[int, int] = {}

    def assign(row: int, seen: set[int]) -> bool:
        for column, allowed in enumerate(table[row]):
            if allowed and column not in seen:
                seen.add(column)
                if column not in owner or assign(owner[column], seen):
                    owner[column] = row
                    return True
        return False

    return all(assign(row, set()) for row in range(len(table)))
