"""Form rewards: equal to TRL's where TRL has one, and linear in the length of the text."""

import pickle
from collections.abc import Callable
from time import process_time

import pytest
from hypothesis import given
from hypothesis import strategies as st
from trl.rewards import think_format_reward

from reward.format import Sections, boxed_once, sections, tag_count, think_answer_format

MARKS = ["<think>", "</think>", "<answer>", "</answer>", "\n", " ", "x", "\r\n", "<", "think>"]
THOUGHTS = [
    "<think>a</think>b", "<think></think>", "<think>\na\n</think>\nb", " <think>a</think>b",
    "\n<think>a</think>b", "a<think>b</think>c", "<think>a", "a</think>b", "", "<think>",
    "<think><think>a</think></think>b", "<think>a</think>b<think>c</think>",
    "<think>a</think>b</think>", "<think>a</think>b<think>", "</think><think>a", "<THINK>a</THINK>",
    "<think>a</think >b", "<think>a< /think>b", "x\n<think>a</think>b", "<think>\u2028</think>\x85",
]  # fmt: skip


def score(function: Callable[..., list[float | None]], *texts: object) -> list[float | None]:
    return function(["p"] * len(texts), list(texts))


def of_trl(*texts: str) -> list[float]:
    return think_format_reward([[{"role": "assistant", "content": text}] for text in texts])


def test_thought_rewards_equal_those_of_trl() -> None:
    ours = score(think_answer_format, *THOUGHTS)
    assert ours == of_trl(*THOUGHTS)
    assert {0.0, 1.0} == set(ours)


@given(st.lists(st.sampled_from(MARKS), max_size=8).map("".join))
def test_any_sequence_of_tags_is_rewarded_as_trl_does(text: str) -> None:
    for start in ("", "<think>"):
        assert score(think_answer_format, start + text) == of_trl(start + text)


def seconds(function: Callable[..., object], text: str) -> float:
    times = []
    for _ in range(3):
        start = process_time()
        function(["p"], [text])
        times.append(process_time() - start)
    return min(times)


HUGE = {
    "a thought that is never closed": "<think>" + "word " * 40_000,
    "openings": "<think>" * 30_000,
    "closings": "</think>" * 25_000,
    "half tags": "<think>" + "</think " * 25_000,
    "braces": "\\boxed{" + "{" * 200_000,
    "boxes": "\\boxed{" * 30_000,
    "boxes without a brace": "\\boxed" + " " * 200_000,
    "backslashes": "\\boxed{" + "\\" * 200_000,
    "answers": "<think>a</think><answer>" + "<answer" * 30_000,
}


@pytest.mark.parametrize("text", HUGE.values(), ids=HUGE.keys())
@pytest.mark.parametrize(
    "function", [think_answer_format, boxed_once, tag_count, sections("think", "answer")]
)
def test_time_is_linear_in_two_hundred_kilobytes(
    function: Callable[..., object], text: str
) -> None:
    assert len(text) >= 200_000
    assert seconds(function, text) < 0.25  # a step for each pair of characters takes minutes


def test_a_thought_that_is_never_closed_costs_less_than_fifty_milliseconds() -> None:
    assert seconds(think_answer_format, HUGE["a thought that is never closed"]) < 0.05


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (r"\boxed{2}", 1.0),
        (r"so \fbox{2}.", 1.0),
        (r"\boxed {2}", 1.0),
        (r"\boxed{\frac{1}{2}}", 1.0),
        (r"\boxed{\{1, 2\}}", 1.0),
        (r"\boxed{\left\{ 1 \right.}", 1.0),
        (r"\boxed{a\\}", 1.0),
        (r"\boxed{2\}", 0.0),
        (r"\boxed{}", 0.0),
        (r"\boxed{ }", 0.0),
        (r"\boxed{2", 0.0),
        (r"\boxed 2", 0.0),
        ("2", 0.0),
        ("", 0.0),
        (r"\boxed{2} \boxed{2}", 0.0),
        (r"\boxed{2} \fbox{3}", 0.0),
        (r"\boxed{\boxed{2}}", 0.0),
        (r"\boxed{2} and \boxed{", 0.0),
        (r"<think>\boxed{1}</think>\boxed{2}", 1.0),
        (r"<think>\boxed{1}</think>2", 0.0),
        (r"<think>\boxed{1}", 0.0),
        (r"\boxed{1}<think>", 0.0),
        (r"</think>\boxed{2}", 1.0),
    ],
)
def test_exactly_one_closed_box_after_the_thought_is_paid(text: str, expected: float) -> None:
    assert score(boxed_once, text) == [expected]


def test_each_tag_that_occurs_once_is_a_quarter() -> None:
    whole = "<think>a</think><answer>b</answer>"
    cases = {whole: 1.0, "<think>a</think>b": 0.5, "</answer>": 0.25, "": 0.0, whole * 2: 0.0}
    assert score(tag_count, *cases) == list(cases.values())
    assert score(tag_count, "<think><think></think><answer></answer>") == [0.75]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<think>a</think><answer>b</answer>", 1.0),
        (" <think>a</think>\n\n<answer>b</answer>\n", 1.0),
        ("<think>a</think><answer></answer>", 0.0),
        ("<think> </think><answer>b</answer>", 0.0),
        ("<answer>b</answer><think>a</think>", 0.0),
        ("<think>a<answer>b</answer></think>", 0.0),
        ("<think>a</think>so<answer>b</answer>", 0.0),
        ("<think>a</think><answer>b</answer>!", 0.0),
        ("<think>a</think><answer>b</answer><answer>c</answer>", 0.0),
        ("<think>a</think>b", 0.0),
        ("</think>a<think><answer>b</answer>", 0.0),
    ],
)
def test_sections_stand_in_order_and_alone(text: str, expected: float) -> None:
    assert score(sections("think", "answer"), text) == [expected]


@pytest.mark.parametrize("tags", [(), ("think", "think"), ("<think>",), ("a b",), ("",)])
def test_section_names_that_make_no_tags_are_refused(tags: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match="need one or several different words"):
        sections(*tags)


FUNCTIONS = [think_answer_format, boxed_once, tag_count, sections("think", "answer")]


@pytest.mark.parametrize("function", FUNCTIONS)
def test_plain_and_conversational_completions_score_alike(
    function: Callable[..., list[float | None]],
) -> None:
    texts = [*THOUGHTS, r"\boxed{2}", "<think>a</think> <answer>b</answer>"]
    chats = [[{"role": "user", "content": "?"}, {"role": "assistant", "content": t}] for t in texts]
    assert score(function, *chats) == score(function, *texts)


@pytest.mark.parametrize("function", FUNCTIONS)
@given(
    completion=st.recursive(st.none() | st.text() | st.integers(), st.lists, max_leaves=8)
    | st.lists(st.sampled_from([*MARKS, "\\boxed", "{", "}", "\\"])).map("".join)
)
def test_a_completion_of_any_shape_scores_between_zero_and_one(
    function: Callable[..., list[float | None]], completion: object
) -> None:
    (reward,) = function(["p"], [completion], [[1]], trainer_state=None, answer=["2"])
    assert reward is not None
    assert 0.0 <= reward <= 1.0


@pytest.mark.parametrize("function", FUNCTIONS)
def test_form_rewards_pickle_and_have_names(function: Callable[..., list[float | None]]) -> None:
    again = pickle.loads(pickle.dumps(function))
    assert again.__name__ == function.__name__
    assert score(again, *THOUGHTS) == score(function, *THOUGHTS)


def test_sections_are_named_by_what_they_are() -> None:
    assert Sections(("a",)).__name__ == "sections"
