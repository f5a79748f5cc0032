"""An expert shard as a process: slots, the loop that serves lanes, and its ends of them."""

from __future__ import annotations

import collections
import logging
import os
import pathlib
import threading
import time
from collections.abc import Mapping, Sequence

import numpy as np
import torch

from cluster.members import Endpoint, MemberStatus, Role
from cluster.plan import ServingPlan
from cluster.workers.lanes import open_port, serving_dtype
from cluster.workers.process import resident_bytes
from cluster.workers.stores import Stores
from cluster.workers.weight_transfer import Expert, borrow, lend, parts_of
from experts.loop import DECODE_FIRST, PREFILL_AFTER, ShardLoop
from experts.shard import ExpertShard
from experts.slots import EMPTY, ExpertSlots, Fill
from model.checkpoint import Checkpoint
from model.host_memory import keep_freed_memory
from model.linear import packs
from model.load_progress import LoadProgress, LoadSnapshot
from model.threads import set_num_threads
from octet.errors import LaneError, UnavailableError
from octet.faults import reach
from octet.ids import Epoch, WorkerId
from octet.pulse import Pulse
from router.channel import WireChannel
from router.group_store import GroupStore
from router.handshake import GUEST_SIDE, HOST_SIDE
from router.telemetry_samples import ShardSample
from router.transition import SlotFill
from router.wire import Wire

_log = logging.getLogger(__name__)

_LENDER, _BORROWER = HOST_SIDE, GUEST_SIDE
_TRANSFER_CONNECT_S = 10.0
"""A lender that does not come within this time is done without: there is the checkpoint."""
_READ_BYTES = 2**28
"""Of the checkpoint at most, or one expert, between two looks at whether anybody still waits for it."""
_ATTEMPTS_KEPT = 16
"""They come one after the other: a call of one that was given up before the last few is not on its way any more."""


class ShardWorker:
    """Called in this order: `load`, then `link` for every attention worker; `stop` at the end.

    While it serves, `prepare` fills free slots and `retire` empties those that no placement in use names; `status`,
    `telemetry` and `progress` are answered at any time.
    """

    def __init__(self, worker_id: WorkerId, plan: ServingPlan, host: str, node_id: str) -> None:
        keep_freed_memory()
        set_num_threads(plan.threads["experts"], own=packs(serving_dtype(plan), torch.device(plan.device)))
        self._worker_id, self._plan, self._host, self._node_id = worker_id, plan, host, node_id
        self._device = torch.device(plan.device)
        self._progress = LoadProgress(time.monotonic())
        self._state = "STARTING"
        self._pulse = Pulse(host)
        self._store = GroupStore.host(host, plan.config.lane.connect_s, plan.secret)
        self._peer_stores = Stores(plan.config.lane.connect_s, plan.secret)
        self._changing = threading.Lock()
        self._given_up: collections.deque[str] = collections.deque(maxlen=_ATTEMPTS_KEPT)
        """Attempts that nobody prepares for any more."""
        self._borrowing: WireChannel | None = None
        self._slots: ExpertSlots | None = None
        self._shard: ExpertShard | None = None
        self._loop: ShardLoop | None = None
        self._incarnation, self._serving_since_s = time.time_ns(), 0.0

    def endpoint(self) -> Endpoint:
        return Endpoint(
            worker_id=self._worker_id,
            mailbox="",
            store=self._store.address,
            node_id=self._node_id,
            pid=os.getpid(),
            pulse=self._pulse.address,
        )

    def progress(self) -> LoadSnapshot:
        return self._progress.snapshot(time.monotonic())

    def load(self, held: Mapping[int, Sequence[int]]) -> None:
        """Read the experts of these slots, by layer; slots that are EMPTY can be filled later.

        Raises: CheckpointError.
        """
        self._state = "LOADING"
        checkpoint = Checkpoint.open(pathlib.Path(self._plan.model_dir))
        self._slots = ExpertSlots(checkpoint, held, serving_dtype(self._plan), self._device, self._progress)
        self._shard = ExpertShard(self._slots)
        self._loop = ShardLoop(self._shard)
        self._serving_since_s = time.perf_counter()
        self._state = "READY"

    def link(self, peer: Endpoint, role: Role, linked: Sequence[WorkerId], epoch: Epoch) -> None:
        """Join the lane of an attention worker, which links these shards at the same time, and serve it.

        Raises: LaneTimeoutError.
        """
        assert self._loop is not None, "load comes before link"
        reach("link")
        store = self._peer_stores.of(peer)
        port = open_port(peer, role, self._worker_id, linked, epoch, self._plan, store, self._host)
        self._loop.add(peer.worker_id, port, DECODE_FIRST if role == "decode" else PREFILL_AFTER)

    def prepare(self, fills: Sequence[SlotFill], lenders: Mapping[WorkerId, Endpoint], attempt: str) -> int:
        """Fill slots that nobody asks for yet. What a lender fails to send is read from the checkpoint.

        Args:
            lenders: other shards, whose `lend` is called at the same time with the experts of `fills` that name them,
                in that order.
            attempt: names this transfer among all.

        Returns: bytes that came from lenders.
        Raises: CheckpointError; UnavailableError if the attempt was given up, by `retire`.
        """
        assert self._slots is not None, "load comes before prepare"
        reach("prepare")
        by_source: dict[WorkerId | None, list[Fill]] = collections.defaultdict(list)
        for fill in fills:
            by_source[fill.source].append(Fill(layer=fill.layer, slot=fill.slot, expert=fill.expert))
        unread, num_bytes = by_source.pop(None, []), 0
        with self._changing:
            for source, wanted in by_source.items():
                assert source is not None
                self._go_on_with(attempt)
                missing = self._borrow(lenders[source], wanted, attempt)
                num_bytes += (len(wanted) - len(missing)) * self._slots.expert_bytes
                unread += missing
            for part in parts_of(unread, max(1, _READ_BYTES // self._slots.expert_bytes)):
                self._go_on_with(attempt)
                self._slots.fill(part)
        return num_bytes

    def _go_on_with(self, attempt: str) -> None:
        """Raises: UnavailableError."""
        if attempt in self._given_up:
            raise UnavailableError(f"the change that attempt {attempt} prepares for was given up")

    def lend(self, to: WorkerId, experts: Sequence[Expert], attempt: str) -> None:
        """Send experts to another shard while it prepares. Raises: LaneError."""
        assert self._slots is not None, "load comes before lend"
        config = self._plan.config
        rate = config.balancing.move_mib_per_s
        channel = self._channel(self._store, _LENDER, self._worker_id, to, attempt)
        try:
            lend(self._slots, experts, channel, None if rate is None else rate * 2**20)
        finally:
            channel.close()

    def retire(self, held: Mapping[int, Sequence[int]], given_up: str = "") -> None:
        """Empty every slot that is EMPTY here. No attention worker may route to one of them.

        Args:
            given_up: an attempt whose `prepare` is to end behind what it reads now, rather than be waited for.
        """
        assert self._slots is not None, "load comes before retire"
        reach("retire")
        assert self._shard is not None
        if given_up:
            self._given_up.append(given_up)
            if (channel := self._borrowing) is not None:
                # Its lender may be who is lost, and cut off.
                channel.close()
        with self._changing:
            for layer, experts in held.items():
                for slot, (kept, now) in enumerate(zip(experts, self._slots.held(layer), strict=True)):
                    if kept == EMPTY and now != EMPTY:
                        self._shard.release(layer, slot)

    def forget(self, peers: Sequence[WorkerId]) -> None:
        """These members are gone: close what leads to them. Idempotent."""
        self._peer_stores.forget(peers)

    def telemetry(self) -> ShardSample | None:
        """What was counted so far; None before it serves."""
        if self._shard is None or self._loop is None:
            return None
        frames, lanes = self._loop.counters()
        counts = self._shard.counts()
        return ShardSample(
            worker_id=self._worker_id,
            incarnation=self._incarnation,
            uptime_s=time.perf_counter() - self._serving_since_s,
            tokens_LE=np.stack([counts[layer] for layer in self._plan.routing.placement.layers]),
            activated=self._shard.num_activated,
            frames=frames,
            lanes=lanes,
            waiting=self._loop.num_waiting,
        )

    def status(self) -> MemberStatus:
        return MemberStatus(
            worker_id=self._worker_id,
            node_id=self._node_id,
            pid=os.getpid(),
            resident_bytes=resident_bytes(),
            state=self._state,
            num_rows=self._shard.num_rows if self._shard is not None else 0,
            num_slots=self._slots.num_slots if self._slots is not None else 0,
            num_held=self._slots.num_held if self._slots is not None else 0,
            lanes=tuple(self._loop.lanes) if self._loop is not None else (),
            refused=self._store.num_refused,
        )

    def stop(self) -> None:
        """Leave every lane. Idempotent."""
        self._pulse.close()
        if self._loop is not None:
            self._loop.close()
            self._loop = None

    def _borrow(self, lender: Endpoint, fills: Sequence[Fill], attempt: str) -> list[Fill]:
        assert self._slots is not None
        try:
            store = self._peer_stores.of(lender, _TRANSFER_CONNECT_S)
            channel = self._channel(store, _BORROWER, lender.worker_id, self._worker_id, attempt)
        except LaneError as error:
            _log.warning("%s lends nothing: %s", lender.worker_id, error)
            return list(fills)
        self._borrowing = channel
        try:
            # Given up before `retire` could see the channel, or from now on by its being closed.
            return list(fills) if attempt in self._given_up else borrow(self._slots, fills, channel)
        finally:
            self._borrowing = None
            channel.close()

    def _channel(self, store: GroupStore, rank: int, lender: WorkerId, borrower: WorkerId, attempt: str) -> WireChannel:
        name, timeout_s = f"weights/{lender}/{borrower}/{attempt}", self._plan.config.lane.timeout_s
        return WireChannel(Wire.join(store, name, rank, self._host, _TRANSFER_CONNECT_S, timeout_s), Epoch(0))
