"""A cluster that faults are done to: who its processes are, what it holds, and when it is as it was."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import os
import pathlib
import signal
import time
from collections.abc import Callable, Mapping

from cluster.fault_points import arm, disarm, pid_of, struck
from cluster.inventory import inventory
from cluster.plan import ServingPlan
from octet.client import AsyncClient, CallError
from octet.errors import UnavailableError
from octet.faults import Fault, Struck
from octet.v1 import octet_pb2 as pb
from ops.bench.changes.leftovers import actor_processes
from ops.chaos.checker import baseline
from ops.chaos.commits import AuditTrail
from ops.chaos.history import Facts
from ops.chaos.observe import facts_of, num_ports
from ops.chaos.rig import Rig

_POLL_S, _ANSWER_S = 0.1, 15.0
_SETTLE_S = 120.0
_PLACING_S = 15.0
"""After which Ray has no room for what it has not placed."""
SERVICES = {"frontend": "frontend-0", "controller": "controller", "router": "router"}
"""Names of the actors outside the pools."""


class Stage:
    """Of a cluster whose processes run below this one, or at least on this machine. Belongs to one event loop."""

    def __init__(self, plan: ServingPlan, address: str, client: AsyncClient, rig: Rig | None = None) -> None:
        """
        Args:
            plan: with `chaos.enabled`, and an `audit_dir` on this machine.
            rig: what it was started with.
        """
        self.plan, self.address, self.client, self.rig = plan, address, client, rig or Rig()
        self.namespace = plan.config.ray.namespace
        self.sizes: dict[str, int] = {
            "prefill": plan.config.pools.prefill.size,
            "decode": plan.config.pools.decode.size,
            "experts": plan.config.pools.experts.size,
        }
        self._restoring: asyncio.Task[None] | None = None
        directory = plan.config.chaos.audit_dir
        self.trail = AuditTrail(pathlib.Path(directory)) if directory is not None else None

    async def status(self) -> pb.GetStatusResponse:
        """Asked for until it is there: a service that was killed takes its time. Raises: UnavailableError."""
        deadline_s = time.monotonic() + _SETTLE_S
        while True:
            try:
                return await self.client.status(timeout_s=_ANSWER_S)
            except CallError as error:
                if time.monotonic() > deadline_s:
                    raise UnavailableError(f"no status within {_SETTLE_S} s: {error}") from error
                await asyncio.sleep(_POLL_S)

    async def members(self, pool: str) -> list[str]:
        """Ids of those that serve, in the order of their numbers."""
        status = await self.status()
        found = [m.worker_id for p in status.pools if p.name == pool for m in p.members if _serves(m)]
        return sorted(found, key=lambda worker_id: int(worker_id.rpartition("-")[2]))

    async def far_members(self) -> dict[str, int]:
        """Pids by id of the members that serve on the other host."""
        there = set(self.rig.cable.processes("far")) if self.rig.cable is not None else set()
        members = [member for pool in (await self.status()).pools for member in pool.members if _serves(member)]
        return {member.worker_id: member.pid for member in members if member.pid in there}

    async def name_of(self, target: str, which: int, deadly: bool) -> str:
        """The actor that is meant: a service, or a member.

        Args:
            deadly: wait until its pool has another member beside it, if it is meant to have one.

        Raises: UnavailableError if the pool does not fill in time.
        """
        if target in SERVICES:
            return SERVICES[target]
        least = min(2 if deadly else 1, self.sizes[target])
        deadline_s = time.monotonic() + _SETTLE_S
        while len(members := await self.members(target)) < least:
            if time.monotonic() > deadline_s:
                raise UnavailableError(f"the {target} pool had fewer than {least} members for {_SETTLE_S} s")
            await asyncio.sleep(_POLL_S)
        return members[which % len(members)]

    async def pid(self, name: str) -> int:
        """Raises: UnavailableError if the actor does not answer."""
        return await asyncio.to_thread(pid_of, self.namespace, name)

    async def arm(self, name: str, fault: Fault) -> None:
        """Raises: ConfigError, UnavailableError."""
        await asyncio.to_thread(arm, self.namespace, name, fault)

    async def struck(self, name: str) -> tuple[Struck, ...]:
        """The faults that have struck; none of an actor that does not answer."""
        try:
            return self._dated(await asyncio.to_thread(struck, self.namespace, name))
        except UnavailableError:
            return ()

    async def disarm(self, name: str) -> tuple[Struck, ...]:
        """Likewise, and nothing strikes from here on."""
        try:
            return self._dated(await asyncio.to_thread(disarm, self.namespace, name))
        except UnavailableError:
            return ()

    def _dated(self, found: tuple[Struck, ...]) -> tuple[Struck, ...]:
        """By the harness's own clock."""
        if (clock := self.rig.clock) is None:
            return found
        return tuple(dataclasses.replace(one, at_s=clock.right_s(one.at_s)) for one in found)

    async def until(self, condition: Callable[[pb.GetStatusResponse], bool], timeout_s: float = _SETTLE_S) -> bool:
        """Returns: whether it came true in time."""
        deadline_s = time.monotonic() + timeout_s
        while not condition(await self.status()):
            if time.monotonic() > deadline_s:
                return False
            await asyncio.sleep(_POLL_S)
        return True

    async def without(self, names: Mapping[str, int]) -> bool:
        """Wait until the cluster goes on without these members, or has replaced these services."""
        gone = set(names)
        members = gone - set(SERVICES.values())
        if members and not await self.until(lambda status: not members & ids_of(status)):
            return False
        return all([await self._replaced(name, names[name]) for name in sorted(gone - members)])

    def restore_sizes(self) -> None:
        """Begin to bring pools back to the sizes that they had, unless that is under way."""
        if self._restoring is None or self._restoring.done():
            self._restoring = asyncio.create_task(self._restore())

    async def _restore(self) -> None:
        with contextlib.suppress(CallError):
            # What is refused because of a loss under way is asked for again by whoever waits for the baseline.
            await self.client.scale(**self.sizes, timeout_s=_SETTLE_S)

    async def facts(self) -> Facts:
        """Of now."""
        status = await self.status()
        held = await asyncio.to_thread(inventory, self.namespace)
        processes = actor_processes()
        layers = len(self.plan.routing.placement.layers)
        return facts_of(
            status,
            held,
            processes,
            num_ports(processes),
            layers * self.plan.model.n_routed_experts,
            layers * self.plan.config.pools.experts.redundant_experts,
        )

    async def settle(
        self, before: Facts, complete: bool, host_lost: bool = False, timeout_s: float = _SETTLE_S
    ) -> Facts:
        """Facts when everything is as it was, or at the latest after this time."""
        now_s = time.monotonic()
        deadline_s, placing_until_s = now_s + timeout_s, now_s + _PLACING_S
        while True:
            after = await self.facts()
            # Where there is room, Ray takes a moment to give it.
            placed = not (host_lost and complete and after.unplaced) or time.monotonic() > placing_until_s
            kept = placed and not any(baseline(before, after, complete, host_lost))
            if kept or time.monotonic() > deadline_s:
                return after
            if complete and after.state == before.state and after.sizes != before.sizes:
                # What was lost is replaced by itself; this is what a change of size has left.
                self.restore_sizes()
            await asyncio.sleep(_POLL_S)

    async def _replaced(self, name: str, pid: int) -> bool:
        deadline_s = time.monotonic() + _SETTLE_S
        while time.monotonic() < deadline_s:
            with contextlib.suppress(UnavailableError):
                if await self.pid(name) != pid:
                    return True
            await asyncio.sleep(_POLL_S)
        return False


def signal_to(pid: int, number: signal.Signals) -> None:
    """A process that is gone already needs none."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def ids_of(status: pb.GetStatusResponse) -> set[str]:
    """Of all members that serve."""
    return {member.worker_id for pool in status.pools for member in pool.members if _serves(member)}


def _serves(member: pb.Member) -> bool:
    return member.state != "STANDBY"
