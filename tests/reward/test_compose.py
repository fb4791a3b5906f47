"""Composed rewards: the arithmetic, alignment under every order, logs, errors by name."""

import asyncio
import inspect
import pickle
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reward.arithmetic import arithmetic_reward
from reward.compose import ByDataSource, ComposedReward, Gate, RewardBatch, WeightedSum, name_of
from reward.format import boxed_once, think_answer_format
from reward.length import cosine_length, repetition, soft_overlong

SOURCES = ("sums", "form", "other")
scores = st.none() | st.integers(-4, 4).map(float)
rows_of_scores = st.lists(st.tuples(scores, scores, st.sampled_from(SOURCES)), max_size=12)


def first(
    prompts: Sequence[object], completions: Sequence[object], *, a: list, log_extra: Any, **c: Any
) -> list:
    """Say what column a says, and log the completions that were seen."""
    log_extra("first_saw", list(completions))
    c["log_metric"]("first/rows", float(len(completions)))
    return a


def second(*, completions: Sequence[object], b: list, log_extra: Any, **c: Any) -> list:
    """Say what column b says, and log the completions that were seen."""
    log_extra("second_saw", list(completions))
    return b


async def later(*, b: list, **columns: Any) -> list:
    """Say what column b says, after a while."""
    await asyncio.sleep(0)
    return b


def too_short(completions: Sequence[object], **columns: Any) -> list:
    """Lose the last row."""
    return [1.0] * (len(completions) - 1)


def call(function: Callable[..., Any], rows: Sequence[tuple], **more: Any) -> list:
    texts = [f"completion {number}" for number in range(len(rows))]
    columns = {name: [row[i] for row in rows] for i, name in enumerate(("a", "b", "data_source"))}
    return function(**{"prompts": texts, "completions": texts, **columns, **more})


SUM = WeightedSum([(first, 1.0), (second, 0.5)])
GATE = Gate(first, when=second)
REVERSE = Gate(second, when=first, minimum=0.0, otherwise=-1.0)
SOURCED = ByDataSource({"sums": first, "form": second}, default=SUM)
NESTED = WeightedSum([(SOURCED, 2.0), (GATE, 1.0), (Gate(SOURCED, when=SUM), 0.25)])
ALL = [SUM, GATE, REVERSE, SOURCED, NESTED]
named = pytest.mark.parametrize("function", ALL, ids=["sum", "gate", "reverse", "source", "nested"])


def plus(a: float | None, b: float | None, weight: float = 1.0) -> float | None:
    """Add as TRL does: None is left out, None and None is None."""
    known = [x for x in (a, None if b is None else weight * b) if x is not None]
    return sum(known) if known else None


@given(rows_of_scores)
def test_a_weighted_sum_leaves_none_out_and_keeps_a_row_of_none(rows: list[tuple]) -> None:
    assert call(SUM, rows) == [plus(a, b, 0.5) for a, b, _ in rows]


def test_a_row_that_no_function_grades_is_not_zero() -> None:
    assert call(SUM, [(None, None, ""), (0.0, None, ""), (None, 0.0, "")]) == [None, 0.0, 0.0]


@given(rows_of_scores)
def test_a_gate_pays_where_the_condition_holds(rows: list[tuple]) -> None:
    expected = [None if None in (a, b) else (a if b >= 1 else 0.0) for a, b, _ in rows]
    assert call(GATE, rows) == expected
    reverse = [None if None in (a, b) else (b if a >= 0 else -1.0) for a, b, _ in rows]
    assert call(REVERSE, rows) == reverse


@given(rows_of_scores)
def test_every_row_goes_to_the_function_of_its_source(rows: list[tuple]) -> None:
    chosen = {"sums": lambda a, b: a, "form": lambda a, b: b, "other": lambda a, b: plus(a, b, 0.5)}
    assert call(SOURCED, rows) == [chosen[source](a, b) for a, b, source in rows]


@named
@given(data=st.data(), rows=rows_of_scores)
def test_permuting_the_batch_permutes_the_rewards(
    function: ComposedReward, data: st.DataObject, rows: list[tuple]
) -> None:
    order = data.draw(st.permutations(range(len(rows))))
    straight = call(function, rows)
    assert len(straight) == len(rows)
    assert call(function, [rows[i] for i in order]) == [straight[i] for i in order]


@named
@given(rows=rows_of_scores)
def test_a_row_gets_in_a_batch_what_it_gets_alone(
    function: ComposedReward, rows: list[tuple]
) -> None:
    assert call(function, rows) == [call(function, [row])[0] for row in rows]


@named
@given(rows=rows_of_scores)
def test_logged_columns_stay_with_their_rows(function: ComposedReward, rows: list[tuple]) -> None:
    extra: dict[str, list] = {}

    def log_extra(column: str, values: list) -> None:
        assert column not in extra  # TRL appends: twice would misplace every row after
        extra[column] = values

    call(function, rows, log_extra=log_extra)
    texts = [f"completion {number}" for number in range(len(rows))]
    assert set(extra) <= {"first_saw", "second_saw"}
    for values in extra.values():
        assert len(values) == len(rows)
        assert all(v in (None, text) for v, text in zip(values, texts, strict=True))


def test_a_source_only_sees_its_own_rows_and_is_called_once() -> None:
    calls: list[list[str]] = []

    def spy(completions: list[str], log_metric: Any, **columns: Any) -> list[float]:
        calls.append(completions)
        assert all(len(columns[name]) == len(completions) for name in ("a", "b", "data_source"))
        assert columns["trainer_state"] == "state"
        return [1.0] * len(completions)

    rows = [(0.0, 0.0, s) for s in ("x", "sums", "y", "x")]
    metrics: list[tuple[str, float]] = []
    function = ByDataSource({"x": spy, "y": spy, "sums": first})
    rewards = call(
        function,
        rows,
        trainer_state="state",
        log_metric=lambda name, value: metrics.append((name, value)),
        log_extra=None,
    )
    assert rewards == [1.0, 0.0, 1.0, 1.0]
    assert calls == [["completion 0", "completion 2", "completion 3"]]
    assert metrics == [("first/rows", 1.0)]


def test_a_row_without_a_known_source_goes_to_the_default() -> None:
    function = ByDataSource({"sums": first}, default=second)
    rows = [(1.0, 2.0, source) for source in ("sums", "gsm", None, 3, ["sums"])]
    assert call(function, rows) == [1.0, 2.0, 2.0, 2.0, 2.0]


def test_token_ids_go_with_their_rows() -> None:
    function = ByDataSource({"long": soft_overlong(2, 1), "loop": repetition(1)})
    ids = [[1, 1], [1, 1], [1, 2]]
    rewards = function(["p"] * 3, ["c"] * 3, ids, data_source=["long", "loop", "loop"])
    assert rewards == [-1.0, -0.5, 0.0]


def test_no_function_runs_twice_in_one_call() -> None:
    calls: list[int] = []

    def costly(completions: list[str], log_metric: Any, **columns: Any) -> list[float]:
        calls.append(len(completions))
        log_metric("costly/called", 1.0)
        return [1.0] * len(completions)

    metrics: list[str] = []
    sourced = ByDataSource({"sums": costly, "form": second})
    parts = [
        (Gate(first, when=costly), 1.0),  # the condition, quiet, comes before the term, which logs
        (costly, 1.0),
        (Gate(costly, when=second, minimum=-9.0), 1.0),
        (Gate(second, when=sourced), 1.0),
        (sourced, 1.0),
        (sourced, 1.0),
    ]
    rows = [(1.0, 1.0, "sums"), (1.0, 1.0, "form")]
    rewards = call(WeightedSum(parts), rows, log_metric=lambda name, value: metrics.append(name))
    assert rewards == [6.0, 6.0]
    assert calls == [2, 1]  # all rows, and those of the source
    assert metrics.count("costly/called") == 2


def test_a_condition_logs_only_if_asked_to() -> None:
    for wanted, columns in ((False, {"first_saw"}), (True, {"first_saw", "second_saw"})):
        extra: dict[str, list] = {}
        gate = Gate(first, when=second, log_condition=wanted)
        call(gate, [(1.0, 1.0, "")], log_extra=extra.__setitem__)
        assert set(extra) == columns


def test_the_rates_of_a_verifier_pass_through() -> None:
    metrics: dict[str, float] = {}
    extra: dict[str, list] = {}
    WeightedSum([(arithmetic_reward, 1.0), (think_answer_format, 0.1)])(
        ["p"] * 2,
        ["24", "x"],
        answer=["24"] * 2,
        log_metric=metrics.__setitem__,
        log_extra=extra.__setitem__,
    )
    assert metrics == {"arithmetic/correct_rate": 0.5, "arithmetic/no_answer_rate": 0.5}
    assert extra["arithmetic_status"] == ["correct", "no_answer"]


def test_two_functions_that_log_the_same_column_keep_one_each() -> None:
    def other(completions: list[str], log_extra: Any, **columns: Any) -> list[float]:
        log_extra("first_saw", ["other"] * len(completions))
        return [0.0] * len(completions)

    extra: dict[str, list] = {}
    call(WeightedSum([(first, 1), (other, 1)]), [(1.0, 1.0, "")], log_extra=extra.__setitem__)
    assert extra == {"first_saw": ["completion 0"], "other/first_saw": ["other"]}
    extra.clear()
    rows = [(1.0, 1.0, "x"), (1.0, 1.0, "y")]
    call(ByDataSource({"x": first, "y": other}), rows, log_extra=extra.__setitem__)
    assert extra == {"first_saw": ["completion 0", "other"]}


WRAPPED = [
    lambda f: WeightedSum([(second, 1.0), (f, 1.0)]),
    lambda f: Gate(f, when=second),
    lambda f: Gate(second, when=f),
    lambda f: ByDataSource({"sums": f}),
    lambda f: cosine_length(f, 10),
]
wrapped = pytest.mark.parametrize("wrap", WRAPPED, ids=["sum", "gate", "when", "source", "cosine"])


@wrapped
def test_a_list_of_the_wrong_length_is_an_error_that_names_the_function(wrap: Any) -> None:
    with pytest.raises(ValueError, match=r"too_short returned 1 rewards for 2 completions"):
        call(wrap(too_short), [(1.0, 1.0, "sums")] * 2, completion_ids=[[1], [1]])


def no_number(**columns: Any) -> list:
    """Return a reward that is not finite."""
    return [0.0, float("nan")]


def one_number(**columns: Any) -> float:
    """Return one reward for the whole batch."""
    return 1.0


def wrong_column(log_extra: Any, **columns: Any) -> list:
    """Log a column with a row missing."""
    log_extra("mine", [1])
    return [0.0, 0.0]


@wrapped
@pytest.mark.parametrize(
    ("function", "kind", "message"),
    [
        (no_number, ValueError, "no_number returned nan for row 1; need a finite number, or None"),
        (one_number, TypeError, "one_number returned float; it must return a list"),
        (wrong_column, ValueError, "wrong_column logged 1 values in the column 'mine' for 2"),
    ],
)
def test_what_is_no_list_of_rewards_is_an_error_that_names_the_function(
    wrap: Any, function: Any, kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind, match=message):
        call(wrap(function), [(1.0, 1.0, "sums")] * 2, completion_ids=[[1], [1]])


def test_columns_of_the_wrong_length_are_named() -> None:
    with pytest.raises(ValueError, match=r"got 2 completions and other lengths in \{'a': 1\}"):
        SUM(["p"] * 2, ["c"] * 2, a=[1.0], b=[1.0, 1.0])
    with pytest.raises(ValueError, match=r"other lengths in \{'prompts': 1\}"):
        SUM(["p"], ["c"] * 2, a=[1.0] * 2, b=[1.0] * 2)


def test_an_unknown_source_is_an_error_that_names_those_known() -> None:
    function = ByDataSource({"sums": first, "form": second})
    with pytest.raises(ValueError, match=r"got the data_source 'gsm', .* knows form, sums; add"):
        call(function, [(1.0, 1.0, "gsm")])
    with pytest.raises(ValueError, match="got the data_source None"):
        call(function, [(1.0, 1.0, None)])
    with pytest.raises(ValueError, match="needs the column 'task' and got"):
        call(ByDataSource({"sums": first}, column="task"), [(1.0, 1.0, "sums")])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: WeightedSum([]), "got 0 terms"),
        (lambda: WeightedSum([(first, float("nan"))]), r"with the weights \[nan\]"),
        (lambda: Gate(first, when=second, minimum=float("inf")), "must be finite, got inf"),
        (lambda: ByDataSource({}), "got no reward functions"),
    ],
)
def test_compositions_without_a_meaning_are_refused(
    make: Callable[[], object], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        make()
    with pytest.raises(
        TypeError, match="got 'accuracy' as a part of weighted_sum, need a function"
    ):
        WeightedSum([("accuracy", 1.0)])  # pyright: ignore[reportArgumentType]


@named
def test_composed_rewards_pickle_and_have_names(function: ComposedReward) -> None:
    again = pickle.loads(pickle.dumps(function))
    rows = [(1.0, 0.5, "sums"), (None, 2.0, "form"), (0.0, None, "other")]
    assert call(again, rows) == call(function, rows)
    assert again.__name__ == function.__name__ == name_of(function)
    assert inspect.signature(again) == inspect.signature(function)
    assert f"{function.__module__}.{function.__qualname__}".startswith("reward.compose.")


def test_names_say_what_is_composed() -> None:
    assert (SUM.__name__, GATE.__name__) == ("weighted_sum", "first_if_second")
    assert WeightedSum([(first, 1.0)], name="accuracy").__name__ == "accuracy"


def test_the_signature_asks_for_the_columns_of_the_parts() -> None:
    def needed(function: Callable[..., Any]) -> set[str]:
        parameters = inspect.signature(function).parameters.values()
        kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
        return {p.name for p in parameters if p.default is p.empty and p.kind in kinds}

    assert needed(SUM) == {"prompts", "completions", "a", "b"}
    assert needed(SOURCED) == {"prompts", "completions", "a", "b", "data_source"}
    gate = Gate(boxed_once, when=arithmetic_reward)
    assert needed(gate) == {"prompts", "completions", "answer"}
    given = list(inspect.signature(gate).parameters)[:3]
    assert given == ["prompts", "completions", "completion_ids"]


def test_an_empty_batch_calls_nobody() -> None:
    assert WeightedSum([(no_number, 1.0)])([], []) == []


def test_an_async_part_is_waited_for() -> None:
    total = WeightedSum([(first, 1.0), (later, 1.0)])
    rows = [(1.0, 2.0, ""), (None, 4.0, "")]
    assert call(total, rows) == [3.0, 4.0]

    async def inside() -> list:
        with pytest.raises(RuntimeError, match=r"later is async .* use|call .* asyncio\.to_thread"):
            call(total, rows)
        return await asyncio.to_thread(call, total, rows)

    assert asyncio.run(inside()) == [3.0, 4.0]


def test_a_part_that_raises_is_heard() -> None:
    def broken(**columns: Any) -> list:
        raise KeyError("gold")

    with pytest.raises(KeyError, match="gold"):
        call(WeightedSum([(broken, 1.0)]), [(1.0, 1.0, "")])


def test_a_combination_of_ones_own_takes_one_method() -> None:
    class Best(ComposedReward):
        def combine(self, batch: RewardBatch) -> list[float | None]:
            pairs = zip(batch.rewards(first), batch.rewards(second), strict=True)
            return [max((x for x in pair if x is not None), default=None) for pair in pairs]

    assert call(Best("best", [first, second]), [(1.0, 2.0, ""), (None, None, "")]) == [2.0, None]
