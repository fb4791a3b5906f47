# SPDX-License-Identifier: Apache-2.0
r"""A small grammar of formulas: normalised LaTeX to a tree, by recursive descent.

Nothing is evaluated. It covers what answers are made of: numbers, letters with subscripts,
arithmetic, fractions, powers, roots, factorials, binomials, absolute values, floors, the elementary
functions. Whatever is outside of it is refused; it never guesses. Depth and length are bounded.
"""

import re
from fractions import Fraction
from functools import lru_cache
from typing import NamedTuple

MAX_DEPTH = 60
MAX_TOKENS = 1500
MAX_DIGITS = 400

FUNCTIONS = frozenset(
    [
        "sin",
        "cos",
        "tan",
        "cot",
        "sec",
        "csc",
        "asin",
        "acos",
        "atan",
        "sinh",
        "cosh",
        "tanh",
        "coth",
        "ln",
        "log",
        "exp",
    ]
)
_GREEK = frozenset(
    [
        "alpha",
        "beta",
        "gamma",
        "delta",
        "epsilon",
        "zeta",
        "eta",
        "theta",
        "iota",
        "kappa",
        "lambda",
        "mu",
        "nu",
        "xi",
        "rho",
        "sigma",
        "tau",
        "upsilon",
        "phi",
        "chi",
        "psi",
        "omega",
        "Gamma",
        "Delta",
        "Theta",
        "Lambda",
        "Xi",
        "Pi",
        "Sigma",
        "Phi",
        "Psi",
        "Omega",
        "ell",
        "hbar",
    ]
)
_TOKEN = re.compile(
    r"\s*(?:(?P<number>\d+(?:\.\d*)?|\.\d+)|(?P<text>\\text\{[^{}]*\})"
    r"|(?P<command>\\[A-Za-z]+)|(?P<char>\\[{}|]|\*\*|\S))"
)
_OPENING = {"(": ")", "[": "]", "{": "}", r"\{": r"\}"}
_PRODUCT = {"*", r"\cdot", r"\times", "/", r"\div", ":"}
_ENDS = frozenset(")]}+-,;=<>!|") | {r"\}", r"\rfloor", r"\rceil", "&", r"\\", r"\pm", r"\mp"}


class NotAFormula(ValueError):
    """The text is outside of the grammar, or too large for it."""


class Node(NamedTuple):
    """One node of a formula.

    `kind` is "number" or "symbol" or "constant" for a leaf, with `value`; else an operation on
    `children`, with the function's name as `value` where it has one.
    """

    kind: str
    children: tuple["Node", ...] = ()
    value: Fraction | str | None = None


@lru_cache(maxsize=4096)
def parse_formula(text: str) -> Node | None:
    r"""Return the tree of a normalised formula, or `None` if the grammar does not cover it.

    Example:
        >>> parse_formula(r"\frac{1}{2}").kind, parse_formula("Evelyn!?")
        ('div', None)
    """
    try:
        parser = _Parser(text)
        tree = parser.sum()
        return tree if parser.peek() == "" else None
    except (NotAFormula, RecursionError):
        return None


class _Parser:
    def __init__(self, text: str) -> None:
        self.tokens: list[tuple[str, str]] = []
        for match in _TOKEN.finditer(text):
            self.tokens.append((match.lastgroup or "", match.group(match.lastgroup or 0)))
        if len(self.tokens) > MAX_TOKENS:
            raise NotAFormula(f"got {len(self.tokens)} tokens, need at most {MAX_TOKENS}: shorten")
        self.position = 0
        self.depth = 0

    def peek(self, offset: int = 0) -> str:
        index = self.position + offset
        return self.tokens[index][1] if index < len(self.tokens) else ""

    def kind(self) -> str:
        return self.tokens[self.position][0] if self.position < len(self.tokens) else ""

    def next(self) -> str:
        token = self.peek()
        self.position += 1
        return token

    def expect(self, token: str) -> None:
        if self.next() != token:
            raise NotAFormula(f"need {token!r}: close the group")

    def sum(self) -> Node:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise NotAFormula(f"nested deeper than {MAX_DEPTH}: flatten it")
        terms = [self.signed_product()]
        while self.peek() in {"+", "-"}:
            terms.append(self.signed_product())
        self.depth -= 1
        return terms[0] if len(terms) == 1 else Node("add", tuple(terms))

    def signed_product(self) -> Node:
        negative = False
        while self.peek() in {"+", "-"}:
            negative ^= self.next() == "-"
        node = self.product()
        return Node("neg", (node,)) if negative else node

    def product(self) -> Node:
        factors = [self.factor()]
        while True:
            token = self.peek()
            if token in _PRODUCT:
                self.next()
                right = self.signed_factor()
                if token in {"/", r"\div", ":"}:
                    factors = [Node("div", (_times(factors), right))]
                else:
                    factors.append(right)
            elif token == "" or token in _ENDS or token == r"\right":
                return _times(factors)
            else:
                factors.append(self.adjacent(factors[-1]))

    def adjacent(self, left: Node) -> Node:
        """Read a factor without a sign before it."""
        if self.kind() == "number" and left.kind in {"number", "pow"}:
            raise NotAFormula("two numbers side by side: put a sign between them")
        return self.factor()

    def signed_factor(self) -> Node:
        if self.peek() in {"+", "-"}:
            negative = self.next() == "-"
            node = self.signed_factor_once()
            return Node("neg", (node,)) if negative else node
        return self.factor()

    def signed_factor_once(self) -> Node:
        if self.peek() in {"+", "-"}:
            raise NotAFormula("two signs in a row: use brackets")
        return self.factor()

    def factor(self) -> Node:
        if self.kind() == "number" and self.peek(1) == r"\frac":
            mixed = self.mixed_number()
            if mixed is not None:
                return mixed
        return self.postfix(self.primary())

    def mixed_number(self) -> Node | None:
        window = [token for _, token in self.tokens[self.position : self.position + 8]]
        if len(window) < 8 or window[2:8:3] != ["{", "{"] or window[4] != "}" or window[7] != "}":
            return None
        whole, top, bottom = window[0], window[3], window[6]
        digits = whole + top + bottom
        if not digits.isdecimal() or len(digits) > MAX_DIGITS or not int(bottom):
            return None
        if int(top) >= int(bottom) or int(whole) == 0:
            return None  # 2\frac{3}{2} is a product
        self.position += 8
        value = int(whole) + Fraction(int(top), int(bottom))
        return self.postfix(Node("number", (), value))

    def postfix(self, node: Node) -> Node:
        while True:
            token = self.peek()
            if token in {"^", "**"}:
                self.next()
                node = Node("pow", (node, self.argument(signed=True)))
            elif token == "!":
                self.next()
                node = Node("factorial", (node,))
            elif token in {"%", "°"}:
                self.next()
                node = Node("percent" if token == "%" else "degree", (node,))
            elif token == "'" and node.kind == "symbol":
                self.next()
                node = Node("symbol", (), f"{node.value}'")
            elif token == "_" and node.kind in {"number", "symbol"}:
                self.next()
                node = self.subscripted(node)
            else:
                return node

    def subscripted(self, node: Node) -> Node:
        subscript = self.raw_group()
        if node.kind == "symbol":
            return Node("symbol", (), f"{node.value}_{subscript}")
        if not isinstance(node.value, Fraction) or node.value.denominator != 1:
            raise NotAFormula("a base needs whole digits")
        if not subscript.isdecimal() or not 2 <= int(subscript[:3]) <= 36:
            raise NotAFormula("a base is a number from 2 to 36")
        return Node("based", (node,), subscript)

    def raw_group(self) -> str:
        """Return the text of one argument, as a name."""
        if self.peek() != "{":
            return self.next() or "?"
        self.next()
        parts = []
        while self.peek() not in {"}", ""}:
            parts.append(self.next())
        self.expect("}")
        return "".join(parts).replace(r"\text{", "").replace("}", "")

    def argument(self, signed: bool = False) -> Node:
        """Read `{...}`, or the single token that LaTeX would take."""
        if self.peek() == "{":
            self.next()
            node = self.sum()
            self.expect("}")
            return node
        if signed and self.peek() == "-":
            self.next()
            return Node("neg", (self.argument(),))
        return self.primary(single=True)

    def primary(self, single: bool = False) -> Node:
        kind, token = self.kind(), self.next()
        if kind == "number":
            return self.number(token)
        if token in _OPENING:
            node = self.sum()
            self.expect(_OPENING[token])
            return node
        if token == "|":
            node = self.sum()
            self.expect("|")
            return Node("abs", (node,))
        if kind == "text":
            return self.word(token[6:-1].strip())
        if kind == "command":
            return self.command(token[1:])
        if kind == "char" and token.isascii() and token.isalpha():
            return self.letter(token, single)
        raise NotAFormula(f"unknown sign {token[:10]!r}")

    def number(self, token: str) -> Node:
        if len(token) > MAX_DIGITS:
            raise NotAFormula(f"a number of more than {MAX_DIGITS} digits")
        whole, _, decimals = token.partition(".")
        value = Fraction(int((whole + decimals) or "0"), 10 ** len(decimals))
        if self.peek() in {r"\overline", r"\dot", r"\bar"} and "." in token:
            self.next()
            period = self.raw_group()
            if not period.isdecimal() or len(period) > MAX_DIGITS:
                raise NotAFormula("a period is made of digits")
            value += Fraction(int(period), (10 ** len(period) - 1) * 10 ** len(decimals))
        return Node("number", (), value)

    def letter(self, token: str, single: bool) -> Node:
        word = token
        while not single and self.peek().isalpha() and len(self.peek()) == 1:
            word += self.next()
        if word in FUNCTIONS:
            return self.function(word)
        if word in {"pi", "sqrt"}:
            return self.command(word)
        self.position -= len(word) - 1
        if len(word) > 4:
            raise NotAFormula("a word, not a product of letters")
        if token in "fghFGH" and self.peek() == "(":
            return self.application(token)
        return Node("constant", (), token) if token in "ei" else Node("symbol", (), token)

    def application(self, name: str) -> Node:
        self.expect("(")
        arguments = [self.sum()]
        while self.peek() == ",":
            self.next()
            arguments.append(self.sum())
        self.expect(")")
        return Node("call", tuple(arguments), name)

    def word(self, word: str) -> Node:
        if word in FUNCTIONS:
            return self.function(word)
        if len(word) == 1 and word.isalpha():
            return Node("constant", (), word) if word in "ei" else Node("symbol", (), word)
        raise NotAFormula("words")

    def command(self, name: str) -> Node:
        if name in FUNCTIONS:
            return self.function(name)
        if name in {"pi", "infty"}:
            return Node("constant", (), name)
        if name in {"imath", "mathrm"}:
            return Node("constant", (), "i")
        if name in _GREEK:
            return Node("symbol", (), name)
        if name == "frac":
            return Node("div", (self.argument(), self.argument()))
        if name == "binom":
            return Node("binomial", (self.argument(), self.argument()))
        if name == "sqrt":
            return self.root()
        if name in {"lfloor", "lceil"}:
            node = self.sum()
            self.expect("\\r" + name[1:])
            return Node(name[1:], (node,))
        raise NotAFormula(f"unknown command {name[:20]!r}")

    def root(self) -> Node:
        index = Node("number", (), Fraction(2))
        if self.peek() == "[":
            self.next()
            index = self.sum()
            self.expect("]")
        if self.peek() == "(":
            return Node("root", (self.primary(), index))
        return Node("root", (self.argument(), index))

    def function(self, name: str) -> Node:
        """Read the argument: a bracket, or the product up to the next sign or function."""
        power: Node | None = None
        base: Node | None = None
        while self.peek() in {"^", "_"}:
            if self.next() == "^":
                power = self.argument(signed=True)
            else:
                base = self.argument()
        node = self.function_argument()
        if name == "exp":
            result = Node("pow", (Node("constant", (), "e"), node))
        elif base is not None:
            parts = (Node("function", (node,), "ln"), Node("function", (base,), "ln"))
            result = Node("div", parts)
        elif power is not None and power == Node("neg", (Node("number", (), Fraction(1)),)):
            return Node("function", (node,), f"a{name}")
        else:
            result = Node("function", (node,), name)
        return Node("pow", (result, power)) if power is not None else result

    def function_argument(self) -> Node:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise NotAFormula(f"nested deeper than {MAX_DEPTH}: flatten it")
        if self.peek() in {"(", "{", "[", "|"}:
            bracket = self.peek()
            node = self.primary()
            node = self.postfix(node) if bracket == "{" or self.peek() in {"!", "°"} else node
        else:
            factors = [self.signed_factor()]
            while self.kind() in {"number", "command", "char"} and self.continues():
                factors.append(self.factor())
            node = _times(factors)
        self.depth -= 1
        return node

    def continues(self) -> bool:
        token = self.peek()
        name = token[1:] if token.startswith("\\") else token
        if name in FUNCTIONS or token in _PRODUCT or token in _ENDS or token in {"(", "[", r"\{"}:
            return False
        ahead = "".join(t for _, t in self.tokens[self.position : self.position + 4])
        return not any(ahead.startswith(name) for name in FUNCTIONS)


def _times(factors: list[Node]) -> Node:
    return factors[0] if len(factors) == 1 else Node("mul", tuple(factors))
