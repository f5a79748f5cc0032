"""A cluster of the bench's own, and what is done to it."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import time
from collections.abc import Callable, Mapping

from cluster.inventory import kill_service
from cluster.launch import RunningCluster
from octet.client import AsyncClient
from octet.errors import UnavailableError
from octet.v1 import octet_pb2 as pb

_POLL_S = 0.2
_SETTLE_S = 120.0


class Stage:
    """Every action returns when the cluster is as it shall be. Raises: CallError, UnavailableError."""

    def __init__(self, cluster: RunningCluster, client: AsyncClient, sizes: Mapping[str, int]) -> None:
        """
        Args:
            sizes: of the pools, to which losses are made up.
        """
        self.cluster, self.client, self.sizes = cluster, client, dict(sizes)

    async def sessions(self) -> frozenset[int]:
        """Of the processes of the cluster, and of this one."""
        status = await self.client.status()
        pids = {member.pid for pool in status.pools for member in pool.members}
        return frozenset(os.getsid(pid) for pid in {os.getpid(), *pids})

    async def scale(self, pool: str, size: int) -> None:
        await self.client.scale(**{pool: size})

    async def find_moves(self) -> None:
        """Wait until a rebalancing would move something."""
        deadline_s = time.monotonic() + _SETTLE_S
        while not (await self.client.rebalance(dry_run=True)).moves:
            if time.monotonic() > deadline_s:
                raise UnavailableError(f"no expert had reason to move for {_SETTLE_S} s")
            await asyncio.sleep(_POLL_S)

    async def rebalance(self) -> None:
        """Again where the load has changed since moves were found."""
        while not (await self.client.rebalance()).moves:
            await self.find_moves()

    async def fill_replicas(self) -> None:
        """Move experts until every shard holds all of them."""
        held = self.cluster.plan.model.n_routed_experts * len(self.cluster.plan.routing.placement.layers)
        deadline_s = time.monotonic() + _SETTLE_S
        while any(shard.num_held < held for shard in members(await self.client.status(), "experts").values()):
            if time.monotonic() > deadline_s:
                raise UnavailableError(f"not every expert was on every shard within {_SETTLE_S} s")
            await self.client.rebalance()
            await asyncio.sleep(_POLL_S)

    async def kill(self, pool: str) -> float:
        """End the process of a member. Returns: after how long the cluster went on without it."""
        worker_id, victim = random.choice(sorted(members(await self.client.status(), pool).items()))
        os.kill(victim.pid, signal.SIGKILL)
        killed_at_s = time.time()

        def replaced(status: pb.GetStatusResponse) -> bool:
            sizes = {p.name: len(p.members) for p in status.pools}
            return worker_id not in members(status, pool) and settled(status) and sizes == self.sizes

        status = await self._until(replaced, f"another member in place of {worker_id}")
        at_s = recovered_at_s(status, worker_id)
        if at_s is None:
            raise UnavailableError(f"{worker_id} is replaced, and no recovery from its loss is on record")
        return at_s - killed_at_s

    async def kill_router(self) -> None:
        """End the router service's process."""
        kill_service(self.cluster.plan.config.ray.namespace, "router")
        # Telemetry begins anew with another process; the first answers come from none at all.
        await self._until(lambda status: status.window_s > 0 and settled(status), "another router service")

    async def _until(self, condition: Callable[[pb.GetStatusResponse], bool], what: str) -> pb.GetStatusResponse:
        deadline_s = time.monotonic() + _SETTLE_S
        while not condition(status := await self.client.status()):
            if time.monotonic() > deadline_s:
                raise UnavailableError(
                    f"not within {_SETTLE_S} s: {what}; the cluster is {status.state}: {status.reason}"
                )
            await asyncio.sleep(_POLL_S)
        return status


def members(status: pb.GetStatusResponse, pool: str) -> dict[str, pb.Member]:
    return {member.worker_id: member for p in status.pools if p.name == pool for member in p.members}


def recovered_at_s(status: pb.GetStatusResponse, worker_id: str) -> float | None:
    """When the cluster went on without a member, in seconds since the epoch; None where that is not on record."""
    ends_s = [
        change.at_s + change.duration_s
        for change in status.changes
        if change.kind == "recovery" and worker_id in change.reason and change.succeeded
    ]
    return ends_s[-1] if ends_s else None


def settled(status: pb.GetStatusResponse) -> bool:
    return status.state == "READY" and not status.change_under_way
