"""One spelling for each way of writing an answer, in linear time."""

from time import perf_counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reward.normalize import MAX_CHARACTERS, normalize_answer, plain_text


@pytest.mark.parametrize(
    "spellings",
    [
        (r"\frac{1}{2}", r"\dfrac12", r"\tfrac 1 2", r"$\frac{1}2$", r"\frac{1}{2}.", "½"),
        (r"\sqrt{2}", r"\sqrt2", r"$$\sqrt {2}$$", r"\(\sqrt{2}\)"),
        ("10080", r"10,\!080", "10{,}080", r"10\,080", "10 080"),
        ("x^{2}", "x^2", "x ^ 2", "x²", r"{\displaystyle x^2}".strip("{}")),
        (r"(1,2)", r"\left( 1 , 2 \right)", r"\bigl(1,\;2\bigr)", r"( 1,\ 2 )"),
        (r"x\le3", r"x \leq 3", r"x\leqslant 3", "x ≤ 3"),
        ("90°", r"90^\circ", r"90^{\circ}", r"90\degree", "90 °"),
        (r"\text{cm}", r"\mathrm{cm}", r"\mbox{cm}", r"\textbf{cm}"),
        ("50%", r"50\%", r"50 \%"),
        ("-3", "\u22123", "$-3$", "**-3**"),
        (r"1\frac{4}{5}", "1 4/5", r"1 \frac45"),
        (r"\{1,2\}", r"\lbrace 1, 2 \rbrace", r"\left\{1,2\right\}"),
        (r"2\pi", r"2 \pi", "2π"),
        (r"\emptyset", r"\varnothing", "∅", r"\{\}"),
        ("5", "= 5", r"\Rightarrow 5", r"\text{5}", "5,", ":5"),
        (r"\binom{n}{2}", r"\dbinom{n}{2}", r"\tbinom n2".replace(" n2", "{n}{2}")),
    ],
    ids=lambda spellings: spellings[0],
)
def test_spellings_of_one_answer_become_equal(spellings: tuple[str, ...]) -> None:
    assert {normalize_answer(text) for text in spellings} == {normalize_answer(spellings[0])}


@pytest.mark.parametrize(
    ("one", "other"),
    [("12", "1 2"), ("5", "-5"), (".5", "5"), ("x_1", "x1"), ("1,234,5", "12345"),
     ("2^{10}", "210"),
     ("$36", "36"), ("x>4", "x<4"), (r"\frac{1}{2}", "12"), ("a b", "ab.c"), ("50%", "50"),
     ("(1,2)", "[1,2]"), ("3'", "3")],
)  # fmt: skip
def test_different_answers_stay_different(one: str, other: str) -> None:
    assert normalize_answer(one) != normalize_answer(other)


def test_control_characters_of_a_bad_escape_are_mended() -> None:
    assert normalize_answer("\x0crac{1}{2}") == r"\frac{1}{2}"
    assert normalize_answer("\text{even}") == r"\text{even}"


def test_money_keeps_its_sign_and_delimiters_go() -> None:
    assert normalize_answer(r"\$18.90") == "$18.90"
    assert normalize_answer("$18.90") == "$18.90"
    assert normalize_answer("$18.90$") == "18.90"


def test_the_rows_of_a_matrix_stay_apart() -> None:
    one = normalize_answer(r"\begin{pmatrix} 1 \\ 23 \end{pmatrix}")
    other = normalize_answer(r"\begin{pmatrix} 12 \\ 3 \end{pmatrix}")
    assert one != other


@given(st.text(max_size=300))
def test_normalising_is_bounded_and_total(text: str) -> None:
    assert len(normalize_answer(text)) <= 12 * len(text) + 1
    assert plain_text(text) == plain_text(text).casefold()


@given(st.integers(-(10**30), 10**30))
def test_an_integer_is_left_as_it_is(number: int) -> None:
    assert normalize_answer(f"${number}$") == str(number)


@pytest.mark.parametrize(
    "unit",
    ["\\", "{", "$", " ", "1 ", "1,000", r"\frac", r"\frac1", "^", r"\text{", r"\text{a}", "a ",
     "1 1/", r"\\", "°", "π", r"\,", r"\left.", "**", "½", "\t", r"\{\}", "=", "1{,}000"],
)  # fmt: skip
def test_normalising_costs_little_whatever_is_repeated(unit: str) -> None:
    text = unit * 100_000

    def once() -> float:
        start = perf_counter()
        normalize_answer(text)
        return perf_counter() - start

    assert min(once() for _ in range(3)) < 0.05


def test_only_the_first_characters_are_read() -> None:
    assert len(normalize_answer("1" * 10_000_000)) == MAX_CHARACTERS


def test_words_are_compared_without_markup() -> None:
    assert plain_text(r"\text{Evelyn}.") == plain_text("evelyn") == "evelyn"
    assert plain_text(r"\text{(C)}") == "c"
