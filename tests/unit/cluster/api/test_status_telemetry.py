"""From a telemetry window to the fields of GetStatus."""

from __future__ import annotations

import numpy as np
import pytest

from cluster.api.status_telemetry import add_telemetry
from octet.config import TelemetryConfig
from octet.counters import FrameCounters, StepCounters
from octet.ids import WorkerId
from octet.messages import WorkerLoad
from octet.v1 import octet_pb2 as pb
from router.telemetry import Telemetry
from router.telemetry_samples import ShardSample, WorkerSample

LOAD = WorkerLoad(kv_pages_total=10, kv_pages_free=4, running=2, waiting=3, tokens=40)


@pytest.fixture
def status() -> pb.GetStatusResponse:
    """Two layers of four experts, on a shard that was busy for a quarter of two seconds; another shard says nothing."""
    telemetry = Telemetry((1, 2), 4, 2, TelemetryConfig(), now_s=0.0)
    frames = FrameCounters(frames=10, rows=40, busy_s=0.5, wait_s=0.2)
    shard = ShardSample(
        worker_id=WorkerId("experts-0"),
        incarnation=1,
        uptime_s=2.0,
        tokens_LE=np.array([[10, 0, 0, 30], [10, 10, 10, 10]]),
        activated=25,
        frames=frames,
        lanes={"decode-0": frames},
        waiting=0,
    )
    worker = WorkerSample(
        worker_id=WorkerId("decode-0"),
        incarnation=1,
        uptime_s=2.0,
        role="decode",
        steps=StepCounters(steps=10, step_s=1.0, combine_s=0.4, tokens=40),
        load=LOAD,
    )
    telemetry.record(2.0, [shard, worker])
    status = pb.GetStatusResponse()
    status.pools.add(name="decode", members=[pb.Member(worker_id="decode-0")])
    status.pools.add(name="experts", members=[pb.Member(worker_id="experts-0"), pb.Member(worker_id="experts-1")])
    add_telemetry(status, telemetry.window(2.0))
    return status


def test_layers_have_their_rows_and_rates(status: pb.GetStatusResponse) -> None:
    first, second = status.expert_counts
    assert (first.layer, list(first.tokens), list(first.window_tokens)) == (1, [10, 0, 0, 30], [10, 0, 0, 30])
    assert list(second.tokens_per_s) == [5.0] * 4
    assert (status.window_s, status.window_tokens_per_s, status.balancedness) == (2.0, 10.0, 1.0)


def test_the_hottest_come_first_and_idle_ones_not_at_all(status: pb.GetStatusResponse) -> None:
    assert [(hot.layer, hot.expert, hot.tokens, hot.ratio) for hot in status.hottest][:2] == [
        (1, 3, 30, 3.0),
        (1, 0, 10, 1.0),
    ]
    assert len(status.hottest) == 6


def test_a_shard_has_its_load_and_a_silent_one_has_none(status: pb.GetStatusResponse) -> None:
    told, silent = status.pools[1].members
    assert (told.load.busy_share, told.load.frames_per_s, told.load.rows_per_s) == (0.25, 5.0, 20.0)
    assert (told.load.activated_experts, told.load.queue_depth, told.load.total_busy_s) == (2.5, 0.1, 0.5)
    assert told.load.wait_s == pytest.approx(0.02)
    assert [(lane.worker_id, lane.busy_share) for lane in told.load.lanes] == [("decode-0", 0.25)]
    assert not silent.HasField("load")


def test_an_attention_worker_has_its_steps_waits_and_pages(status: pb.GetStatusResponse) -> None:
    load = status.pools[0].members[0].load
    assert (load.busy_share, load.step_s, load.frames_per_s, load.rows_per_s) == (0.5, 0.1, 5.0, 20.0)
    assert load.wait_share == 0.4
    assert load.wait_s == pytest.approx(0.04)
    assert (load.kv_share, load.queue_depth) == (0.6, 3.0)


def test_every_field_of_a_members_load_is_told_by_some_pool(status: pb.GetStatusResponse) -> None:
    told = {field.name for pool in status.pools for member in pool.members for field, _ in member.load.ListFields()}
    assert told == {field.name for field in pb.MemberLoad.DESCRIPTOR.fields}
