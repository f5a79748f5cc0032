"""From records of several processes to where a step's time went."""

from __future__ import annotations

import random

import pytest

from ops.bench.breakdown.analysis import serve, steady, summarize
from ops.bench.breakdown.records import Round, ShardCall, Step
from ops.bench.breakdown.stopwatch import Lap


def step(start_s: float, stop_s: float, *, sequences: int = 2, rounds: tuple[Round, ...] = (), **parts: float) -> Step:
    lap = Lap(start_s=start_s, stop_s=stop_s, parts=parts or {"rest": stop_s - start_s}, running={})
    return Step(
        lap=lap,
        num_sequences=sequences,
        num_tokens=sequences,
        num_attended=10 * sequences,
        rounds=rounds,
        processor_s=stop_s - start_s,
    )


def one_round(layer: int, sent_s: float, wait_s: float, received_s: float) -> Round:
    return Round(layer=layer, num_bytes=100, sent_s=sent_s, wait_s=wait_s, received_s=received_s)


def call(layer: int, start_s: float, stop_s: float) -> ShardCall:
    return ShardCall(
        layer=layer,
        num_rows=2,
        num_pairs=4,
        num_experts=3,
        start_s=start_s,
        stop_s=stop_s,
        processor_s=stop_s - start_s,
    )


def test_a_steady_step_follows_one_of_as_many_sequences_at_once() -> None:
    steps = [
        step(0, 1, sequences=1),
        step(1, 2, sequences=2),
        step(2, 3, sequences=2),
        step(5, 6, sequences=2),
        step(6, 7, sequences=2),
    ]
    assert steady(steps, 2) == [steps[2], steps[4]]


def test_a_step_of_drafts_is_no_steady_step() -> None:
    lap = Lap(start_s=1, stop_s=2, parts={}, running={})
    drafted = Step(lap=lap, num_sequences=2, num_tokens=4, num_attended=20, rounds=(), processor_s=1.0)
    assert steady([step(0, 1), drafted], 2) == []


def test_rounds_find_their_calls_on_every_shard() -> None:
    rounds = (one_round(1, 0.0, 1.0, 4.0), one_round(2, 5.0, 6.0, 9.0))
    shards = [
        [call(1, 0.5, 3.0), call(2, 5.5, 8.0)],
        [call(1, -3.0, -2.0), call(1, 0.7, 3.5)],
    ]
    (served,) = serve([step(0, 10, rounds=rounds)], shards)
    assert [len(one.calls) for one in served.rounds] == [2, 1]
    assert served.rounds[0].experts_s == pytest.approx(2.8)
    assert served.rounds[0].way_s == pytest.approx(1.2)
    assert served.attention_s == pytest.approx(10 - 4 - 4)


def test_a_step_whose_calls_were_not_seen_is_left_out() -> None:
    assert serve([step(0, 10, rounds=(one_round(1, 0.0, 1.0, 4.0),))], [[call(1, 4.5, 5.0)]]) == []


def test_the_wait_is_divided_by_whether_a_shard_computes() -> None:
    rounds = (one_round(1, 0.0, 2.0, 6.0),)
    (served,) = serve([step(0, 10, rounds=rounds, exchange_wait=4.0, rest=6.0)], [[call(1, 1.0, 5.0)]])
    assert served.parts == pytest.approx({"rest": 6.0, "experts_wait": 3.0, "way_wait": 1.0})


def test_replies_that_were_there_before_they_were_asked_for_are_no_wait() -> None:
    rounds = (one_round(1, 0.0, 5.0, 5.1),)
    (served,) = serve([step(0, 10, rounds=rounds, exchange_wait=0.1, rest=9.9)], [[call(1, 1.0, 3.0)]])
    assert served.parts["experts_wait"] == 0.0


def test_parts_add_up_to_the_step() -> None:
    steps = []
    for index in range(20):
        parts = {name: random.random() for name in ("attention_linear", "plan", "exchange_wait", "rest")}
        lap = Lap(start_s=100.0 * index, stop_s=100.0 * index + sum(parts.values()), parts=parts, running={})
        steps.append(Step(lap=lap, num_sequences=2, num_tokens=2, num_attended=20, rounds=(), processor_s=1.0))
    breakdown = summarize(serve(steps, []))
    assert sum(breakdown.parts.values()) == pytest.approx(breakdown.step_s)
    assert breakdown.num_steps == 10
    named = sum(breakdown.parts[part] for part in ("attention_linear", "experts_wait", "way_wait"))
    assert breakdown.other_share == pytest.approx(1 - named / breakdown.step_s)


def test_outliers_do_not_count() -> None:
    steps = [step(10 * i, 10 * i + seconds) for i, seconds in enumerate((1.0, 1.0, 1.0, 9.0))]
    assert summarize(serve(steps, [])).step_s == pytest.approx(1.0)


def test_no_step_is_an_error() -> None:
    with pytest.raises(ValueError, match="no step"):
        summarize([])
