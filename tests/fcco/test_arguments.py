"""What constructors refuse, and how the refusal reads."""

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
import pytest
import torch
from torch import Tensor

from llm_xrisk.fcco import InnerEstimator, PerSampleDual
from llm_xrisk.fcco.arguments import checked, fits, needed, shown


class Shape:
    pass


class Square(Shape):
    pass


class Example:
    @checked
    def __init__(
        self,
        count: int,
        *,
        rate: float | Callable[[float], float] = 0.5,
        shape: Shape | None = None,
        place: tuple[float, float] = (0.0, 0.0),
        kind: Literal["one", "two"] = "one",
        **rest: Any,
    ) -> None:
        self.count, self.rate, self.shape, self.place = count, rate, shape, place


@pytest.mark.parametrize(
    "given",
    [
        {"count": np.int64(3)},
        {"rate": np.float32(0.25)},
        {"rate": 1},
        {"rate": math.sqrt},
        {"shape": Square()},
        {"place": [1, 2.0]},
        {"kind": "two"},
        {"anything": object()},
    ],
)
def test_what_an_annotation_means_is_taken(given: dict[str, Any]) -> None:
    assert Example(**{"count": 1} | given).count


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"count": 2.0}, "count of Example must be an integer, got 2.0"),
        ({"count": True}, "count of Example must be an integer, got True"),
        ({"count": [1, 2]}, "must be an integer, got a list of 2"),
        ({"count": torch.tensor(3)}, r"got a int64 tensor \(\); pass its .item\(\)"),
        ({"rate": "0.5"}, "rate of Example must be a number or a function, got '0.5'"),
        ({"rate": None}, "must be a number or a function, got None"),
        ({"shape": Square}, r"a Shape or None, got the class Square; pass an instance, Square\("),
        ({"shape": "square"}, "must be a Shape or None, got 'square'"),
        ({"place": (1.0,)}, "must be 2 numbers, got a tuple of 1"),
        ({"place": ("a", "b")}, "must be 2 numbers, got a tuple of 2"),
    ],
)
def test_another_kind_is_refused_with_what_is_needed(given: dict[str, Any], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        Example(**{"count": 1} | given)


@pytest.mark.parametrize("rate", [math.nan, math.inf])
def test_numbers_that_are_not_finite_are_refused(rate: float) -> None:
    with pytest.raises(ValueError, match=f"rate of Example must be finite, got {rate}"):
        Example(1, rate=rate)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((), "missing a required argument: 'count'; it takes Example\\(count, \\*, rate=0.5"),
        ((1, 0.5), r"got Example\(1, 0.5\): too many positional arguments; .* goes by name"),
    ],
)
def test_a_call_that_does_not_fit_shows_the_one_that_does(
    args: tuple[Any, ...], message: str
) -> None:
    with pytest.raises(TypeError, match=message):
        Example(*args)


def test_advice_follows_the_argument_it_is_about() -> None:
    class Advised:
        def __init__(self, size: int) -> None: ...

    Advised.__init__ = checked(Advised.__init__, {"size": "pass len(data)"})
    with pytest.raises(TypeError, match=r"got 'all'; pass len\(data\)"):
        Advised(size="all")
    with pytest.raises(TypeError, match=r"missing a required argument: 'size'.*: pass len\(data\)"):
        Advised()


def test_kinds_of_entries_are_looked_at() -> None:
    assert fits([0.5, 1], Sequence[float])
    assert fits(np.array([0.5]), Sequence[float])
    assert not fits("0.5", Sequence[float])
    assert not fits(np.array(0.5), Sequence[float])
    assert not fits(torch.ones(2), Sequence[float])
    assert fits(torch.ones(2), Sequence[float] | Tensor)
    assert needed(Sequence[float] | Tensor | None) == "several numbers or a tensor or None"


def test_state_has_32_bits_at_least() -> None:
    with pytest.raises(TypeError, match=r"torch.float64, got .*bfloat16.*does not move"):
        InnerEstimator(3, state_dtype=torch.bfloat16)
    with pytest.raises(TypeError, match=r"must be torch.float32 or torch.float64"):
        PerSampleDual(3, lr=0.1, state_dtype=torch.int64)


@pytest.mark.parametrize("index", [[0, 1], np.array([0, 1]), torch.tensor([0.0, 1.0]), "01"])
def test_state_is_read_by_tensors_of_integers(index: Any) -> None:
    with pytest.raises(TypeError, match=r"index must be a tensor of integers, .* got "):
        InnerEstimator(3)(torch.ones(2), index)
    with pytest.raises(TypeError, match=r"index must be a tensor of integers, .* got "):
        PerSampleDual(3, lr=0.1)(index)


@pytest.mark.parametrize("shape", [(2,), (2, 3), (3, 2), ()])
def test_inner_values_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    inner = InnerEstimator(4, shape=(2,))
    with pytest.raises(ValueError, match=r"an estimator of shape \(2,\) needs one such value"):
        inner(torch.ones(shape), torch.tensor([0, 1]))


def test_long_values_are_shown_short() -> None:
    assert shown("x" * 100) == "'" + "x" * 35 + "...'"
    assert shown(np.zeros((2, 3))) == "a NumPy array (2, 3)"
