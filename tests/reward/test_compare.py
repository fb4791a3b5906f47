"""Each layer of the comparison decides what it can, and refuses what may not be paid."""

import ast
import re
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import reward
from reward.compare import decide
from reward.engine import equal_by_math_verify
from reward.expression import Node, parse_formula
from reward.numeric import same_equation, same_function
from reward.rational import exact_value
from reward.strictness import leftover_operator, too_large, unevaluated
from reward.structure import read_shape
from reward.units import conversion, read_unit, split_unit

MODULES = Path(reward.__file__).parent


def pays(gold: str, answer: str, *, strict: bool = True) -> bool:
    decision = decide(gold, answer, strict=strict)
    if decision is None:
        return equal_by_math_verify(gold, answer, strict)
    return decision.correct


def pairs(text: str) -> list[tuple[str, str]]:
    """Read lines of `gold :: answer`."""
    lines = [line.strip() for line in text.strip().splitlines()]
    return [(gold.strip(), answer.strip()) for gold, answer in (line.split("::") for line in lines)]


SAME = pairs(r"""
    1024 :: 2^{10}
    \frac{1}{2} :: 0.5
    \frac{1}{2} :: 50\%
    0.5 :: 50\%
    50\% :: \frac12
    \frac{1}{2} :: \frac{2}{4}
    .0000672 :: 6.72 \times 10^{-5}
    0.\overline{3} :: \frac13
    1\frac{4}{5} :: 1.8
    58,500 :: 58500
    10,\!080 :: 10080
    \$5 :: 5.00
    5 :: \$5.00
    2000 :: 2 \cdot 10^3
    72 :: 2^3 \cdot 3^2
    -\frac{35}{9} :: \frac{35}{-9}
    3\sqrt{13} :: \sqrt{117}
    \frac{\sqrt{3}}{3} :: \frac{1}{\sqrt3}
    \frac{\sqrt{5}-1}{2} :: \frac{2}{1+\sqrt5}
    \sqrt{2}+\sqrt{3} :: \sqrt{5+2\sqrt6}
    \sqrt[3]{4} :: 2^{2/3}
    2^{1009} :: 2 \cdot 2^{1008}
    6-5i :: -5i+6
    \ln 2 :: \log 2
    18+2\pi :: 2(\pi+9)
    (a+5)(b+2) :: ab+2a+5b+10
    \cot x :: \frac{\cos x}{\sin x}
    \sin^2 x :: 1-\cos^2 x
    \arctan 2 :: \tan^{-1} 2
    \binom{2n}{n} :: \frac{(2n)!}{n!n!}
    \lceil n/2\rceil+1 :: \left\lceil\frac{n}{2}\right\rceil+1
    x=5 :: 5
    5 :: x=5
    y=2x+3 :: 2x+3
    y=2x+3 :: 2x-y+3=0
    5x-7y+11z+4=0 :: -5x+7y-11z=4
    x>4 :: 2x>8
    f(n)=2n+1 :: f(m)=1+2m
    f(n)=n, g(n)=1 :: (f(n),g(n))=(n,1)
    \frac19 :: P=\frac{4}{36}=\frac{1}{9}
    5 :: 2+3=5
    1,-2 :: \{-2,1\}
    3,5,7 :: 7, 5 \text{ and } 3
    1,2 :: \text{Maximum}=2, \text{Minimum}=1
    1 \pm \sqrt{19} :: 1-\sqrt{19}, 1+\sqrt{19}
    \{1\pm\sqrt5,-2\} :: \{-2,1+\sqrt5,1-\sqrt5\}
    (2,251,252) :: (2, 251, 252)
    (1,2),(3,4) :: (3,4), (1,2)
    (1,2) :: (x,y)=(1,2)
    (6,31,-1) :: 6, 31, -1
    (0,9)\cup(9,36) :: (9,36) \cup (0,9)
    x \in [-2,7] :: [-2,7]
    k \geqslant 2 :: [2,\infty)
    -1<x<1 :: (-1,1)
    4<m\le8 \text{ or } m=9 :: (4,8] \cup \{9\}
    x>4 :: 4<x
    \mathbb{R} :: (-\infty,\infty)
    \emptyset :: \{\}
    \begin{pmatrix} -1/3 \\ 2/3 \end{pmatrix} :: \begin{bmatrix} -\frac13 \\ \frac23 \end{bmatrix}
    5 \text{ m} :: 500 \text{ cm}
    36 \text{ km/h} :: 10 \text{ m/s}
    864 \mbox{ inches}^2 :: 864 \text{ square inches}
    5.4 \text{ cents} :: 5.4
    16 :: 16 \text{ days}
    90^\circ :: \frac{\pi}{2}
    90^\circ :: 90
    \frac{3\pi}{4} :: 135^\circ
    3:4 :: \frac34
    52_8 :: 52_{8}
    \text{(C)} :: C
    \text{(C)} :: \textbf{(C) } 12
    \text{Evelyn} :: evelyn
    \frac{1+\sqrt{97}}{8} \approx 1.36 :: \frac{1+\sqrt{97}}{8}
    \frac{100!}{2^{50}} :: \frac{100!}{2^{50}}
""")

DIFFERENT = pairs(r"""
    \frac{1}{2004!} :: \frac{1}{2006!}
    2^{-99} :: 2^{-98}
    10^{50} :: 10^{50}+1
    10^{400} :: 10^{400}+1
    0 :: 10^{-30}
    0 :: \frac{1}{2006!}
    \sqrt2 :: \sqrt2+10^{-40}
    \sqrt2 :: \sqrt2+10^{-1200}
    \sqrt2 :: 1.4142135623730950488016887242096980785696718753769480731766797
    \pi :: 3.1416
    \pi :: \frac{355}{113}
    \frac13 :: 0.3333333333
    2^{1009} :: 2^{1009}(1+10^{-40})
    e^{100} :: e^{100}+1
    4 :: 5=4
    4 :: 4=5
    4 :: 1=2=3=4
    4 :: 4 \approx 5
    4 :: 4 \to 5
    4 :: 3,4
    4 :: 3 \text{ or } 4
    4 :: \pm 4
    4 :: x=4, y=5
    4 :: 4 \text{ is not the answer}
    4 :: \text{at least } 4
    4 :: 4 \text{ or more}
    4 :: x>4
    4 :: (4,5)
    x=5 :: y=5
    1,2,2 :: 1,2
    1,2 :: 1,2,2
    (1,2) :: (2,1)
    (1,2) :: [1,2]
    (1,2] :: [1,2)
    x>4 :: x\ge4
    x>4 :: x<4
    x>4 :: 4
    (4,\infty) :: x>4
    (0,9)\cup(9,36) :: (0,36)
    x^2+y^2=1 :: 1=1
    x^2+y^2=1 :: x^2+y^2=2
    3x-y+13=0 :: 3x+4y+14=0
    x_1=1, x_2=2 :: x_1=2, x_2=1
    f(x)=x+1 :: f(x)=x+2
    12:00 :: 1:00
    12:00 :: 12
    5 \text{ m} :: 5 \text{ cm}
    5 \text{ cm}^2 :: 5 \text{ cm}
    5 \text{ apples} :: 5 \text{ oranges}
    5 \text{ dollars} :: 5 \text{ cents}
    \$5 :: €5
    90^\circ :: 90 \text{ radians}
    \frac{\pi}{6} :: 30
    0.5 :: 0.5\%
    50 :: 0.5
    52_8 :: 52
    10_2 :: 10
    \text{(A)} :: \text{(B)}
    \text{Evelyn} :: \text{Evelyn or Carla}
    \text{even} :: \text{odd}
    2x :: 2y
    5 :: 5x
    \sqrt{x^2} :: x
    1-\frac1e :: 1+\frac1e
    \infty :: -\infty
    \begin{pmatrix} 1\\2 \end{pmatrix} :: \begin{pmatrix} 1&2 \end{pmatrix}
""")

UNEVALUATED = pairs(r"""
    5050 :: \sum_{k=1}^{100} k
    5050 :: 1+2+\cdots+100
    120 :: \prod_{k=1}^{5} k
    1 :: \int_0^1 2x\,dx
    1 :: \lim_{x\to0}\frac{\sin x}{x}
    2x :: \frac{d}{dx}x^2
    7 :: 3+4
    4a :: 3a+a
    70\sqrt2 :: 50\sqrt2+20\sqrt2
    15 :: 3\cdot5
    24 :: \frac12 \cdot 48
    24 :: 48/2
    \frac12 :: \sin 30^\circ
    3 :: \log_2 8
    3 :: \max(1,3)
    6 :: \gcd(12,18)
    4 :: \lfloor 4.5 \rfloor
    4 :: 16 \bmod 12
""")


@pytest.mark.parametrize(("gold", "answer"), SAME)
def test_equal_answers_are_paid_in_both_modes(gold: str, answer: str) -> None:
    assert pays(gold, answer)
    assert pays(gold, answer, strict=False)


@pytest.mark.parametrize(("gold", "answer"), DIFFERENT)
def test_different_answers_are_paid_in_neither_mode(gold: str, answer: str) -> None:
    assert not pays(gold, answer)
    assert not pays(gold, answer, strict=False)


@pytest.mark.parametrize(("gold", "answer"), UNEVALUATED)
def test_an_answer_left_to_be_computed_is_not_paid_in_strict_mode(gold: str, answer: str) -> None:
    assert not pays(gold, answer)


@pytest.mark.parametrize(
    ("gold", "answer"),
    [(gold, answer) for gold, answer in UNEVALUATED if re.search(r"[+/]\d|cdot\d|sin 30", answer)],
)
def test_a_lenient_comparison_takes_it_for_its_value(gold: str, answer: str) -> None:
    assert pays(gold, answer, strict=False) == (r"\cdots" not in answer)


def test_an_operator_in_the_gold_allows_it_in_the_answer() -> None:
    gold = r"\sum_{k=1}^{n} \frac{1}{k}"
    assert leftover_operator(gold, r"\sum_{j=1}^{n} \frac1j") is None
    assert leftover_operator(gold, r"\prod_{j=1}^{n} \frac1j") == r"\prod"
    assert pays(r"2021 \cdot 505 \cdot 337", r"505 \cdot 337 \cdot 2021")


def test_an_inequality_is_matched_by_its_interval_and_not_the_other_way_round() -> None:
    for strict in (True, False):
        assert pays("1<x<2", "(1,2)", strict=strict)
        assert not pays("(1,2)", "1<x<2", strict=strict)


def test_a_decimal_gold_is_matched_at_its_precision_only_when_lenient() -> None:
    assert pays("0.458", r"\frac{27}{59}", strict=False)
    assert not pays("0.458", r"\frac{27}{59}")
    assert not pays("0.5", r"\frac{27}{59}", strict=False)  # too few digits
    assert not pays("0.458", "0.46", strict=False)  # less precise than the gold


def test_a_sign_of_per_cent_may_be_left_out_only_when_lenient() -> None:
    assert pays("35", r"35\%", strict=False) and pays(r"35\%", "35", strict=False)
    assert not pays("35", r"35\%") and not pays(r"35\%", "35")


@pytest.mark.parametrize(
    ("answer", "status"),
    [
        ("9^{9^{9^{9}}}", "wrong"),
        ("(10000000)!", "wrong"),
        ("2^{1000000000}", "wrong"),
        ("1" * 401, "wrong"),
        ("(" * 101 + "4" + ")" * 101, "wrong"),
        ("1" * 2001, "too_long"),
        ("", "no_answer"),
        ("?", "no_answer"),
    ],
    ids=lambda value: value[:12],
)
def test_what_no_engine_should_see_is_refused(answer: str, status: str) -> None:
    for gold in ("4", r"\frac{x}{\sqrt{2}}"):
        decision = decide(gold, answer, strict=False)
        assert decision is not None
        assert (decision.correct, decision.status) == (False, status)


@given(st.integers(-(10**40), 10**40), st.integers(-(10**40), 10**40), st.booleans())
def test_integers_are_compared_exactly(gold: int, answer: int, strict: bool) -> None:
    decision = decide(str(gold), str(answer), strict=strict)
    assert decision is not None and decision.correct == (gold == answer)
    same = decide(f"{gold:,}", str(gold), strict=strict)
    assert same is not None and same.correct


@given(st.fractions(), st.fractions())
def test_fractions_are_compared_exactly(gold: Fraction, answer: Fraction) -> None:
    written = [rf"\frac{{{value.numerator}}}{{{value.denominator}}}" for value in (gold, answer)]
    decision = decide(written[0], written[1], strict=True)
    assert decision is not None and decision.correct == (gold == answer)


@given(st.lists(st.integers(-99, 99), min_size=2, max_size=6), st.randoms())
def test_a_list_is_matched_in_any_order_and_a_tuple_is_not(numbers: list[int], source) -> None:
    shuffled = source.sample(numbers, len(numbers))
    texts = [", ".join(map(str, items)) for items in (numbers, shuffled)]
    assert pays(texts[0], texts[1])
    assert pays(f"({texts[0]})", f"({texts[1]})") == (numbers == shuffled)
    assert not pays(texts[0], texts[1] + ", 100")


@given(st.text(max_size=60), st.text(max_size=60), st.booleans())
def test_any_two_texts_get_a_decision_or_none(gold: str, answer: str, strict: bool) -> None:
    decision = decide(gold, answer, strict=strict)
    assert decision is None or isinstance(decision.correct, bool)


SIGNS = [
    *"0123456789xyn+-*/^!()[]{}|,=<>%°_ .\\", r"\frac", r"\sqrt", r"\pi", r"\text{ cm}", r"\le",
    r"\text{ or }", r"\cup", r"\pm", r"\infty", "{1}", r"\begin{pmatrix}", r"\end{pmatrix}", r"\{",
    r"\}", r"\sin", r"\binom", r"\sum",
]  # fmt: skip


@given(st.lists(st.sampled_from(SIGNS), max_size=25).map("".join), st.booleans())
def test_any_formula_equals_itself_or_is_nothing(text: str, strict: bool) -> None:
    decision = decide(text, text, strict=strict)
    assert decision is not None
    assert decision.correct or decision.status in {"no_answer", "wrong"}
    read_shape(text)
    parse_formula(text)


def tree(text: str) -> Node:
    node = parse_formula(text)
    assert node is not None, text
    return node


def test_formulas_are_compared_as_functions() -> None:
    assert same_function(tree("(x+1)^{3}"), tree("x^{3}+3x^{2}+3x+1")) is True
    assert same_function(tree("(x+1)^{3}"), tree("x^{3}+3x^{2}+3x+2")) is False
    assert same_function(tree(r"\frac{1}{x-x}"), tree("1")) is None
    assert same_function(tree("f(2x)"), tree("f(x+x)")) is True
    assert same_function(tree("f(2x)"), tree("g(2x)")) is False
    zero = r"\sqrt{2}\sqrt{2}-2"
    assert same_function(tree(zero), tree("0")) is True
    assert same_function(tree(zero + "+10^{-500}"), tree("0")) is False


def test_equations_may_differ_by_a_factor_and_inequalities_by_a_positive_one() -> None:
    gold = tree("x+1"), tree("y")
    assert same_equation(gold, (tree("2y"), tree("2x+2"))) is True
    assert same_equation(gold, (tree("2y"), tree("2x+2")), ordered=True) is False
    assert same_equation(gold, (tree("3x+3"), tree("3y")), ordered=True) is True
    assert same_equation(gold, (tree("x"), tree("y"))) is False


def test_exact_values_are_bounded() -> None:
    assert exact_value(tree("2^{10}-4!")) == 1000
    assert exact_value(tree("8^{1/3}")) == 2
    for text in ("x", r"\sqrt{2}", r"\frac{1}{0}", "0^{0}", "9^{9999}!", "(9^{9999})^{9999}"):
        assert exact_value(tree(text)) is None


def test_what_is_not_evaluated_is_named() -> None:
    assert unevaluated(tree("5"), tree("2+3")) == "a sum of like terms"
    assert unevaluated(tree("6"), tree("2(3)")) == "a product of numbers"
    assert unevaluated(tree("x"), tree("x+x")) == "a sum of like terms"
    assert unevaluated(tree("1+2"), tree("2+1")) is None
    assert unevaluated(None, tree(r"3x^{2}+\sqrt{2}x+2^{10}")) is None
    assert too_large("2^{10}") is None


@pytest.mark.parametrize("strict", [True, False])
def test_the_engine_looks_for_no_number_inside_of_what_it_cannot_read(strict: bool) -> None:
    cases = r"\begin{cases} x, & \text{when } a<1 \\ 2, & \text{when } a=1 \end{cases}"
    for gold in ("1", "R=1", r"\text{when } a=1", r"\frac{1}{2}"):
        assert not pays(gold, cases, strict=strict)
        assert not pays(gold, r"\mho\left( \frac{1}{2} 1", strict=strict)


def test_units_are_read_and_converted() -> None:
    body, unit = split_unit("$18.90")
    dollar, cent, square = read_unit("dollars"), read_unit("cents"), read_unit("square cm")
    assert body == "18.90" and unit == dollar and dollar and cent and square
    assert conversion(dollar, cent) == Fraction(1, 100)
    assert conversion(square, read_unit("m^2") or dollar) == 10_000
    assert conversion(dollar, square) is None
    assert read_unit("or more") is None


def test_no_module_of_reward_can_execute_text() -> None:
    forbidden = {"eval", "exec", "parse_expr", "sympify", "parse_latex", "lambdify", "__import__"}
    for path in MODULES.rglob("*.py"):
        nodes = list(ast.walk(ast.parse(path.read_text())))
        names = {node.id for node in nodes if isinstance(node, ast.Name)}
        names |= {node.attr for node in nodes if isinstance(node, ast.Attribute)}
        names |= {
            a.name for n in nodes if isinstance(n, ast.Import | ast.ImportFrom) for a in n.names
        }
        assert not names & forbidden, path


def test_two_numbers_side_by_side_are_not_one() -> None:
    for answer in ("2 3", r"2\ 3", r"2\quad 3"):
        decision = decide("23", answer, strict=True)
        assert decision is None or not decision.correct, answer
    spaced = decide("2 x + 1", "2x+1", strict=True)
    assert spaced is not None
    assert spaced.correct
