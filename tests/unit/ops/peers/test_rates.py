"""One definition of a rate, and ratios round by round."""

from __future__ import annotations

import pytest

from ops.bench.peers.rates import Trial, goal_of, rate_of, ratios
from ops.bench.spread import spread


def trial(first_s: float, all_s: float, streams: int = 8) -> Trial:
    return Trial(streams=streams, prompt_tokens=100, new_tokens=30, first_s=first_s, all_s=all_s)


def test_a_decode_rate_is_what_further_tokens_cost() -> None:
    one = trial(first_s=2.0, all_s=5.0)
    assert rate_of(one, "prefill") == pytest.approx(8 * 100 / 2)
    assert rate_of(one, "decode") == pytest.approx(8 * 30 / 3)
    assert rate_of(one, "whole") == pytest.approx(8 * 31 / 5)


def test_a_run_of_more_tokens_that_took_no_longer_has_no_finite_rate() -> None:
    assert rate_of(trial(first_s=2.0, all_s=2.0), "decode") == float("inf")


def test_ratios_are_taken_within_a_round() -> None:
    ours = [trial(1.0, 2.0), trial(10.0, 20.0), trial(1.0, 3.0)]
    theirs = [trial(1.0, 3.0), trial(10.0, 30.0), trial(1.0, 2.0)]
    ratio = ratios(ours, theirs, "decode")
    assert (ratio.median, ratio.lowest, ratio.highest) == pytest.approx((2.0, 0.5, 2.0))


def test_a_spread_is_a_median_and_its_range() -> None:
    one = spread([3.0, 1.0, 2.0])
    assert (one.median, one.lowest, one.highest) == (2.0, 1.0, 3.0)


@pytest.mark.parametrize(
    ("kind", "streams", "peer", "ratio"),
    [
        ("decode", 1, "vllm", 1.0),
        ("decode", 32, "transformers", 2.5),
        ("prefill", 1, "vllm", 1.2),
        ("prefill", 32, "vllm", 1.2),
        ("decode", 8, "local", 0.85),
    ],
)
def test_goals_are_found(kind: str, streams: int, peer: str, ratio: float) -> None:
    goal = goal_of(kind, streams, peer)
    assert goal is not None
    assert goal.ratio == ratio


@pytest.mark.parametrize(
    ("kind", "streams", "peer"),
    [("decode", 1, "transformers"), ("decode", 8, "vllm-eager"), ("whole", 8, "vllm"), ("prefill", 8, "local")],
)
def test_where_no_goal_was_set_there_is_none(kind: str, streams: int, peer: str) -> None:
    assert goal_of(kind, streams, peer) is None
