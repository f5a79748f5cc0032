"""The picture of a simulated run."""

from __future__ import annotations

import pathlib
import random

import numpy as np
import pytest
from matplotlib.image import imread

from ops.simulate.outcome import Moment, summarized
from ops.simulate.plot import draw_run, minute_means
from tests.unit.ops.simulate.toy import costs, options, request, run

COSTS = costs(prefill_fixed_s=0.1, decode_fixed_s=0.1)


@pytest.mark.parametrize("last_s", [0.0, 9.0, 45.0, 200.0])
def test_a_run_of_any_length_can_be_drawn(last_s: float, tmp_path: pathlib.Path) -> None:
    file = tmp_path / "run.png"
    done = run([request(0.0), request(last_s)], COSTS)
    draw_run(file, done, summarized(done, 1.0))
    assert imread(file).std() > 0.01


def test_a_run_in_which_nothing_happened_can_be_drawn(tmp_path: pathlib.Path) -> None:
    done = run([request(0.0, prompt=1000)], COSTS, opts=options(prefill_pages=2))
    result = summarized(done, 1.0)
    assert (result.refused, result.goodput_per_s, result.tokens_per_s, result.gpu_hours) == (1, 0, 0, 0)
    assert set(result.mean.values()) == {0}
    draw_run(tmp_path / "run.png", done, result)


def moment(at_s: float, arrivals_per_s: float) -> Moment:
    rest = dict.fromkeys(("queued_prompt_tokens", "shard_busy", "kv_occupancy", "balancedness", "tokens_per_s"), 0.0)
    return Moment(at_s=at_s, sizes={}, serving={}, arrivals_per_s=arrivals_per_s, live=0, **rest)


@pytest.mark.parametrize("count", [1, 2, 5, 6, 7, 40])
def test_an_even_rate_is_even_to_both_ends(count: int) -> None:
    """The last moment is wherever the run ended; before the first one no time passed."""
    rate = random.uniform(0.1, 9)
    times_s = [*(10.0 * number for number in range(count)), 10.0 * count - random.uniform(1, 9)]
    moments = [moment(at_s, rate if at_s else 0.0) for at_s in times_s]
    assert minute_means(moments)[1:] == pytest.approx(rate)
    assert len(minute_means(moments)) == count + 1


def test_a_mean_is_of_the_minute_around() -> None:
    rates = np.random.default_rng().uniform(0, 5, 50)
    moments = [moment(10.0 * number, rate) for number, rate in enumerate(rates)]
    assert minute_means(moments)[20] == pytest.approx(rates[18:24].mean())
