"""Sums and means over groups of rows, against loops."""

import math

import pytest
import torch

from llm_xrisk.fcco.groups import group_mean, group_sum, slots

F64 = torch.float64
INDEX = torch.tensor([9, 2, 9, 9, 5, 2])
WHERE = torch.tensor([True, True, False, True, False, True])
VALUES = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 6.0], dtype=F64)


def test_equal_entries_share_a_slot_and_others_do_not() -> None:
    slot = slots(INDEX)
    assert ((slot[:, None] == slot) == (INDEX[:, None] == INDEX)).all()
    assert slot.min() >= 0
    assert slot.max() < len(INDEX)


def test_sums_run_over_the_rows_of_a_slot() -> None:
    assert group_sum(VALUES, slots(INDEX)).tolist() == [8.0, 8.0, 8.0, 8.0, 5.0, 8.0]


@pytest.mark.parametrize("shift", [0.0, 1e4, -1e4])
def test_means_and_their_gradients_run_over_the_rows_in_where(shift: float) -> None:
    mean, count = group_mean(VALUES, slots(INDEX), WHERE)
    assert count.tolist() == [2.0, 2.0, 2.0, 2.0, 0.0, 2.0]
    assert mean.tolist() == [2.5, 4.0, 2.5, 2.5, 0.0, 4.0]
    logs = (VALUES + shift).requires_grad_()
    log_mean, _ = group_mean(logs, slots(INDEX), WHERE, log=True)
    want = shift + math.log((math.exp(1) + math.exp(4)) / 2)
    assert log_mean[0].item() == pytest.approx(want, rel=1e-12)
    assert log_mean[4].item() == pytest.approx(torch.finfo(F64).min)
    log_mean[:4].sum().backward()
    share = math.exp(1) / (math.exp(1) + math.exp(4))
    other = math.exp(2) / (math.exp(2) + math.exp(6))
    want = [3 * share, other, 0.0, 3 * (1 - share), 0.0, 1 - other]
    assert logs.grad.tolist() == pytest.approx(want, rel=1e-9)


def test_what_stands_outside_where_may_be_anything() -> None:
    values = torch.tensor([math.nan, math.inf, 2.0], requires_grad=True)
    where = torch.tensor([False, False, True])
    mean, _ = group_mean(values, torch.zeros(3, dtype=torch.long), where)
    mean.sum().backward()
    assert mean.tolist() == [2.0] * 3
    assert values.grad.tolist() == [0.0, 0.0, 3.0]
