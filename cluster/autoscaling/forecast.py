"""Where a load is heading: double exponential smoothing with a damped trend (Holt 1957; Gardner and McKenzie 1985).

Samples need not come evenly: weights follow from the time between them. A surprise is cut to what a trend could bring
(as in robust smoothing: Gelper, Fried and Croux, J. Forecasting 29, 2010), so that a burst is no trend; what a burst
needs is the affair of the load itself.
"""

from __future__ import annotations

import dataclasses
import math

_LEVEL_S = 60.0
"""Memory of the level: after so long, 63% of a step in the load is in it."""
_TREND_S = 300.0
"""Memory of the slope. A forecast carries what is mistaken in it as far ahead as it looks, so it is an average over a
longer time than that; else bursts become members that nobody needs."""
_SLOW_S = 600.0
"""Memory of what the level is compared with, to tell whether load rises."""
_SURPRISE, _LEAST_SURPRISE = 0.25, 0.5
"""A sample counts at most this part of the level, or this many members, above or below what was expected."""
_DAMPING_S = 600.0
"""A trend is believed for about this long: load does not grow for ever."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Trend:
    """A smoothed load, in members, and its change per second."""

    at_s: float
    level: float
    slow: float
    """The level over a longer time."""
    slope: float = 0.0


def observe(trend: Trend | None, now_s: float, load: float) -> Trend:
    """The trend with one more sample."""
    if trend is None or now_s <= trend.at_s:
        return Trend(at_s=now_s, level=load, slow=load)
    passed_s = now_s - trend.at_s
    new_level, new_slope = -math.expm1(-passed_s / _LEVEL_S), -math.expm1(-passed_s / _TREND_S)
    # After looks that were missed, the trend is as old as they are.
    expected = trend.level + trend.slope * min(passed_s, _LEVEL_S)
    most = max(_SURPRISE * trend.level, _LEAST_SURPRISE)
    level = expected + new_level * min(max(load - expected, -most), most)
    slope = trend.slope + new_slope * ((level - trend.level) / passed_s - trend.slope)
    slow = trend.slow - math.expm1(-passed_s / _SLOW_S) * (level - trend.slow)
    return Trend(at_s=now_s, level=level, slow=slow, slope=slope)


def rises(trend: Trend, tolerance: float) -> bool:
    """Whether the level is above that of the last ten minutes by more than this part of it."""
    return trend.level > (1 + tolerance) * trend.slow


def forecast(trend: Trend, ahead_s: float) -> float:
    """The load `ahead_s` from the last sample on, never below 0."""
    return max(0.0, trend.level + trend.slope * _DAMPING_S * -math.expm1(-ahead_s / _DAMPING_S))
