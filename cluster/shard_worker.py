"""An expert shard as a process: slots, the loop that serves lanes, and its ends of them."""

from __future__ import annotations

import os
import pathlib
import time
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from cluster.lanes import open_port, serving_dtype
from cluster.members import Endpoint, MemberStatus, Role
from cluster.plan import ServingPlan
from cluster.process import resident_bytes
from experts.loop import DECODE_FIRST, PREFILL_AFTER, ShardLoop
from experts.shard import ExpertShard
from experts.slots import ExpertSlots
from model.checkpoint import Checkpoint, LoadProgress, LoadSnapshot
from octet.ids import WorkerId
from router.placement import EMPTY
from router.telemetry_samples import ShardSample


class ShardWorker:
    """Called in this order: `load`, `connect`; `status`, `telemetry` and `progress` at any time; `stop`."""

    def __init__(self, worker_id: WorkerId, shard: int, plan: ServingPlan, host: str, node_id: str) -> None:
        torch.set_num_threads(plan.threads["experts"])
        self._worker_id, self._number, self._plan, self._host, self._node_id = worker_id, shard, plan, host, node_id
        self._device = torch.device(plan.device)
        self._progress = LoadProgress(time.monotonic())
        self._state = "STARTING"
        self._shard: ExpertShard | None = None
        self._loop: ShardLoop | None = None
        self._incarnation, self._serving_since_s = time.time_ns(), 0.0

    def progress(self) -> LoadSnapshot:
        return self._progress.snapshot(time.monotonic())

    def load(self) -> None:
        """Read this shard's experts. Raises: CheckpointError."""
        self._state = "LOADING"
        checkpoint = Checkpoint.open(pathlib.Path(self._plan.model_dir))
        placement = self._plan.placement
        held = {
            layer: row.tolist() for layer, row in zip(placement.layers, placement.held_by(self._number), strict=True)
        }
        slots = ExpertSlots(checkpoint, held, serving_dtype(self._plan), self._device, self._progress)
        self._shard = ExpertShard(slots)

    def connect(self, workers: Sequence[tuple[Role, Endpoint]]) -> None:
        """Join the lane of every attention worker, in the given order, and serve them.

        Raises: LaneTimeoutError.
        """
        assert self._shard is not None, "load comes before connect"
        self._loop = ShardLoop(self._shard)
        for role, peer in workers:
            port = open_port(peer, role, self._number, self._plan, self._host)
            self._loop.add(peer.worker_id, port, DECODE_FIRST if role == "decode" else PREFILL_AFTER)
        self._serving_since_s = time.perf_counter()
        self._state = "READY"

    def telemetry(self) -> ShardSample | None:
        """What was counted so far; None before it serves."""
        if self._shard is None or self._loop is None or self._state != "READY":
            return None
        frames, lanes = self._loop.counters()
        return ShardSample(
            worker_id=self._worker_id,
            incarnation=self._incarnation,
            uptime_s=time.perf_counter() - self._serving_since_s,
            tokens_LE=self._tokens(self._shard),
            activated=self._shard.num_activated,
            frames=frames,
            lanes=lanes,
            waiting=self._loop.num_waiting,
        )

    def _tokens(self, shard: ExpertShard) -> npt.NDArray[np.int64]:
        """Token rows `[L, E]` by logical expert."""
        placement, counts = self._plan.placement, shard.counts()
        tokens_LE = np.zeros((len(placement.layers), placement.num_experts), dtype=np.int64)
        for tokens_E, layer, held_S in zip(tokens_LE, placement.layers, placement.held_by(self._number), strict=True):
            np.add.at(tokens_E, held_S[held_S != EMPTY], counts[layer][held_S != EMPTY])
        return tokens_LE

    def status(self) -> MemberStatus:
        return MemberStatus(
            worker_id=self._worker_id,
            node_id=self._node_id,
            pid=os.getpid(),
            resident_bytes=resident_bytes(),
            state=self._state,
            num_rows=self._shard.num_rows if self._shard is not None else 0,
            num_slots=self._plan.placement.slots_per_shard,
            lanes=tuple(self._loop.lanes) if self._loop is not None else (),
        )

    def stop(self) -> None:
        """Leave every lane. Idempotent."""
        if self._loop is not None:
            self._loop.close()
            self._loop = None
