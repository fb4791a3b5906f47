"""InnerEstimator: the value of a moving average, the gradient of the mini-batch."""

import copy
import math
from functools import partial

import pytest
import torch

from llm_xrisk.fcco import InnerEstimator, cosine, scent

F64 = torch.float64


def build(**options: object) -> InnerEstimator:
    return InnerEstimator(**{"num_samples": 4, "gamma": 0.5, "state_dtype": F64} | options)


def rows(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=F64)


def test_the_value_is_the_average_and_the_gradient_that_of_the_minibatch() -> None:
    inner, index = build(), torch.tensor([2])
    inner(rows(4.0), index)
    g = rows(8.0).requires_grad_()
    u = inner(g, index)
    u.log().sum().backward()
    assert u.item() == 0.5 * 4 + 0.5 * 8
    assert g.grad.item() == 1 / 6  # f'(u) with no factor gamma


def test_the_log_form_is_the_plain_one_in_value_and_gradient() -> None:
    plain, log, index = build(), build(log=True), torch.tensor([0, 3])
    for values in (rows(1.0, 5.0), rows(3.0, 0.2), rows(0.1, 7.0)):
        g, log_g = values.clone().requires_grad_(), values.log().requires_grad_()
        u, log_u = plain(g, index), log(log_g, index)
        torch.testing.assert_close(log_u.exp(), u, rtol=1e-12, atol=0)
        u.log().sum().backward()
        log_u.sum().backward()
        torch.testing.assert_close(log_g.grad, g.grad * values, rtol=1e-12, atol=0)


def test_rows_of_one_sample_have_a_value_each_and_leave_their_mean() -> None:
    index = torch.tensor([1, 2, 1])
    plain, log = build(initial=1.0), build(initial=0.0, log=True)
    values = [(1 + 3) / 2, (1 + 5) / 2, (1 + 7) / 2]
    assert plain(rows(3.0, 5.0, 7.0), index).tolist() == values
    assert log(rows(3.0, 5.0, 7.0).log(), index).exp().tolist() == pytest.approx(values)
    for state in (plain.u, log.u.exp()):
        assert state[[1, 2]].tolist() == pytest.approx([(2 + 4) / 2, 3.0])


def test_rows_outside_where_change_nothing_and_come_back_as_they_are() -> None:
    inner, index = build(), torch.tensor([0, 1, 1])
    inner(rows(2.0, 4.0, 6.0), index, torch.tensor([False, True, False]))
    assert inner.u.tolist() == [0.0, 4.0, 0.0, 0.0]
    assert inner.visited.tolist() == [False, True, False, False]
    got = inner(rows(2.0, 8.0, 9.0), index, torch.tensor([False, True, False]))
    assert got.tolist() == [2.0, 6.0, 9.0]


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_rows_outside_where_have_the_gradient_of_g_however_large_they_are(
    dtype: torch.dtype,
) -> None:
    inner = build(log=True, state_dtype=dtype)
    g = torch.tensor([1.0, 1e4], dtype=dtype, requires_grad=True)
    value = inner(g, torch.tensor([0, 1]), torch.tensor([True, False]))
    value.sum().backward()
    assert g.grad.tolist() == [1.0, 1.0]


def test_a_state_that_took_in_the_minibatch_bounds_the_weight_by_one_over_gamma() -> None:
    inner, index = build(log=True, gamma=0.1), torch.tensor([0])
    inner(rows(-1e4), index)
    g = rows(1e4).requires_grad_()
    inner(g, index).backward()
    assert g.grad.item() == pytest.approx(1 / 0.1, rel=1e-12)


def test_bfloat16_neither_casts_the_state_nor_stops_a_small_gamma() -> None:
    inner = InnerEstimator(1, gamma=1e-3).to(torch.bfloat16).half().double()
    assert inner.u.dtype == inner.gamma.dtype == torch.float32
    index = torch.tensor([0])
    inner(torch.tensor([1.0], dtype=torch.bfloat16), index)
    for _ in range(2000):
        inner(torch.tensor([2.0], dtype=torch.bfloat16), index)
    assert inner.u.item() == pytest.approx(2 - 0.999**2000, abs=1e-3)


def test_the_gradient_keeps_the_dtype_of_the_rows() -> None:
    g = torch.tensor([1.0], dtype=torch.bfloat16, requires_grad=True)
    value = InnerEstimator(1)(g, torch.tensor([0]))
    value.sum().backward()
    assert (value.dtype, g.grad.dtype) == (torch.float32, torch.bfloat16)


def test_gamma_follows_its_schedule_by_epoch() -> None:
    inner, index = build(gamma=cosine(gamma_min=0.2, epochs=10)), torch.tensor([0])
    inner(rows(1.0), index)
    inner.set_epoch(5)
    assert inner(rows(2.0), index).item() == pytest.approx(0.4 * 1 + 0.6 * 2)
    assert copy.deepcopy(inner).gamma.item() == pytest.approx(0.6)


def test_scent_fits_in_as_a_rule() -> None:
    inner = build(log=True, rule=partial(scent, log_alpha=0.5), initial=0.0)
    got = inner(rows(2.0).log(), torch.tensor([1])).exp()
    gamma = 1 / (1 + math.exp(-0.5))  # sigmoid(log alpha + log u) at u = 1
    assert got.item() == pytest.approx(1 - gamma + gamma * 2, rel=1e-12)


def test_a_vector_of_inner_values_is_tracked_elementwise() -> None:
    inner, index = build(shape=(2,)), torch.tensor([3, 3])
    inner(torch.tensor([[1.0, 10.0], [3.0, 30.0]], dtype=F64), index)
    assert inner.u[3].tolist() == [2.0, 20.0]
    assert inner.u.shape == (4, 2)


def test_an_empty_batch_changes_nothing() -> None:
    inner = build()
    assert inner(rows(), torch.tensor([], dtype=torch.long)).shape == (0,)
    assert not inner.visited.any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_samples": 0}, "num_samples must be at least 1, got 0: pass len"),
        ({"gamma": 0.0}, r"gamma must be in \(0, 1\], got 0.0"),
        ({"gamma": 1.01}, r"gamma must be in \(0, 1\], got 1.01"),
        ({"gamma": float("nan")}, r"gamma must be in \(0, 1\], got nan"),
    ],
)
def test_bad_settings_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(**options)


@pytest.mark.parametrize("wrong", [-1, 4])
def test_an_index_out_of_range_is_refused_before_anything_is_written(wrong: int) -> None:
    inner = build()
    with pytest.raises(IndexError, match=rf"index {wrong} is out of range for num_samples=4"):
        inner(rows(1.0, 2.0), torch.tensor([0, wrong]))
    assert not inner.visited.any()


def test_a_checkpoint_of_another_size_is_refused() -> None:
    with pytest.raises(ValueError, match="tracks num_samples=4, this objective has num_samples=7"):
        build(num_samples=7).load_state_dict(build().state_dict())
