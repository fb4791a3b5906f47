"""The answer is the last box after the thinking; what has no answer is never graded as one."""

from itertools import pairwise, product
from time import perf_counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reward.extract import GSM8K, extract_answer


def strict(text: str) -> str | None:
    return extract_answer(text, mode="strict").answer


def lenient(text: str) -> str | None:
    return extract_answer(text, mode="lenient").answer


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"It is \boxed{5}.", "5"),
        (r"$\fbox{5}$", "5"),
        (r"\boxed {5}", "5"),
        (r"\boxed{3} and \boxed{5}", "5"),
        (r"\boxed{5} and \boxed{3}", "3"),
        (r"\fbox{3} and \boxed{5}", "5"),
        (r"\boxed{5} and \fbox{3}", "3"),
        (r"\boxed{\frac{1}{\sqrt{2}}}", r"\frac{1}{\sqrt{2}}"),
        (r"\boxed{\{1,2\}}", r"\{1,2\}"),
        (r"\boxed{\left\{x \mid x>0\right\}}", r"\left\{x \mid x>0\right\}"),
        (r"\boxed{\boxed{5}}", r"\boxed{5}"),
        (r"\boxed{x = \fbox{3} + 2}", r"x = \fbox{3} + 2"),
        (r"a stray { and \boxed{5}", "5"),
        (r"a stray } and \boxed{5} }", "5"),
        (r"an open \boxed{ around \boxed{5}", "5"),
        (r"\boxed 5", "5"),
    ],
)
def test_the_last_box_is_the_answer(text: str, answer: str) -> None:
    assert strict(text) == answer
    assert lenient(text) == answer


@pytest.mark.parametrize(
    "text",
    [
        "",
        "5",
        "The answer is 5.",
        r"\boxed{}",
        r"\boxed{ }",
        r"\boxed{$$}",
        r"\boxed{5} but then \boxed{}",
        r"\boxed{5} but then \boxed{6",
        r"\boxed{5",
        r"\boxed{\{5\}",
    ],
)
def test_without_a_complete_box_a_strict_extraction_has_no_answer(text: str) -> None:
    assert strict(text) is None


def test_an_empty_box_is_not_made_good_by_what_follows_it() -> None:
    assert lenient(r"\boxed{} 4") is None
    assert lenient(r"$4$ \boxed{}") is None


def test_only_what_follows_the_thinking_counts() -> None:
    for read in (strict, lenient):
        assert read(r"<think>\boxed{3}</think>\boxed{5}") == "5"
        assert read(r"<think>\boxed{3}</think>") is None
        assert read(r"no tag at first \boxed{3}</think>\boxed{5}") == "5"
        assert read(r"<think>a</think>\boxed{3}<think>b</think>\boxed{5}") == "5"


@pytest.mark.parametrize("text", [r"<think> maybe \boxed{4}", r"</think><think>\boxed{4}"])
def test_an_open_thinking_is_truncated(text: str) -> None:
    for mode in ("strict", "lenient"):
        extraction = extract_answer(text, mode=mode)
        assert (extraction.answer, extraction.truncated) == (None, True)


@pytest.mark.parametrize(
    ("text", "answer", "rule"),
    [
        ("so <answer> 5 </answer> done 7", "5", "tag"),
        ("18 eggs\n#### 18", "18", "####"),
        ("lots of work\nA: 66", "66", "marker"),
        ("**Final Answer:** 66 apples", "66 apples", "marker"),
        ("Answer: $\\frac{1}{2}$ as above", r"\frac{1}{2}", "marker"),
        ("The answer is $x=5$, I think.", "x=5", "sentence"),
        ("So the final answer is 5. That was easy.", "5", "sentence"),
        (r"Adding, $2+3$ gives $5$.", "5", "formula"),
        (r"which is \(\frac{1}{2}\) in all", r"\frac{1}{2}", "formula"),
        (r"which is \[ 7 \]", "7", "formula"),
        ("first 3, then 1,234 eggs", "1,234", "number"),
        ("a discount of 35%", "35%", "number"),
    ],
)
def test_a_lenient_extraction_looks_in_other_places_in_order(
    text: str, answer: str, rule: str
) -> None:
    extraction = extract_answer(text, mode="lenient")
    assert (extraction.answer, extraction.rule) == (answer, rule)
    assert strict(text) is None


@pytest.mark.parametrize(
    "text", ["The answer is not $4$", "The answer is not 4", "It isn't $4$", "", "no idea"]
)
def test_a_denied_answer_is_none(text: str) -> None:
    assert lenient(text) is None


def test_a_pattern_replaces_the_box() -> None:
    text = r"\boxed{3}" + "\n#### 4\n#### 18"
    assert extract_answer(text, mode="strict", pattern=GSM8K).answer == "18"
    assert extract_answer(r"\boxed{3}", mode="strict", pattern=GSM8K).answer is None
    assert extract_answer(r"\boxed{3}", mode="lenient", pattern=GSM8K).answer == "3"
    assert extract_answer("x=5", mode="strict", pattern=r"\d").answer == "5"


def seconds(text: str) -> float:
    def once() -> float:
        start = perf_counter()
        extract_answer(text, mode="lenient")
        return perf_counter() - start

    return min(once() for _ in range(5))


def test_a_million_characters_with_a_box_at_the_end_take_under_a_tenth_of_a_second() -> None:
    prose = r"Then $x_{1}$ is \frac{a}{b} and {so} on, 12 of them. "
    text = prose * (1_000_000 // len(prose)) + r"\boxed{5}"
    assert seconds(text) < 0.1


@pytest.mark.parametrize(
    "unit",
    [
        "x", " ", "{", "}", "\\", "$", r"\boxed{", r"\boxed{4} ", r"\(", r"\[", "<think></think>",
        "Answer: ", "the answer is ", "12,", "#", "\n", "<answer>",
    ],
)  # fmt: skip
def test_extraction_is_linear(unit: str) -> None:
    sizes = [1 << power for power in (17, 18, 19)]
    times = [seconds(unit * (size // len(unit))) for size in sizes]
    for small, large in pairwise(times):
        assert large <= 2.5 * small + 0.02


@given(st.text(max_size=200), st.sampled_from(["strict", "lenient"]))
def test_an_answer_is_a_part_of_the_text(text: str, mode: str) -> None:
    answer = extract_answer(text, mode=mode).answer  # pyright: ignore[reportArgumentType]
    assert answer is None or (answer in text and answer.strip())


@given(st.lists(st.sampled_from(["{", "}", "\\{", r"\boxed{", "5", "\\", " ", "<think>"])))
def test_any_order_of_braces_and_boxes_is_read(parts: list[str]) -> None:
    answer = strict("".join(parts))
    assert answer is None or "<think>" not in answer or "</think>" not in answer


def test_both_orders_of_two_boxes_give_the_last() -> None:
    for (one, first), (two, second) in product([("boxed", "3"), ("fbox", "5")], repeat=2):
        assert strict(f"\\{one}{{{first}}} then \\{two}{{{second}}}") == second
