"""The update rules and the schedules, against arithmetic in the linear domain."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llm_xrisk.fcco import constant, cosine, log_moving_average, moving_average, scent

F64 = torch.float64
logs = st.floats(-30, 30)
weights = st.floats(1e-6, 1.0)


def scalar(value: float) -> torch.Tensor:
    return torch.tensor(value, dtype=F64)


@given(logs, logs, weights)
def test_the_log_average_is_the_log_of_the_average(u: float, g: float, gamma: float) -> None:
    got = log_moving_average(scalar(u), scalar(g), scalar(gamma)).item()
    want = moving_average(scalar(u).exp(), scalar(g).exp(), scalar(gamma)).log().item()
    assert got == pytest.approx(want, rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("g", [-1e30, 0.0, 1e30])
def test_gamma_one_forgets_the_past_exactly(g: float) -> None:
    one = scalar(1.0)
    for u in (-1e30, 0.0, 1e30):
        assert log_moving_average(scalar(u), scalar(g), one).item() == g
        assert moving_average(scalar(u), scalar(g), one).item() == g


@given(logs, logs, st.floats(-10, 10))
def test_scent_without_its_multiplier_is_sox(u: float, g: float, log_alpha: float) -> None:
    gamma = scalar(log_alpha).sigmoid()
    got = scent(scalar(u), scalar(g), scalar(0.5), log_alpha=log_alpha, multiplier=0.0).item()
    want = log_moving_average(scalar(u), scalar(g), gamma).item()
    assert got == pytest.approx(want, rel=1e-9, abs=1e-9)


@given(st.floats(-8, 8), st.floats(-8, 8), st.floats(-6, 6))
def test_scent_is_the_proximal_step_of_the_dual(nu: float, log_g: float, log_alpha: float) -> None:
    alpha, g = math.exp(log_alpha), math.exp(log_g)
    got = scent(scalar(nu), scalar(log_g), scalar(0.5), log_alpha=log_alpha).item()
    want = nu + math.log1p(alpha * g) - math.log1p(alpha * math.exp(nu))
    assert got == pytest.approx(want, rel=1e-9, abs=1e-9)
    # stationarity of g e^-v + v + D(v, nu) / alpha with the Bregman distance of e^-v
    slope = -g * math.exp(-got) + 1 + (math.exp(-nu) - math.exp(-got)) / alpha
    assert slope == pytest.approx(0.0, abs=1e-8 * max(1.0, math.exp(-nu) / alpha))


def test_scent_equals_sox_for_the_corrected_alpha() -> None:
    gamma, nu = 0.3, 0.7
    log_alpha = math.log(gamma / (1 - gamma)) - nu  # the book prints gamma e^-nu
    got = scent(scalar(nu), scalar(1.2), scalar(0.5), log_alpha=log_alpha)
    want = log_moving_average(scalar(nu), scalar(1.2), scalar(gamma))
    torch.testing.assert_close(got, want, rtol=1e-12, atol=0)


def test_the_cosine_schedule_is_the_published_formula() -> None:
    schedule = cosine(gamma_min=0.2, epochs=8)
    for epoch in (0.0, 1.5, 4.0, 8.0):
        want = 0.5 * (1 + math.cos(math.pi * epoch / 8)) * (1 - 0.2) + 0.2
        assert schedule(epoch) == pytest.approx(want)
    assert schedule(100.0) == pytest.approx(0.2)
    assert constant(0.7)(3.0) == 0.7


@pytest.mark.parametrize(
    ("gamma_min", "epochs", "message"),
    [(0.0, 3, "gamma_min must be in"), (1.1, 3, "got 1.1"), (0.5, 0, "epochs must be positive")],
)
def test_bad_schedules_are_refused(gamma_min: float, epochs: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        cosine(gamma_min, epochs)
