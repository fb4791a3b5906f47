"""PerSampleDual: projected steps on variables keyed by sample."""

import pytest
import torch

from llm_xrisk.fcco import PerSampleDual

F64 = torch.float64


def build(**options: object) -> PerSampleDual:
    return PerSampleDual(**{"num_samples": 4, "lr": 0.5, "state_dtype": F64} | options)


def rows(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=F64)


def test_a_step_moves_the_visited_samples_alone() -> None:
    dual = build(initial=1.0)
    dual.step(rows(2.0, -4.0), torch.tensor([0, 3]))
    assert dual.value.tolist() == [1 - 0.5 * 2, 1.0, 1.0, 1 + 0.5 * 4]


def test_equal_samples_take_one_step_with_their_mean_gradient() -> None:
    dual = build()
    dual.step(rows(2.0, 1.0, 6.0), torch.tensor([1, 2, 1]))
    assert dual.value.tolist() == [0.0, -2.0, -0.5, 0.0]


def test_rows_outside_where_take_no_step() -> None:
    dual, where = build(beta=0.5), torch.tensor([True, False, False])
    dual.step(rows(2.0, 100.0, float("nan")), torch.tensor([1, 1, 2]), where)
    assert dual.value.tolist() == [0.0, -0.5, 0.0, 0.0]
    assert dual.direction.tolist() == [0.0, 1.0, 0.0, 0.0]


def test_steps_are_projected() -> None:
    dual = build(lower=-0.2, upper=0.3)
    dual.step(rows(5.0, -5.0), torch.tensor([0, 1]))
    assert dual(torch.tensor([0, 1])).tolist() == [-0.2, 0.3]


def test_beta_weighs_the_new_gradient() -> None:
    dual, index = build(beta=0.25, lr=1.0), torch.tensor([2])
    dual.step(rows(4.0), index)
    dual.step(rows(8.0), index)
    assert dual.direction[2].item() == 0.75 * 1 + 0.25 * 8
    assert dual.value[2].item() == -(1.0 + 2.75)


def test_eval_takes_no_step() -> None:
    dual = build().eval()
    dual.step(rows(1.0), torch.tensor([0]))
    assert dual.value.tolist() == [0.0] * 4


def test_a_step_returns_the_values_it_leaves_in_every_row() -> None:
    dual, index = build(), torch.tensor([1, 2, 1])
    assert dual.step(rows(2.0, 1.0, 6.0), index).tolist() == [-2.0, -0.5, -2.0]
    assert dual.eval().step(rows(9.0, 9.0, 9.0), index).tolist() == [-2.0, -0.5, -2.0]


def test_bfloat16_does_not_cast_it() -> None:
    assert PerSampleDual(2, lr=0.1).to(torch.bfloat16).value.dtype == torch.float32


@pytest.mark.parametrize("wrong", [-1, 4])
def test_an_index_out_of_range_is_refused(wrong: int) -> None:
    dual, index = build(), torch.tensor([wrong])
    with pytest.raises(IndexError, match=rf"index {wrong} is out of range for num_samples=4"):
        dual.step(rows(1.0), index)
    with pytest.raises(IndexError, match=rf"index {wrong} is out of range for num_samples=4"):
        dual(index)


def test_a_checkpoint_of_another_size_is_refused() -> None:
    with pytest.raises(ValueError, match="tracks num_samples=4, this objective has num_samples=7"):
        build(num_samples=7).load_state_dict(build().state_dict())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_samples": 0}, "num_samples must be at least 1, got 0"),
        ({"lr": 0.0}, "need lr > 0 and beta in .* got lr=0.0"),
        ({"beta": 1.5}, "got lr=0.5, beta=1.5"),
        ({"lower": 1.0, "upper": 0.0}, r"lower must not exceed upper, got \[1.0, 0.0\]"),
    ],
)
def test_bad_settings_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(**options)
