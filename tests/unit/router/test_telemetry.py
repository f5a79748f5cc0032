from __future__ import annotations

import dataclasses
import random
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from octet.config import TelemetryConfig
from octet.counters import FrameCounters, StepCounters
from octet.ids import WorkerId
from octet.messages import WorkerLoad
from router.telemetry import Telemetry
from router.telemetry_samples import ShardSample, WorkerSample

LAYERS, NUM_EXPERTS, TOP_K = (3, 4, 7), 6, 2
STEP_S, WINDOW_S, HALF_LIFE_S, SILENT_S = 1.0, 10.0, 5.0, 4.0
CONFIG = TelemetryConfig(step_s=STEP_S, window_s=WINDOW_S, half_life_s=HALF_LIFE_S, silent_s=SILENT_S)


class Shard:
    """A shard whose work the test does."""

    def __init__(self, name: str, incarnation: int = 1) -> None:
        self.sample = ShardSample(
            worker_id=WorkerId(name),
            incarnation=incarnation,
            uptime_s=0.0,
            tokens_LE=np.zeros((len(LAYERS), NUM_EXPERTS), dtype=np.int64),
            activated=0,
            frames=FrameCounters(),
            lanes={},
            waiting=0,
        )

    def work(
        self,
        elapsed_s: float = 1.0,
        tokens_LE: npt.ArrayLike = 0,
        activated: int = 0,
        lane: str = "decode-0",
        **frames: Any,
    ) -> ShardSample:
        """Go on counting, and read."""
        before = self.sample
        on_lane = before.lanes.get(lane, FrameCounters())
        self.sample = dataclasses.replace(
            before,
            uptime_s=before.uptime_s + elapsed_s,
            tokens_LE=before.tokens_LE + np.asarray(tokens_LE),
            activated=before.activated + activated,
            frames=_plus(before.frames, frames),
            lanes={**before.lanes, lane: _plus(on_lane, frames)},
        )
        return self.sample


class Worker:
    """An attention worker whose work the test does."""

    def __init__(self, name: str = "decode-0") -> None:
        self.sample = WorkerSample(
            worker_id=WorkerId(name), incarnation=1, uptime_s=0.0, role="decode", steps=StepCounters(), load=load()
        )

    def work(self, elapsed_s: float = 1.0, holding: WorkerLoad | None = None, **steps: Any) -> WorkerSample:
        self.sample = dataclasses.replace(
            self.sample,
            uptime_s=self.sample.uptime_s + elapsed_s,
            steps=_plus(self.sample.steps, steps),
            load=holding or self.sample.load,
        )
        return self.sample


def _plus(counters: Any, more: dict[str, Any]) -> Any:
    return dataclasses.replace(counters, **{name: getattr(counters, name) + value for name, value in more.items()})


def load(**fields: int) -> WorkerLoad:
    return WorkerLoad(**{"kv_pages_total": 0, "kv_pages_free": 0, "running": 0, "waiting": 0, "tokens": 0} | fields)


def random_tokens() -> npt.NDArray[np.int64]:
    return np.random.default_rng().integers(0, 1000, (len(LAYERS), NUM_EXPERTS))


@pytest.fixture
def telemetry() -> Telemetry:
    return Telemetry(LAYERS, NUM_EXPERTS, TOP_K, CONFIG, now_s=0.0)


def test_a_window_is_the_sum_of_its_steps_over_all_shards(telemetry: Telemetry) -> None:
    shards, counted = [Shard("experts-0"), Shard("experts-1")], []
    for second in range(1, 8):
        tokens = [random_tokens() for _ in shards]
        telemetry.record(second, [shard.work(tokens_LE=of) for shard, of in zip(shards, tokens, strict=True)])
        counted += tokens
    window = telemetry.window(7.0)
    assert window.loads_LE.dtype == np.float64
    np.testing.assert_array_equal(window.loads_LE, sum(counted))
    assert window.duration_s == 7.0


def test_what_is_older_than_the_window_is_only_in_the_total(telemetry: Telemetry) -> None:
    shard, counted = Shard("experts-0"), []
    for second in range(1, 31):
        counted.append(random_tokens())
        telemetry.record(second, [shard.work(tokens_LE=counted[-1])])
    window = telemetry.window(30.0)
    assert window.duration_s == WINDOW_S
    np.testing.assert_array_equal(window.loads_LE, sum(counted[-10:]))
    np.testing.assert_array_equal(window.total_LE, sum(counted))


def test_a_shorter_window_is_its_last_whole_steps(telemetry: Telemetry) -> None:
    shard, counted = Shard("experts-0"), []
    for second in range(1, 9):
        counted.append(random_tokens())
        telemetry.record(second, [shard.work(tokens_LE=counted[-1], busy_s=0.1 * second)])
    window = telemetry.window(8.0, last_s=3.5)
    assert window.duration_s == 3.0
    np.testing.assert_array_equal(window.loads_LE, sum(counted[-3:]))
    assert window.shards[0].busy_share == pytest.approx(0.7)
    assert telemetry.window(8.0, last_s=0.01).duration_s == 1.0
    assert telemetry.window(8.0, last_s=1000).duration_s == 8.0


def test_a_window_empties_when_nothing_more_happens(telemetry: Telemetry) -> None:
    shard = Shard("experts-0")
    telemetry.record(1.0, [shard.work(tokens_LE=random_tokens(), frames=1, busy_s=0.5)])
    for second in range(2, 15):
        telemetry.record(second, [shard.work()])
    window = telemetry.window(14.0)
    assert not window.loads_LE.any()
    assert (window.tokens, window.balancedness, window.shards[0].busy_share) == (0.0, 0.0, 0.0)


def test_readings_within_a_step_count_as_one_step(telemetry: Telemetry) -> None:
    shard, counted = Shard("experts-0"), []
    for tick in range(1, 200):
        counted.append(random_tokens())
        telemetry.record(tick / 10, [shard.work(0.1, counted[-1])])
    window = telemetry.window(19.9)
    num_ticks = round(window.duration_s * 10)
    assert WINDOW_S - 1.1 * STEP_S <= window.duration_s <= WINDOW_S
    np.testing.assert_array_equal(window.loads_LE, sum(counted[-num_ticks:]))


def test_what_a_member_did_within_a_step_is_added_however_often_it_was_read(telemetry: Telemetry) -> None:
    """Whether someone looks at the status ten times a second is not to be seen in it."""
    shard, worker, often = Shard("experts-0"), Worker(), random.randint(2, 9)
    for second in range(5):
        for tick in range(1, often + 1):
            part_s, tokens_LE = 1 / often, random_tokens()
            samples: list[ShardSample | WorkerSample] = [
                shard.work(part_s, tokens_LE, frames=4, rows=100, busy_s=part_s / 2),
                worker.work(part_s, steps=3, tokens=30, step_s=part_s / 4),
            ]
            telemetry.record(second + tick / often, samples)
    window = telemetry.window(5.0)
    (found,), (other,) = window.shards, window.workers
    np.testing.assert_array_equal(found.tokens_L, window.loads_LE.sum(1))
    assert (found.frames_per_s, found.rows_per_s, found.busy_share) == pytest.approx((4 * often, 100 * often, 0.5))
    assert (other.steps_per_s, other.tokens_per_s, other.busy_share) == pytest.approx((3 * often, 30 * often, 0.25))


def test_readings_that_come_a_little_early_or_late_are_steps_all_the_same(telemetry: Telemetry) -> None:
    shard, now_s = Shard("experts-0"), 0.0
    for _ in range(50):
        now_s += random.uniform(0.95, 1.05)
        telemetry.record(now_s, [shard.work(tokens_LE=1)])
    assert telemetry.window(now_s, last_s=2.2).loads_LE.max() == 2


def test_a_shard_that_joins_is_counted_from_its_start(telemetry: Telemetry) -> None:
    telemetry.record(1.0, [Shard("experts-0").work()])
    tokens = random_tokens()
    telemetry.record(2.0, [Shard("experts-1").work(elapsed_s=0.3, tokens_LE=tokens)])
    np.testing.assert_array_equal(telemetry.window(2.0).loads_LE, tokens)


def test_a_shard_that_was_started_again_counts_from_0(telemetry: Telemetry) -> None:
    first, again = random_tokens() + 1, random_tokens()
    telemetry.record(1.0, [Shard("experts-0").work(tokens_LE=first, frames=10, busy_s=0.5)])
    telemetry.record(2.0, [Shard("experts-0", incarnation=2).work(0.5, again, frames=20, busy_s=0.1)])
    window = telemetry.window(2.0)
    np.testing.assert_array_equal(window.loads_LE, first + again)
    assert window.shards[0].busy_share == pytest.approx(0.6 / 1.5)


def test_work_of_a_shard_from_long_before_it_was_known_is_only_in_the_total(telemetry: Telemetry) -> None:
    shard, before, after = Shard("experts-0"), random_tokens(), random_tokens()
    telemetry.record(1.0, [shard.work(elapsed_s=10 * WINDOW_S, tokens_LE=before, frames=5, busy_s=3.0)])
    assert not telemetry.window(1.0).loads_LE.any()
    telemetry.record(2.0, [shard.work(tokens_LE=after, frames=5, busy_s=0.25)])
    window = telemetry.window(2.0)
    np.testing.assert_array_equal(window.loads_LE, after)
    np.testing.assert_array_equal(window.total_LE, before + after)
    assert window.shards[0].busy_share == 0.25


def test_an_answer_that_was_overtaken_is_ignored(telemetry: Telemetry) -> None:
    shard, tokens = Shard("experts-0"), random_tokens()
    early, late = shard.work(tokens_LE=tokens), shard.work(tokens_LE=tokens)
    telemetry.record(1.0, [late])
    telemetry.record(2.0, [early])
    np.testing.assert_array_equal(telemetry.window(2.0).total_LE, 2 * tokens)


def test_the_next_answer_makes_up_for_one_that_was_missed(telemetry: Telemetry) -> None:
    shard, tokens = Shard("experts-0"), random_tokens()
    telemetry.record(1.0, [shard.work(tokens_LE=tokens, busy_s=0.5)])
    shard.work(tokens_LE=tokens, busy_s=0.5)
    telemetry.record(2.0, [])
    telemetry.record(3.0, [shard.work(tokens_LE=tokens, busy_s=0.5)])
    window = telemetry.window(3.0)
    np.testing.assert_array_equal(window.loads_LE, 3 * tokens)
    assert window.shards[0].busy_share == 0.5


def test_a_silent_shard_ages_out_and_comes_back(telemetry: Telemetry) -> None:
    silent, other, tokens = Shard("experts-0"), Shard("experts-1"), random_tokens()
    telemetry.record(1.0, [silent.work(tokens_LE=tokens), other.work()])
    telemetry.record(1.0 + SILENT_S, [other.work(SILENT_S)])
    assert len(telemetry.window(1.0 + SILENT_S).shards) == 2
    telemetry.record(2.0 + SILENT_S, [other.work()])
    window = telemetry.window(2.0 + SILENT_S)
    assert [shard.worker_id for shard in window.shards] == ["experts-1"]
    np.testing.assert_array_equal(window.loads_LE, tokens)
    telemetry.record(3.0 + SILENT_S, [silent.work(2 + SILENT_S, tokens), other.work()])
    window = telemetry.window(3.0 + SILENT_S)
    assert len(window.shards) == 2
    np.testing.assert_array_equal(window.loads_LE, 2 * tokens)


def test_a_shard_that_left_is_forgotten_but_not_what_it_served(telemetry: Telemetry) -> None:
    tokens = random_tokens()
    telemetry.record(1.0, [Shard("experts-0").work(tokens_LE=tokens), Shard("experts-1").work()])
    telemetry.keep({WorkerId("experts-1")})
    window = telemetry.window(1.0)
    assert [shard.worker_id for shard in window.shards] == ["experts-1"]
    np.testing.assert_array_equal(window.loads_LE, tokens)


def test_balancedness_is_mean_over_maximum_of_what_shards_report(telemetry: Telemetry) -> None:
    first, second = np.zeros((3, 6), dtype=int), np.zeros((3, 6), dtype=int)
    first[0], second[0] = [10, 20, 0, 0, 0, 0], [0, 0, 0, 10, 0, 0]
    first[2], second[2] = [5, 0, 0, 0, 0, 0], [5, 0, 0, 0, 0, 0]
    telemetry.record(1.0, [Shard("experts-0").work(tokens_LE=first), Shard("experts-1").work(tokens_LE=second)])
    window = telemetry.window(1.0)
    assert window.balancedness_L.tolist() == pytest.approx([20 / 30, 0.0, 1.0])
    assert window.balancedness == pytest.approx((20 / 30 + 1.0) / 2)


def test_an_idle_shard_counts_in_balancedness(telemetry: Telemetry) -> None:
    telemetry.record(1.0, [Shard("experts-0").work(tokens_LE=1), Shard("experts-1").work()])
    assert telemetry.window(1.0).balancedness == 0.5


def test_tokens_are_rows_of_a_layer_by_experts_per_token(telemetry: Telemetry) -> None:
    telemetry.record(1.0, [Shard("experts-0").work(tokens_LE=np.full((3, 6), 4)), Shard("experts-1").work(tokens_LE=1)])
    assert telemetry.window(1.0).tokens == 30 / TOP_K


def test_the_hottest_experts_come_first_by_their_layers_mean(telemetry: Telemetry) -> None:
    tokens_LE = np.array([[1, 1, 1, 1, 1, 7], [100, 100, 100, 100, 100, 100], [0, 0, 0, 0, 0, 0]])
    telemetry.record(1.0, [Shard("experts-0").work(tokens_LE=tokens_LE)])
    hottest = telemetry.window(1.0).hottest(3)
    assert [tuple(hot) for hot in hottest] == [(3, 5, 7, 3.5), (4, 0, 100, 1.0), (4, 1, 100, 1.0)]
    assert len(telemetry.window(1.0).hottest(1000)) == 12


def test_a_shards_shares_and_rates_are_by_its_own_clock(telemetry: Telemetry) -> None:
    shard = Shard("experts-0")
    telemetry.record(1.0, [shard.work(2.0)])
    telemetry.record(
        7.0, [shard.work(2.0, activated=30, frames=10, rows=40, busy_s=1.0, wait_s=0.5), Shard("experts-1").work()]
    )
    seen = telemetry.window(7.0).shards[0]
    assert (seen.busy_share, seen.queue_depth, seen.frames_per_s, seen.rows_per_s) == (0.25, 0.125, 2.5, 10.0)
    assert (seen.wait_s, seen.activated_experts) == (0.05, 3.0)
    assert seen.since_start == FrameCounters(frames=10, rows=40, busy_s=1.0, wait_s=0.5)


def test_lanes_are_told_apart(telemetry: Telemetry) -> None:
    shard = Shard("experts-0")
    shard.work(1.0, lane="prefill-0", frames=2, rows=100, busy_s=0.5, wait_s=0.2)
    telemetry.record(2.0, [shard.work(1.0, lane="decode-0", frames=10, rows=10, busy_s=0.25)])
    lanes = telemetry.window(2.0).shards[0].lanes
    assert [(name, lane.busy_share, lane.wait_s) for name, lane in lanes.items()] == [
        ("decode-0", 0.125, 0.0),
        ("prefill-0", 0.25, 0.1),
    ]


def test_a_lane_that_was_formed_anew_counts_from_0(telemetry: Telemetry) -> None:
    shard = Shard("experts-0")
    telemetry.record(1.0, [shard.work(frames=10, rows=10)])
    shard.sample = dataclasses.replace(shard.sample, lanes={})
    telemetry.record(2.0, [shard.work(frames=3, rows=3)])
    assert telemetry.window(2.0).shards[0].lanes["decode-0"].frames_per_s == 13 / 2


def test_a_lane_that_is_closed_is_no_longer_told(telemetry: Telemetry) -> None:
    shard = Shard("experts-0")
    telemetry.record(1.0, [shard.work(frames=10)])
    shard.sample = dataclasses.replace(shard.sample, lanes={})
    telemetry.record(2.0, [shard.work(lane="decode-1")])
    seen = telemetry.window(2.0).shards[0]
    assert list(seen.lanes) == ["decode-1"]
    assert seen.frames_per_s == 5


def test_an_attention_workers_waits_are_shares_of_its_steps(telemetry: Telemetry) -> None:
    worker = Worker()
    telemetry.record(1.0, [worker.work(steps=10, step_s=0.5, combine_s=0.1, tokens=80)])
    telemetry.record(2.0, [worker.work(steps=10, step_s=0.5, combine_s=0.3, tokens=80)])
    seen = telemetry.window(2.0).workers[0]
    assert (seen.busy_share, seen.step_s, seen.steps_per_s, seen.tokens_per_s) == (0.5, 0.05, 10.0, 80.0)
    assert seen.combine_share == pytest.approx(0.4)


def test_queues_and_pages_are_means_over_the_readings(telemetry: Telemetry) -> None:
    worker = Worker()
    telemetry.record(1.0, [worker.work(holding=load(kv_pages_total=10, kv_pages_free=10, waiting=0))])
    telemetry.record(2.0, [worker.work(holding=load(kv_pages_total=10, kv_pages_free=4, waiting=8, running=3))])
    seen = telemetry.window(2.0).workers[0]
    assert seen.kv_share == pytest.approx(0.3)
    assert (seen.waiting, seen.running) == (4.0, 1.5)
    assert seen.load.kv_pages_free == 4


def test_a_steady_rate_is_its_own_weighted_mean_from_the_first_step(telemetry: Telemetry) -> None:
    shard, tokens = Shard("experts-0"), random_tokens()
    for second in range(1, 40):
        telemetry.record(second, [shard.work(tokens_LE=tokens, busy_s=0.25)])
        window = telemetry.window(second)
        np.testing.assert_allclose(window.ewma_LE, tokens)
        assert window.shards[0].busy_ewma == pytest.approx(0.25)


def test_a_weighted_mean_is_half_way_to_a_new_rate_after_its_half_life(telemetry: Telemetry) -> None:
    shard, worker = Shard("experts-0"), Worker()
    for second in range(1, 1001):
        telemetry.record(second, [shard.work(), worker.work(step_s=0.5)])
    for second in range(1001, 1006):
        telemetry.record(second, [shard.work(tokens_LE=8, busy_s=1.0), worker.work(step_s=0.5, combine_s=0.5)])
    window = telemetry.window(1005.0)
    # The step's own age makes it a little more than half.
    np.testing.assert_allclose(window.ewma_LE, 4, rtol=0.1)
    assert window.shards[0].busy_ewma == pytest.approx(0.5, rel=0.1)
    assert window.workers[0].combine_ewma == pytest.approx(0.5, rel=0.1)


def test_a_window_before_any_reading_is_empty(telemetry: Telemetry) -> None:
    window = telemetry.window(0.0)
    assert (window.duration_s, window.tokens, window.balancedness, window.hottest(5)) == (0.0, 0.0, 0.0, [])
    assert window.shards == ()
    assert window.workers == ()


def test_windows_do_not_change_when_more_is_recorded(telemetry: Telemetry) -> None:
    shard = Shard("experts-0")
    telemetry.record(1.0, [shard.work(tokens_LE=1)])
    window = telemetry.window(1.0)
    telemetry.record(1.5, [shard.work(tokens_LE=1)])
    assert window.loads_LE.max() == window.total_LE.max() == 1
    assert window.shards[0].tokens_L.tolist() == [NUM_EXPERTS] * 3


def test_any_stream_of_samples_is_counted_exactly() -> None:
    """Members join, leave, restart and skip answers at random; nothing is lost or counted twice."""
    rng = random.Random()
    telemetry = Telemetry(LAYERS, NUM_EXPERTS, TOP_K, CONFIG, now_s=0.0)
    shards: dict[str, Shard] = {}
    expected_LE = np.zeros((len(LAYERS), NUM_EXPERTS), dtype=np.int64)
    for second in range(1, 200):
        answers = []
        for number in range(4):
            name = f"experts-{number}"
            if rng.random() < 0.05 or name not in shards:
                shards[name] = Shard(name, incarnation=second)
            tokens_LE = random_tokens()
            shards[name].work(tokens_LE=tokens_LE, frames=1)
            if rng.random() < 0.7:
                answers.append(shards[name])
        told = {id(shard): getattr(shard, "told_LE", 0) for shard in answers}
        for shard in answers:
            expected_LE += shard.sample.tokens_LE - told[id(shard)]
            shard.told_LE = shard.sample.tokens_LE  # type: ignore[attr-defined]
        telemetry.record(second, [shard.sample for shard in answers])
    np.testing.assert_array_equal(telemetry.window(199.0).total_LE, expected_LE)


def test_the_earlier_and_the_later_half_of_a_window_have_about_as_many_rows(telemetry: Telemetry) -> None:
    shard, rows = Shard("experts-0"), [100, 1, 1, 1, 50, 50, 1]
    for second, num_rows in enumerate(rows, start=1):
        telemetry.record(second, [shard.work(tokens_LE=np.full((len(LAYERS), NUM_EXPERTS), num_rows))])
    window_LE = telemetry.window(7.0).loads_LE
    earlier_LE, later_LE = telemetry.halves(7.0)
    assert np.array_equal(earlier_LE + later_LE, window_LE)
    assert earlier_LE[0, 0] >= window_LE[0, 0] / 2 > earlier_LE[0, 0] - max(rows)
    assert later_LE.min() > 0


@pytest.mark.parametrize("num_steps", [2, 6])
def test_of_equal_steps_as_many_are_earlier_as_later(telemetry: Telemetry, num_steps: int) -> None:
    shard = Shard("experts-0")
    for second in range(1, num_steps + 1):
        telemetry.record(second, [shard.work(tokens_LE=7)])
    for half_LE in telemetry.halves(float(num_steps)):
        assert (half_LE == 7 * num_steps / 2).all()


def test_a_window_of_one_step_has_no_later_half(telemetry: Telemetry) -> None:
    telemetry.record(1.0, [Shard("experts-0").work(tokens_LE=random_tokens())])
    earlier_LE, later_LE = telemetry.halves(1.0)
    assert np.array_equal(earlier_LE, telemetry.window(1.0).loads_LE)
    assert not later_LE.any()
