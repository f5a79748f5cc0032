"""The two ends of a lane, opened from a plan so that they agree."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Protocol

import torch

from cluster.members import Endpoint, Role
from cluster.plan import ServingPlan
from octet.errors import ConfigError
from octet.ids import Epoch, WorkerId
from router.exchange import Exchange, Port
from router.frames import FrameLayout
from router.group_store import GroupStore
from router.lane import SHARD, WORKER, LaneExchange, LanePort
from router.link import Link, shared_bytes
from router.nccl_lane import NcclGroup, NcclLaneExchange, NcclLanePort
from router.wire import Wire


class LaneBuilder(Protocol):
    """Makes the lanes of one attention worker, of one epoch after the other."""

    def link(self, shards: Sequence[WorkerId], epoch: Epoch) -> None:
        """Connect to shards, which call `open_port` at the same time. What is in use is not touched.

        Raises: LaneTimeoutError if one does not come.
        """

    def exchange(self, shards: Sequence[WorkerId]) -> Exchange:
        """The lane to these shards, all of which are linked."""

    def give_up(self, shards: Sequence[WorkerId]) -> None:
        """Let whoever waits for one of these shards get an error now. Any thread may call it."""

    def unlink(self, others_than: Sequence[WorkerId]) -> None:
        """Break the links to all other shards, and those that others have taken the place of."""


class WireLanes:
    """A link to each shard: lanes of successive epochs share those to the shards that stay."""

    def __init__(self, worker_id: WorkerId, role: Role, plan: ServingPlan, store: GroupStore, host: str) -> None:
        self._worker_id, self._role, self._plan, self._store, self._host = worker_id, role, plan, store, host
        self._links: dict[WorkerId, Link] = {}
        self._replaced: list[tuple[WorkerId, Link]] = []
        """In use until the next adoption."""

    def link(self, shards: Sequence[WorkerId], epoch: Epoch) -> None:
        for shard in shards:
            name = _link_name(self._worker_id, shard, epoch)
            layout = frame_layout(self._role, self._plan)
            wire = _wire(self._store, name, WORKER, self._plan, self._host, layout)
            if shard in self._links:
                self._replaced.append((shard, self._links[shard]))
            self._links[shard] = Link(wire, layout, epoch)

    def exchange(self, shards: Sequence[WorkerId]) -> Exchange:
        return LaneExchange([self._links[shard] for shard in shards], self._crowded(shards))

    def _crowded(self, shards: Sequence[WorkerId]) -> bool:
        """See `Exchange.crowded`. Steps of decode workers are too short to wait for a core."""
        num_threads = len(shards) * self._plan.threads["experts"]
        within_host = all(self._links[shard].within_host for shard in shards)
        return self._role == "prefill" and within_host and num_threads >= len(os.sched_getaffinity(0))

    def give_up(self, shards: Sequence[WorkerId]) -> None:
        for shard, link in [*self._replaced, *self._links.items()]:
            if shard in shards:
                link.abort()

    def unlink(self, others_than: Sequence[WorkerId]) -> None:
        replaced, self._replaced = [link for _, link in self._replaced], []
        for link in [*replaced, *(self._links.pop(shard) for shard in self._links.keys() - set(others_than))]:
            link.close()


class NcclLanes:
    """One communicator of all shards, formed once."""

    def __init__(self, worker_id: WorkerId, role: Role, plan: ServingPlan, store: GroupStore, host: str) -> None:
        self._worker_id, self._role, self._plan, self._store, self._host = worker_id, role, plan, store, host
        self._lane: NcclLaneExchange | None = None

    def link(self, shards: Sequence[WorkerId], epoch: Epoch) -> None:
        """Raises: ConfigError if there is a lane already: shards do not come and go over NCCL yet."""
        if self._lane is not None:
            raise ConfigError("pools.experts.size", "a change while serving", "the size at the start, on GPUs")
        name, device = _lane_name(self._worker_id, epoch), torch.device(self._plan.device)
        layout = frame_layout(self._role, self._plan)
        wires = [
            _wire(self._store, _link_name(self._worker_id, shard, epoch), WORKER, self._plan, self._host, layout)
            for shard in shards
        ]
        data = NcclGroup(self._store, name, 0, len(shards) + 1, device)
        self._lane = NcclLaneExchange(wires, data, layout, epoch, device)

    def exchange(self, shards: Sequence[WorkerId]) -> Exchange:
        assert self._lane is not None
        return self._lane

    def give_up(self, shards: Sequence[WorkerId]) -> None:
        # NCCL's own watch over its connections ends the communicator, with all of the lane.
        return

    def unlink(self, others_than: Sequence[WorkerId]) -> None:
        if self._lane is not None and not others_than:
            self._lane.close()


def lane_builder(worker_id: WorkerId, role: Role, plan: ServingPlan, store: GroupStore, host: str) -> LaneBuilder:
    return (WireLanes if plan.device == "cpu" else NcclLanes)(worker_id, role, plan, store, host)


def open_port(
    peer: Endpoint,
    role: Role,
    shard: WorkerId,
    linked: Sequence[WorkerId],
    epoch: Epoch,
    plan: ServingPlan,
    store: GroupStore,
    host: str,
) -> Port:
    """A shard's end of what `LaneBuilder.link` opens.

    Args:
        linked: the shards that the attention worker links in this call.
        store: the attention worker's.

    Raises: LaneTimeoutError.
    """
    layout, silence_s = frame_layout(role, plan), plan.config.lane.timeout_s
    wire = _wire(store, _link_name(peer.worker_id, shard, epoch), SHARD, plan, host, layout)
    if plan.device == "cpu":
        return LanePort(wire, layout, epoch, silence_s)
    name, rank, size = _lane_name(peer.worker_id, epoch), linked.index(shard) + 1, len(linked) + 1
    device = torch.device(plan.device)
    data = NcclGroup(store, name, rank, size, device)
    return NcclLanePort(wire, data, layout, epoch, silence_s, device)


def serving_dtype(plan: ServingPlan) -> torch.dtype:
    """Of weights, activations and KV: fp32 on CPUs, whose bf16 is slower, bf16 on GPUs."""
    return torch.float32 if plan.device == "cpu" else torch.bfloat16


def frame_layout(role: Role, plan: ServingPlan) -> FrameLayout:
    config = plan.config
    return FrameLayout(
        hidden_size=plan.model.hidden_size,
        experts_per_token=plan.model.num_experts_per_tok,
        max_rows=config.prefill.chunk_tokens
        if role == "prefill"
        else config.decode.max_batch * (1 + config.speculation.num_speculative_tokens),
        dtype=serving_dtype(plan),
    )


def _wire(store: GroupStore, name: str, rank: int, plan: ServingPlan, host: str, layout: FrameLayout) -> Wire:
    lane = plan.config.lane
    shared = shared_bytes(layout) if lane.shared_memory and plan.device == "cpu" else 0
    return Wire.join(store, name, rank, host, lane.connect_s, lane.timeout_s, shared)


def _link_name(worker_id: WorkerId, shard: WorkerId, epoch: Epoch) -> str:
    return f"link/{worker_id}/{shard}/{epoch}"


def _lane_name(worker_id: WorkerId, epoch: Epoch) -> str:
    return f"lane/{worker_id}/{epoch}"
