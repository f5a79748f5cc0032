"""The telemetry window as the status page tells it."""

from __future__ import annotations

from octet.ids import WorkerId
from octet.v1 import octet_pb2 as pb
from router.telemetry_window import ShardTelemetry, TelemetryWindow, WorkerTelemetry

_HOTTEST = 16


def add_telemetry(status: pb.GetStatusResponse, window: TelemetryWindow) -> None:
    """Fill in the fields that the window has something about. Members that it does not know stay without a load."""
    status.window_s = window.duration_s
    status.telemetry_incarnation = window.incarnation
    status.window_tokens_per_s = window.tokens / window.duration_s if window.duration_s else 0.0
    status.balancedness = window.balancedness
    columns = (window.layers, window.total_LE, window.balancedness_L, window.loads_LE, window.ewma_LE)
    for layer, total_E, balancedness, loads_E, ewma_E in zip(*columns, strict=True):
        status.expert_counts.add(
            layer=layer,
            tokens=total_E.tolist(),
            balancedness=balancedness,
            window_tokens=loads_E.astype(int).tolist(),
            tokens_per_s=ewma_E.tolist(),
        )
    for hot in window.hottest(_HOTTEST):
        status.hottest.add(layer=hot.layer, expert=hot.expert, tokens=hot.tokens, ratio=hot.ratio)
    loads: dict[WorkerId, pb.MemberLoad] = {shard.worker_id: _shard(shard) for shard in window.shards}
    loads |= {worker.worker_id: _worker(worker) for worker in window.workers}
    for pool in status.pools:
        for member in pool.members:
            if member.worker_id in loads:
                member.load.CopyFrom(loads[WorkerId(member.worker_id)])


def _shard(shard: ShardTelemetry) -> pb.MemberLoad:
    return pb.MemberLoad(
        busy_share=shard.busy_share,
        busy_ewma=shard.busy_ewma,
        rows_per_s=shard.rows_per_s,
        activated_experts=shard.activated_experts,
        queue_depth=shard.queue_depth,
        frames_per_s=shard.frames_per_s,
        wait_s=shard.wait_s,
        lanes=[
            pb.LaneLoad(
                worker_id=worker_id,
                busy_share=lane.busy_share,
                wait_s=lane.wait_s,
                frames_per_s=lane.frames_per_s,
                rows_per_s=lane.rows_per_s,
            )
            for worker_id, lane in shard.lanes.items()
        ],
        total_busy_s=shard.since_start.busy_s,
    )


def _worker(worker: WorkerTelemetry) -> pb.MemberLoad:
    return pb.MemberLoad(
        busy_share=worker.busy_share,
        rows_per_s=worker.tokens_per_s,
        queue_depth=worker.waiting,
        frames_per_s=worker.steps_per_s,
        wait_s=worker.combine_share * worker.step_s,
        step_s=worker.step_s,
        wait_share=worker.combine_share,
        wait_ewma=worker.combine_ewma,
        kv_share=worker.kv_share,
        total_busy_s=worker.since_start.step_s,
    )
