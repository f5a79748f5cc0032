"""Streams rest where the frontend does not keep up, and only there."""

from __future__ import annotations

import random

import pytest

from cluster.api.pace import FEW_STREAMS, LONGEST_S, Pace


def play(pace: Pace, streams: int, cost_s: float, tokens_per_s: float, seconds: float, others_s: float = 0.0) -> float:
    """A loop that writes at this cost, for streams that have so many tokens to tell. Returns: its last load.

    Args:
        others_s: for which writes wait for what other processes do.
    """
    load = 0.0
    at_s = computed_s = 0.0
    while at_s < seconds:
        # A stream tells at most one chunk per token, and one per rest.
        writes_per_s = streams * min(tokens_per_s, 1 / pace.rest_s if pace.rest_s else tokens_per_s)
        load = writes_per_s * cost_s
        # Near its limit, whoever wants to write waits for nearly all the others.
        took_s = cost_s * (1 if load < 0.8 else streams)
        pace.note((took_s + others_s) * random.uniform(0.9, 1.1), streams, at_s, computed_s)
        at_s, computed_s = at_s + 1 / writes_per_s, computed_s + min(cost_s, 1 / writes_per_s)
    return load


def test_a_loop_that_keeps_up_tells_every_token() -> None:
    pace = Pace()
    play(pace, streams=100, cost_s=0.0002, tokens_per_s=10, seconds=5)
    assert pace.rest_s == 0


def test_streams_rest_until_the_loop_has_time_again_and_no_more_when_they_are_few() -> None:
    pace = Pace()
    assert play(pace, streams=150, cost_s=0.0005, tokens_per_s=20, seconds=10) < 0.5
    assert 0 < pace.rest_s < LONGEST_S
    pace.note(0.1, FEW_STREAMS, 10.0, 5.0)
    assert pace.rest_s == 0


def test_a_loop_with_time_to_spare_gives_rests_if_it_does_not_get_a_core() -> None:
    pace = Pace()
    assert play(pace, streams=100, cost_s=0.0002, tokens_per_s=10, seconds=5, others_s=0.02) < 0.25
    assert pace.rest_s > 0


def test_rests_end_when_the_load_does() -> None:
    pace = Pace()
    play(pace, streams=150, cost_s=0.0005, tokens_per_s=20, seconds=10)
    play(pace, streams=40, cost_s=0.0005, tokens_per_s=5, seconds=60)
    assert pace.rest_s == 0


@pytest.mark.parametrize("streams", [1, FEW_STREAMS, 200])
def test_clients_that_read_slowly_give_nobody_a_rest(streams: int) -> None:
    pace = Pace()
    for number in range(3000):
        pace.note(0.0005 if number % 8 == 0 else 5.0, streams, number / 1000, number / 10_000)
        assert pace.rest_s == 0


def test_no_rest_is_longer_than_the_longest() -> None:
    pace = Pace()
    for number in range(10_000):
        pace.note(1.0, 1000, number / 1000, number / 10_000)
    assert pace.rest_s == pytest.approx(LONGEST_S)


def test_a_fast_chunk_of_a_while_ago_says_nothing_of_now() -> None:
    pace = Pace()
    now_s = 100.0
    pace.note(0.0001, FEW_STREAMS + 1, now_s, 0.0)
    for _ in range(4):
        now_s += 0.1
        # Others have the cores: this thread computes a tenth of the time.
        pace.note(0.05 * random.uniform(0.9, 1.1), FEW_STREAMS + 1, now_s, (now_s - 100.0) / 10)
    assert pace.rest_s > 0
