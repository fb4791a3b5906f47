"""Length and repetition rewards: equal to TRL's, checked arguments, linear time."""

import math
import pickle
from collections.abc import Callable, Sequence
from time import perf_counter
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from trl.rewards import (
    get_cosine_scaled_reward,
    get_repetition_penalty_reward,
    get_soft_overlong_punishment,
)

from reward.arithmetic import arithmetic_reward
from reward.length import cosine_length, repetition, soft_overlong

LENGTHS = [0, 1, 2, 49, 50, 79, 80, 81, 90, 99, 100, 101, 150, 200, 1000]


def given_right(
    prompts: Sequence[object], completions: Sequence[object], *, right: list, **columns: Any
) -> list:
    """Say what the column says."""
    return right


def score(function: Callable[..., list], ids: Sequence[Sequence[int]], **columns: Any) -> list:
    return function(["p"] * len(ids), ["c"] * len(ids), ids, **columns)


def tokens(lengths: Sequence[int]) -> list[list[int]]:
    return [[7] * length for length in lengths]


@pytest.mark.parametrize(("longest", "cache"), [(100, 20), (100, 0), (100, 100), (1, 0), (80, 1)])
def test_overlong_punishment_equals_that_of_trl(longest: int, cache: int) -> None:
    expected = get_soft_overlong_punishment(longest, cache)(tokens(LENGTHS))
    assert score(soft_overlong(longest, cache), tokens(LENGTHS)) == pytest.approx(
        expected, abs=1e-12
    )
    assert -1.0 in expected


def test_overlong_punishment_by_hand() -> None:
    ids = tokens([80, 85, 100, 101])
    assert score(soft_overlong(100, 20), ids) == [0.0, -5 / 20, -1.0, -1.0]


@given(
    st.lists(st.lists(st.integers(0, 3), max_size=30), min_size=1, max_size=5),
    st.integers(1, 6),
    st.floats(-5, 0),
)
def test_repetition_penalty_equals_that_of_trl(
    ids: list[list[int]], size: int, penalty: float
) -> None:
    expected = get_repetition_penalty_reward(size, penalty)(ids)
    assert score(repetition(size, penalty), ids) == pytest.approx(expected, abs=1e-12)


def test_repetition_by_hand() -> None:
    # 12 12 12 has the pairs 12 21 12 21 12: two distinct ones of five
    assert score(repetition(2), [[1, 2] * 3]) == [-3 / 5]
    assert score(repetition(3), [[], [1], [1, 1], [1, 1, 1], [1] * 4]) == [0, 0, 0, 0, -1 / 2]


def test_repetition_is_linear_in_the_length() -> None:
    def seconds(length: int) -> float:
        ids = [list(range(length))]
        start = perf_counter()
        score(repetition(4), ids)
        return perf_counter() - start

    assert min(seconds(100_000) for _ in range(3)) < 0.5


@pytest.mark.parametrize(
    "values",
    [
        {},
        {
            "min_value_wrong": -2.0,
            "max_value_wrong": -0.1,
            "min_value_correct": 0.2,
            "max_value_correct": 3.0,
        },
    ],
)
def test_cosine_values_equal_those_of_trl(values: dict[str, float]) -> None:
    pytest.importorskip("math_verify")
    texts = [r"$\boxed{24}$", r"$\boxed{25}$"] * len(LENGTHS)
    chats = [[{"role": "assistant", "content": text}] for text in texts]
    ids = tokens([length for length in LENGTHS for _ in range(2)])
    expected = get_cosine_scaled_reward(100, **values)(
        chats, solution=[r"$24$"] * len(ids), completion_ids=ids
    )
    right = [1.0, 0.0] * len(LENGTHS)
    ours = score(cosine_length(given_right, 100, **values), ids, right=right)
    assert ours == pytest.approx(expected, abs=1e-6)
    assert min(expected) < 0 < max(expected)


def test_cosine_values_up_to_the_limit_are_those_of_open_r1() -> None:
    # low + (high - low) (1 + cos(pi t / T)) / 2, with the two values of a wrong answer swapped
    for length in (0, 10, 50, 77, 100):
        cosine = (1 + math.cos(math.pi * length / 100)) / 2
        expected = [0.5 + (1.0 - 0.5) * cosine, -0.5 + (-1.0 + 0.5) * cosine]
        ours = score(cosine_length(given_right, 100), tokens([length] * 2), right=[1.0, 0.0])
        assert ours == pytest.approx(expected, abs=1e-6)


def test_beyond_the_limit_a_right_answer_is_not_paid_more_again() -> None:
    ours = score(cosine_length(given_right, 100), tokens([100, 150, 200]), right=[1.0] * 3)
    assert ours == pytest.approx([0.5] * 3)


def test_a_row_that_cannot_be_graded_has_no_cosine_value() -> None:
    assert score(cosine_length(given_right, 9), tokens([1, 1]), right=[None, 1.0])[0] is None


def test_cosine_asks_for_the_columns_of_its_verifier_and_logs_what_it_logs() -> None:
    metrics: dict[str, float] = {}
    extra: dict[str, list] = {}
    rewards = cosine_length(arithmetic_reward, 10)(
        prompts=["p", "p"],
        completions=["24", "25"],
        completion_ids=tokens([10, 10]),
        answer=["24", "24"],
        log_metric=metrics.__setitem__,
        log_extra=extra.__setitem__,
    )
    assert rewards == [0.5, -0.5]
    assert metrics == {"arithmetic/correct_rate": 0.5, "arithmetic/wrong_rate": 0.5}
    assert extra["arithmetic_extracted"] == ["24", "25"]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: soft_overlong(0, 0), "got max_length=0 and cache=0"),
        (lambda: soft_overlong(10, 11), "need max_length >= 1 and 0 <= cache <= max_length"),
        (lambda: soft_overlong(10, -1), "cache=-1"),
        (lambda: repetition(0), "ngram_size must be at least 1, got 0"),
        (lambda: repetition(3, 0.5), "max_penalty must be finite and <= 0, got 0.5"),
        (lambda: repetition(3, -math.inf), "got -inf"),
        (lambda: cosine_length(given_right, 0), "max_length must be at least 1 token, got 0"),
        (lambda: cosine_length(given_right, 9, minimum=math.nan), "values must be finite"),
    ],
)
def test_settings_without_a_meaning_are_refused(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


FUNCTIONS = [soft_overlong(10, 5), repetition(2), cosine_length(given_right, 10)]


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda function: function.__name__)
def test_token_counts_are_asked_for_by_name(function: Callable[..., list]) -> None:
    message = rf"{function.__name__} counts tokens: got none of completion_ids for 1 completions"
    with pytest.raises(ValueError, match=message):
        function(["p"], ["c"], right=[1.0])


@pytest.mark.parametrize("function", FUNCTIONS[:2], ids=lambda function: function.__name__)
def test_a_missing_row_of_tokens_is_refused(function: Callable[..., list]) -> None:
    with pytest.raises(ValueError, match="got 1 lists of completion_ids for 2 completions"):
        function(["p"] * 2, ["c"] * 2, [[1]])


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda function: function.__name__)
def test_length_rewards_pickle_and_take_what_trl_passes(function: Callable[..., list]) -> None:
    again = pickle.loads(pickle.dumps(function))
    batch: dict[str, Any] = {
        "prompts": ["p"] * 3,
        "completions": ["c"] * 3,
        "completion_ids": [[1] * 4, [1] * 9, [1, 2, 3]],
        "right": [1.0, 0.0, 1.0],
        "trainer_state": None,
        "log_extra": lambda column, values: None,
        "log_metric": lambda name, value: None,
    }
    assert again(**batch) == function(**batch)
    assert again.__name__ == function.__name__
    assert function.__name__ in {"soft_overlong", "repetition", "cosine_length"}
