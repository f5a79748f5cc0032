"""A running cluster's telemetry as the autoscaler's signals: pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from cluster.autoscaling.signals import ExpertSignals, MemberSample, PoolSignals, Prospect, Signals
from cluster.frontend.request_meter import RequestLoad
from cluster.members import Pool
from octet.errors import UnavailableError
from octet.ids import WorkerId
from router.telemetry_window import ShardTelemetry, TelemetryWindow, WorkerTelemetry


def observe(
    window: TelemetryWindow,
    requests: RequestLoad,
    ages_s: Mapping[WorkerId, float],
    starting: Mapping[Pool, int],
    draining: Mapping[Pool, int],
    num_redundant_experts: int,
    slots_that_fit: int,
    prospects: Sequence[Prospect] = (),
) -> Signals:
    """
    Args:
        ages_s: of the members that serve, since they began to. Others that the window knows are about to leave.
        starting: members on their way in, by pool.
        draining: members on their way out.
        num_redundant_experts: slots per layer beyond one for each expert, over all shards.
        slots_that_fit: per layer and shard, by a shard's memory.

    Raises: UnavailableError if members of a pool serve and none of them was heard of: its load is not known then.
    """
    shards = [_shard(shard, ages_s[shard.worker_id]) for shard in window.shards if shard.worker_id in ages_s]
    return Signals(
        period_s=requests.period_s,
        queued_prompt_tokens=_not_begun(requests, window.workers),
        arriving_prompt_tokens_per_s=requests.arriving_prompt_tokens_per_s,
        requests_waiting=requests.waiting,
        prefill=_workers("prefill", window, ages_s, starting, draining, requests.first_ratio),
        decode=_workers("decode", window, ages_s, starting, draining, requests.answer_ratio),
        experts=ExpertSignals(
            members=_members("experts", shards, ages_s),
            num_starting=starting.get("experts", 0),
            num_draining=draining.get("experts", 0),
            decode_share=_decode_share(window.shards),
            balancedness=window.balancedness or 1.0,
            num_redundant_experts=num_redundant_experts,
            slots_that_fit=slots_that_fit,
            num_experts=window.loads_LE.shape[1],
            prospects=tuple(prospects),
        ),
    )


def _workers(
    pool: Pool,
    window: TelemetryWindow,
    ages_s: Mapping[WorkerId, float],
    starting: Mapping[Pool, int],
    draining: Mapping[Pool, int],
    slo_ratio: float | None,
) -> PoolSignals:
    workers = [worker for worker in window.workers if worker.role == pool and worker.worker_id in ages_s]
    step_s = sum(worker.busy_share for worker in workers)
    return PoolSignals(
        members=_members(pool, [_worker(worker, ages_s[worker.worker_id]) for worker in workers], ages_s),
        num_starting=starting.get(pool, 0),
        num_draining=draining.get(pool, 0),
        slo_ratio=slo_ratio,
        # Weighted by the time in steps: an idle worker's share says nothing.
        expert_wait_share=sum(w.combine_share * w.busy_share for w in workers) / step_s if step_s > 0 else 0.0,
    )


def _members(pool: Pool, heard: Sequence[MemberSample], ages_s: Mapping[WorkerId, float]) -> tuple[MemberSample, ...]:
    """All that serve: who was not heard of counts, too, as one of whom nothing is known yet."""
    samples = {sample.worker_id: sample for sample in heard}
    serving = sorted(worker_id for worker_id in ages_s if worker_id.startswith(f"{pool}-"))
    if serving and not samples:
        raise UnavailableError(f"none of the {pool} pool was heard of, though so many serve: {len(serving)}")
    return tuple(samples.get(worker_id, MemberSample(worker_id=worker_id, age_s=0.0)) for worker_id in serving)


def _not_begun(requests: RequestLoad, workers: Sequence[WorkerTelemetry]) -> float:
    """The frontend counts a prompt until its first token, and does not know when a worker begins it."""
    return max(0.0, requests.queued_prompt_tokens - sum(worker.load.begun_tokens for worker in workers))


def _worker(worker: WorkerTelemetry, age_s: float) -> MemberSample:
    return MemberSample(
        worker_id=worker.worker_id,
        age_s=age_s,
        busy_share=min(1.0, worker.busy_share),
        tokens_per_s=worker.tokens_per_s,
        kv_occupancy=worker.kv_share,
        ongoing=worker.running,
        waiting=worker.waiting,
    )


def _shard(shard: ShardTelemetry, age_s: float) -> MemberSample:
    return MemberSample(
        worker_id=shard.worker_id,
        age_s=age_s,
        busy_share=min(1.0, shard.busy_share),
        tokens_per_s=shard.rows_per_s,
    )


def _decode_share(shards: Sequence[ShardTelemetry]) -> float:
    """Lanes are named after the workers at their other ends."""
    lanes = [(name, lane.busy_share) for shard in shards for name, lane in shard.lanes.items()]
    busy = sum(share for _, share in lanes)
    return sum(share for name, share in lanes if name.startswith("decode-")) / busy if busy > 0 else 0.0
