from __future__ import annotations

import random
import statistics

import pytest

from cluster.autoscaling.forecast import Trend, forecast, observe, rises


def after(loads: list[float], every_s: float = 10.0) -> Trend:
    trend = None
    for number, load in enumerate(loads):
        trend = observe(trend, number * every_s, load)
    assert trend is not None
    return trend


def test_a_constant_load_is_forecast_as_it_is() -> None:
    level = random.uniform(1, 50)
    assert forecast(after([level] * 50), 300.0) == pytest.approx(level)


def test_a_steady_growth_is_followed_ahead() -> None:
    trend = after([5 + 0.01 * 10 * number for number in range(200)])
    assert forecast(trend, 0.0) == pytest.approx(24.9, rel=0.1)
    assert 1.2 < forecast(trend, 180.0) - forecast(trend, 0.0) <= 1.8


def test_a_trend_is_not_believed_for_ever() -> None:
    trend = after([5 + 0.1 * number for number in range(200)])
    assert forecast(trend, 1e6) < forecast(trend, 0.0) + 10


def test_a_forecast_is_never_negative() -> None:
    assert forecast(after([20 - 0.2 * number for number in range(100)]), 1e4) == 0.0


def test_a_burst_is_no_trend() -> None:
    assert forecast(after([1.0] * 100 + [50.0, 50.0]), 180.0) < 2.0


def test_a_forecast_strays_less_than_the_load_that_it_is_made_of() -> None:
    rng = random.Random()
    trend, loads, forecasts = None, [], []
    for look in range(8000):
        if look % 3 == 0:
            # A look sees 30 s, and there is one every 10.
            load = rng.uniform(14, 26)
        trend = observe(trend, look * 10.0, load)
        loads.append(load)
        forecasts.append(forecast(trend, 240.0))
    assert statistics.pstdev(forecasts[200:]) < 0.9 * statistics.pstdev(loads)


def test_samples_need_not_come_evenly() -> None:
    rng = random.Random(random.random())
    trend, now_s = None, 0.0
    for _ in range(400):
        trend = observe(trend, now_s, 3 + 0.005 * now_s)
        now_s += rng.uniform(2, 18)
    assert trend is not None
    assert forecast(trend, 0.0) == pytest.approx(3 + 0.005 * trend.at_s, rel=0.1)


def test_looks_that_were_missed_carry_a_trend_no_further_than_its_memory() -> None:
    trend = after([5 + 0.1 * number for number in range(200)])
    late = observe(trend, trend.at_s + 6 * 3600, 25.0)
    assert late.level == pytest.approx(25.0, abs=1.0)


def test_a_load_that_grows_rises_and_one_that_is_noisy_or_falls_does_not() -> None:
    rng = random.Random()

    def ends(load: list[float]) -> bool:
        return rises(after([rng.uniform(0.9, 1.1) * one for one in load]), 0.1)

    assert ends([10 + look / 5 for look in range(200)])
    assert not ends([10.0] * 200)
    assert not ends([50 - look / 5 for look in range(200)])
