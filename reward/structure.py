# SPDX-License-Identifier: Apache-2.0
r"""The shape of an answer: a value, a list, a set, a tuple, an interval, a matrix, a relation.

Reading splits a normalised text at the separators of its top level, in one pass for each level of
brackets; the pieces that remain are single values, kept as text. What is compared with what, and in
which order, is decided in `reward.compare` from these shapes.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from reward.normalize import ROW
from reward.units import HEDGES

Kind = Literal["value", "list", "set", "tuple", "interval", "union", "matrix", "relation"]

MAX_ITEMS = 200
MAX_DEPTH = 12
RELATIONS = {
    "=": "=", "<": "<", ">": ">", r"\le": r"\le", r"\ge": r"\ge", r"\ne": r"\ne",
    r"\approx": r"\approx", r"\in": r"\in", r"\equiv": r"\equiv", "<=": r"\le", ">=": r"\ge",
    "!=": r"\ne", r"\to": r"\to", r"\implies": r"\to", r"\Rightarrow": r"\to",
    r"\rightarrow": r"\to", r"\mapsto": r"\to", r"\iff": r"\to", r"\Leftrightarrow": r"\to",
    "==": "=", r"\notin": r"\notin", r"\subset": r"\subset", r"\subseteq": r"\subset",
    r"\parallel": r"\parallel", r"\perp": r"\perp", r"\sim": r"\sim", r"\cong": r"\cong",
}  # fmt: skip
FLIPPED = {">": "<", r"\ge": r"\le"}
_PIECE = re.compile(
    r"\\text\{[^{}]*\}|\\begin\{[a-zA-Z]*\*?\}(?:\{[lcr|]*\})?|\\end\{[a-zA-Z]*\*?\}"
    r"|\\[{}|]|\\[A-Za-z]+|[<>!=]=|\b(?:and|or)\b|.",
    re.DOTALL,
)
_SEPARATOR = re.compile(r"\\text\{\s*,?\s*(?:and|or|及|和|或)\s*,?\s*\}|and|or|,|;")
_OPEN = {"(", "[", "{", r"\{", r"\lfloor", r"\lceil"}
_CLOSE = {")", "]", "}", r"\}", r"\rfloor", r"\rceil"}
_MATRIX = re.compile(
    r"(\\begin\{(?:[pbB]?matrix|smallmatrix|array)\}(?:\{[lcr|]*\})?)(.*)"
    r"(\\end\{(?:[pbB]?matrix|smallmatrix|array)\})",
    re.DOTALL,
)
_NAME = re.compile(
    r"(?:\\(?:text|overline|vec|hat|bar|overrightarrow)\{[^{}]*\}|\\[A-Za-z]+|[A-Za-z]|'"
    r"|_\{[^{}]*\}|_.|[|°\s△∠]|\((?:[A-Za-z](?:_\{?\w+\}?)?|,|\s|\d+)+\))+"
)
_NOT_A_NAME = re.compile(
    r"\\(?:frac|sqrt|sum|prod|int|lim|pi|infty|sin|cos|tan|cot|log|ln|binom|cdot|times|text\{not)"
)


@dataclass(frozen=True)
class Shape:
    """An answer, or a part of one.

    Args:
        kind: What it is.
        text: The normalised text, without its label.
        items: The parts, each a shape; the rows of a matrix are tuples.
        label: What stands before the equals sign or the colon: `x` of `x=5`.
        signs: The two brackets of an interval, or the signs of a relation between its items.
    """

    kind: Kind
    text: str
    items: tuple["Shape", ...] = ()
    label: str = ""
    signs: tuple[str, ...] = ()


@lru_cache(maxsize=4096)
def read_shape(text: str, thousands: bool = True) -> Shape:
    r"""Read a normalised answer.

    Args:
        text: From `normalize_answer`.
        thousands: Whether `1,234` is one number; with `False` it is a list of two.

    Example:
        >>> read_shape("x=1,x=2").kind, [item.text for item in read_shape("(1,2)").items]
        ('list', ['1', '2'])
    """
    if thousands:
        text = _THOUSANDS.sub(lambda match: match.group().replace(",", ""), text)
    return _read(text, 0)


_THOUSANDS = re.compile(r"(?<![\d,.])[1-9]\d{0,2}(?:,\d{3})+(?![\d,])")


def _read(text: str, depth: int) -> Shape:
    text = text.strip(" ,;")
    if depth > MAX_DEPTH:
        return Shape("value", text)
    pieces = list(_pieces(text))
    parts = [part for part in _split(pieces, _is_separator) if part.strip()]
    if len(parts) > MAX_ITEMS:
        return Shape("value", text)
    if len(parts) > 1:
        shapes = [shape for part in parts for shape in _signs_spread(part, depth + 1)]
        return Shape("list", text, tuple(shapes))
    spread = _signs_spread(text, depth + 1)
    return spread[0] if len(spread) == 1 else Shape("list", text, tuple(spread))


def _signs_spread(text: str, depth: int) -> list[Shape]:
    """Read one item; one with a plus-minus sign is two."""
    if r"\pm" not in text and r"\mp" not in text:
        return [_item(text.strip(), depth)]
    if text.startswith(r"\{"):
        return [_item(text, depth)]
    both = []
    for plus, minus in (("+", "-"), ("-", "+")):
        one = re.sub(r"\\pm(?![A-Za-z]) ?", plus, text)
        one = re.sub(r"\\mp(?![A-Za-z]) ?", minus, one)
        both.append(_item(re.sub(r"(?<![^(\[{,=])\+", "", one).strip(), depth))
    return both


def _item(text: str, depth: int) -> Shape:
    """Read what has no separator at its top level."""
    label, body = _labelled(text)
    pieces = list(_pieces(body))
    signs = [RELATIONS[piece] for piece, level in pieces if level == 0 and piece in RELATIONS]
    if not signs:
        shape = _unrelated(body, pieces, depth)
        return Shape(shape.kind, shape.text, shape.items, label or shape.label, shape.signs)
    sides = _split(pieces, lambda piece: piece in RELATIONS)
    items = tuple(_side(side, depth + 1) for side in sides)
    if signs == [r"\in"] and items[1].kind != "value":
        last = items[1]
        return Shape(last.kind, last.text, last.items, label or sides[0].strip(), last.signs)
    if len(signs) == 1 and signs[0] == "=" and is_name(sides[0]):
        last = items[1]
        return Shape(last.kind, last.text, last.items, sides[0].strip(), last.signs)
    if len(signs) == 1 and signs[0] == "=" and _names_tuple(items[0]):
        last = items[1]
        return Shape(last.kind, last.text, last.items, sides[0].strip(), last.signs)
    return Shape("relation", body, items, label, tuple(signs))


def _side(text: str, depth: int) -> Shape:
    text = text.strip()
    return _unrelated(text, list(_pieces(text)), depth)


def _unrelated(text: str, pieces: list[tuple[str, int]], depth: int) -> Shape:
    if depth > MAX_DEPTH:
        return Shape("value", text)
    if text == r"\mathbb{R}":
        ends = Shape("value", r"-\infty"), Shape("value", r"\infty")
        return Shape("interval", text, ends, signs=("(", ")"))
    parts = _split(pieces, lambda piece: piece in {r"\cup", r"\uplus"})
    if len(parts) > 1 and len(parts) <= MAX_ITEMS:
        return Shape("union", text, tuple(_item(part.strip(), depth + 1) for part in parts))
    matrix = _MATRIX.fullmatch(text)
    if matrix is not None and matrix.group(2).count("\\begin") == 0:
        rows = [row for row in matrix.group(2).split(ROW) if row.strip()]
        cells = [row.split("&") for row in rows]
        if sum(map(len, cells)) <= MAX_ITEMS:
            return Shape("matrix", text, tuple(_row(row, depth) for row in cells))
    if _bracketed(pieces):
        return _bracket(text, pieces, depth)
    return Shape("value", text)


def _row(cells: list[str], depth: int) -> Shape:
    return Shape("tuple", "&".join(cells), tuple(_item(cell.strip(), depth + 1) for cell in cells))


def _bracketed(pieces: list[tuple[str, int]]) -> bool:
    """Tell whether one pair of brackets encloses the whole text."""
    return (
        len(pieces) > 1
        and pieces[0][0] in {"(", "[", r"\{", "]"}
        and pieces[-1][0] in {")", "]", r"\}", "["}
        and all(level > 0 for _, level in pieces[1:-1])
    )


def _bracket(text: str, pieces: list[tuple[str, int]], depth: int) -> Shape:
    first, last = pieces[0][0], pieces[-1][0]
    inner = [(piece, level - 1) for piece, level in pieces[1:-1]]
    inside = "".join(piece for piece, _ in inner)
    if first == r"\{":
        builder = _split(inner, lambda piece: piece in {"|", ":"})
        if len(builder) == 2 and last == r"\}":
            return _read(builder[1], depth + 1)
        shape = _read(inside, depth + 1)
        items = shape.items if shape.kind == "list" else (shape,) if inside.strip() else ()
        return Shape("set", text, items)
    parts = _split(inner, lambda piece: piece in {",", ";"})
    if len(parts) == 1 and first == "(" and last == ")":
        return _read(inside, depth + 1) if _plain(inside) else Shape("value", text)
    if len(parts) > MAX_ITEMS or len(parts) == 1:
        return Shape("value", text)
    items = tuple(_item(part.strip(), depth + 1) for part in parts)
    interval = len(items) == 2 and ((first, last) != ("(", ")") or r"\infty" in inside)
    if interval:
        return Shape("interval", text, items, signs=(first, last))
    return Shape("tuple", text, items, signs=(first, last))


def _plain(inside: str) -> bool:
    """Tell whether brackets round this text only group, as in `(x=2)` and `(3)`."""
    return "," not in inside and ";" not in inside


def _pieces(text: str) -> Iterator[tuple[str, int]]:
    """Yield each sign with the number of brackets open round it; brackets have the outer level."""
    level = 0
    for match in _PIECE.finditer(text):
        piece = match.group()
        if piece.startswith("\\begin{") or piece in _OPEN:
            yield piece, level
            level += 1
        elif piece in _CLOSE or piece.startswith("\\end{"):
            level = max(0, level - 1)
            yield piece, level
        else:
            yield piece, level


def _is_separator(piece: str) -> bool:
    return _SEPARATOR.fullmatch(piece) is not None


def _split(pieces: list[tuple[str, int]], is_separator: Callable[[str], bool]) -> list[str]:
    parts: list[list[str]] = [[]]
    for piece, level in pieces:
        if level == 0 and is_separator(piece):
            parts.append([])
        else:
            parts[-1].append(piece)
    return ["".join(part) for part in parts]


def is_name(text: str) -> bool:
    r"""Tell whether a side of an equation only names what the other side gives.

    Example:
        >>> is_name("x"), is_name("f(x)"), is_name(r"\text{Area}"), is_name("2x"), is_name("5")
        (True, True, True, False, False)
    """
    text = text.strip()
    return _NAME.fullmatch(text) is not None and _NOT_A_NAME.search(text) is None


def _names_tuple(shape: Shape) -> bool:
    return shape.kind == "tuple" and all(is_name(item.text) for item in shape.items)


def ascending(relation: Shape) -> Shape:
    r"""Write `3>x` as `x<3`; leave what is not all of one direction.

    Example:
        >>> ascending(read_shape("3>x")).signs
        ('<',)
    """
    if relation.signs and all(sign in FLIPPED for sign in relation.signs):
        signs = tuple(FLIPPED[sign] for sign in reversed(relation.signs))
        return Shape("relation", relation.text, relation.items[::-1], relation.label, signs)
    return relation


_LABEL = re.compile(
    r"(?:\\text\{\s*([A-Za-z][^{}:=]{0,60}?)\s*[:=]?\s*\}\s*[:=]?"
    r"|([A-Za-z][A-Za-z ]{1,40}?)\s*[:=])\s*(?=[^\s])"
)


_NO_LABEL = re.compile(r"\b(?:non|sin|cos|tan|log|ln|exp|about|around)\b")


def _labelled(text: str) -> tuple[str, str]:
    r"""Cut words before the value: `Minimum: 1`, `\text{Area}=5`, `\text{only }x=0`."""
    match = _LABEL.match(text)
    if match is None or match.end() >= len(text):
        return "", text
    label = (match.group(1) or match.group(2)).strip()
    if len(label) < 2 or _NO_LABEL.search(label) or HEDGES.search(label.lower()):
        return "", text
    rest = text[match.end() :]
    if not re.search(r"[\d\\A-Za-z(\[]", rest):
        return "", text
    return label, rest
