"""Which gaps count, and what they come to."""

from __future__ import annotations

import pytest

from octet.errors import ConfigError
from ops.bench.interference.gaps import Phase, compare


def ticks(start_s: float, *gaps_s: float) -> list[float]:
    times = [start_s]
    for gap_s in gaps_s:
        times.append(times[-1] + gap_s)
    return times


def test_gaps_count_while_every_stream_runs() -> None:
    early, late = ticks(0.0, 1.0, 1.0, 1.0, 1.0), ticks(1.5, 0.5, 0.25, 4.0)
    assert sorted(Phase(streams=[early, late], long=[]).gaps_s) == [0.25, 0.5, 1.0, 1.0]


def test_in_a_disturbed_phase_gaps_count_beside_a_long_prompt() -> None:
    stream = ticks(0.0, 1.0, 1.5, 2.0, 1.0, 1.25)
    assert Phase(streams=[stream], long=[(1.5, 3.0)]).gaps_s == [1.5, 2.0]
    assert Phase(streams=[stream], long=[(0.5, 0.75), (5.0, 99.0)]).gaps_s == [1.0, 1.0, 1.25]


def test_a_ratio_is_taken_within_each_round() -> None:
    quiet = Phase(streams=[ticks(0.0, *[0.1] * 50)], long=[])
    slow_quiet = Phase(streams=[ticks(0.0, *[1.0] * 50)], long=[])
    disturbed = Phase(streams=[ticks(0.0, *[0.2] * 50)], long=[(0.0, 3.0), (1.0, 9.0)])
    slow_disturbed = Phase(streams=[ticks(0.0, *[4.0] * 50)], long=[(0.0, 500.0)])
    result = compare([(quiet, disturbed), (slow_quiet, slow_disturbed), (quiet, disturbed)])
    assert result.p99_ratios == pytest.approx((2.0, 4.0, 2.0))
    assert result.p99_ratio == pytest.approx(2.0)
    assert result.quiet.p50_s == pytest.approx(0.1)
    assert result.disturbed.longest_s == pytest.approx(4.0)
    assert result.long_ttft_s == pytest.approx(8.0)


def test_streams_that_end_too_early_are_no_measurement() -> None:
    quiet = Phase(streams=[ticks(0.0, 0.1, 0.1)], long=[])
    with pytest.raises(ConfigError, match="more of them"):
        compare([(quiet, Phase(streams=[ticks(0.0, 0.1)], long=[(5.0, 6.0)]))])
