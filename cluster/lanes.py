"""How the two ends of a lane are opened from a plan, so that they agree."""

from __future__ import annotations

import torch

from cluster.members import Endpoint, Role
from cluster.plan import ServingPlan
from octet.ids import WorkerId
from router.exchange import Exchange, Port
from router.frames import FrameLayout
from router.group import Group, GroupStore
from router.lane import LaneExchange, LanePort
from router.nccl_lane import NcclGroup, NcclLaneExchange, NcclLanePort


def serving_dtype(plan: ServingPlan) -> torch.dtype:
    """Of weights, activations and KV: fp32 on CPUs, whose bf16 is slower, bf16 on GPUs."""
    return torch.float32 if plan.device == "cpu" else torch.bfloat16


def open_exchange(worker_id: WorkerId, role: Role, plan: ServingPlan, store: GroupStore, host: str) -> Exchange:
    """The attention worker's end; returns when every shard has joined. Raises: LaneTimeoutError."""
    num_shards, layout = plan.config.pools.experts.size, _layout(role, plan)
    name = _name(worker_id, plan)
    control = _group(store, name, 0, plan, host)
    if plan.device == "cpu":
        return LaneExchange(control, num_shards, layout, plan.epoch)
    device = torch.device(plan.device)
    data = NcclGroup(store, name, 0, num_shards + 1, device)
    return NcclLaneExchange(control, data, num_shards, layout, plan.epoch, device)


def open_port(peer: Endpoint, role: Role, shard: int, plan: ServingPlan, host: str) -> Port:
    """A shard's end of the lane of `peer`. Raises: LaneTimeoutError."""
    store = GroupStore.join(peer.store, plan.config.ray.start_timeout_s)
    name, layout, silence_s = _name(peer.worker_id, plan), _layout(role, plan), plan.config.lane.timeout_s
    control = _group(store, name, shard + 1, plan, host)
    if plan.device == "cpu":
        return LanePort(control, layout, plan.epoch, silence_s)
    device = torch.device(plan.device)
    data = NcclGroup(store, name, shard + 1, plan.config.pools.experts.size + 1, device)
    return NcclLanePort(control, data, layout, plan.epoch, silence_s, device)


def _group(store: GroupStore, name: str, rank: int, plan: ServingPlan, host: str) -> Group:
    config = plan.config
    size = config.pools.experts.size + 1
    return Group(store, name, rank, size, host, config.ray.start_timeout_s, config.lane.timeout_s)


def _name(worker_id: WorkerId, plan: ServingPlan) -> str:
    return f"lane/{worker_id}/{plan.epoch}"


def _layout(role: Role, plan: ServingPlan) -> FrameLayout:
    config = plan.config
    return FrameLayout(
        hidden_size=plan.model.hidden_size,
        experts_per_token=plan.model.num_experts_per_tok,
        max_rows=config.prefill.chunk_tokens
        if role == "prefill"
        else config.decode.max_batch * (1 + config.speculation.num_speculative_tokens),
        dtype=serving_dtype(plan),
    )
