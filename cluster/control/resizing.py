"""Pools that grow and shrink: to the sizes that they are asked for, and to make up for what is lost."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial

from cluster.actors import answer_of, call
from cluster.control.announcements import Announcements
from cluster.control.change_log import ChangeLog
from cluster.control.expert_moves import ExpertMoves
from cluster.control.membership import Membership
from cluster.control.pools import Member, Pools
from cluster.control.preparation import Preparation
from cluster.members import MemberStatus, Pool
from cluster.plan import ServingPlan
from octet.errors import ChangeRefusedError, ConfigError, OctetError
from octet.ids import WorkerId

_ANSWER_S = 10.0
_STOP_S = 10.0
_POLL_S = 0.05


class Resizing:
    """Belongs to the controller's event loop."""

    def __init__(
        self,
        plan: ServingPlan,
        pools: Pools,
        membership: Membership,
        preparation: Preparation,
        moves: ExpertMoves,
        announcements: Announcements,
        log: ChangeLog,
    ) -> None:
        self._plan, self._pools, self._membership = plan, pools, membership
        self._preparation, self._moves, self._announcements, self._log = preparation, moves, announcements, log
        self._ready: dict[WorkerId, Pool] = {}
        """Processes that wait for their turn to join."""
        self._num_sizes: Counter[Pool] = Counter()
        """How often each pool was asked for a size. What was begun for an earlier one is given up."""

    @property
    def starting(self) -> Mapping[Pool, int]:
        """Members on their way in, by pool: each until it is one."""
        ready = (pool for worker_id, pool in self._ready.items() if worker_id not in self._membership)
        return Counter(self._preparation.starting) + Counter(ready)

    async def scale(self, pool: Pool, size: int, reason: str) -> None:
        """Bring a pool to this many members; what was asked of it before, and has not begun to join, is given up.

        Raises: OctetError, and then it is as it was.
        """
        num_experts = self._plan.model.n_routed_experts
        scaler = self._plan.config.autoscaler
        least = getattr(scaler, pool).min_replicas if scaler.enabled else 1
        if size < 0 or (size == 0 and least > 0):
            expected = "at least 1: only an autoscaler whose min_replicas are 0 brings an empty pool back"
            raise ConfigError(f"pools.{pool}.size", size, expected)
        if pool == "experts" and size > num_experts:
            raise ConfigError("pools.experts.size", size, f"at most the model's {num_experts} experts")
        if pool == "experts" and self._plan.device != "cpu":
            raise ConfigError("pools.experts.size", "a change while serving", "the size at the start, on GPUs")
        self._preparation.give_up(pool)
        self._num_sizes[pool] += 1
        number = self._num_sizes[pool]
        if size != len(self._membership.pool(pool)) or self._log.busy:
            await self._resize(pool, size, reason, number, shrinks=True)
        if len(self._membership.pool(pool)) < size:
            # What was under way has made it smaller.
            await self._resize(pool, size, reason, number, shrinks=True)

    async def replenish(self, pool: Pool, size: int, reason: str) -> None:
        """Let a pool have at least this many members, unless it is asked for a size meanwhile. Raises: OctetError."""
        if len(self._membership.pool(pool)) < size:
            await self._resize(pool, size, reason, self._num_sizes[pool], shrinks=False)

    async def _resize(self, pool: Pool, size: int, reason: str, number: int, shrinks: bool) -> None:
        """Processes start beside whatever else is going on; only their joining is a change.

        Until they join it can be cancelled, and nothing is left of it.

        Args:
            number: of the sizes that the pool was asked for, the one that this is for.
        """
        self._check_wanted(pool, number)
        begun_s, before = time.monotonic(), len(self._membership.pool(pool))
        ready: list[Member] = []
        if size > before:
            async with self._log.attempt("scale", reason, only_failure=True) as failure:
                failure.append(f"{pool}: {before} → {size}")
                ready = await self._preparation.members(pool, size - before)
                self._ready |= {member.worker_id: pool for member in ready}
                if pool != "experts":
                    await self._wait_for_shards(pool, number, ready)
        await self._log.through(self._join(pool, size, reason, number, shrinks, ready, begun_s))

    def _check_wanted(self, pool: Pool, number: int) -> None:
        """Raises: ChangeRefusedError."""
        if number != self._num_sizes[pool]:
            raise ChangeRefusedError(f"the {pool} pool was asked for another size before this one was begun")

    def _end_ready(self, ready: Sequence[Member]) -> None:
        for member in ready:
            self._ready.pop(member.worker_id, None)
            self._pools.end(member)

    async def _wait_for_shards(self, pool: Pool, number: int, ready: Sequence[Member]) -> None:
        """Workers that come when no shard serves join after the first one. Raises: ChangeRefusedError, and they end."""
        timeout_s = self._plan.config.ray.start_timeout_s
        try:
            for _ in range(int(timeout_s / _POLL_S)):
                if self._membership.pool("experts"):
                    return
                await asyncio.sleep(_POLL_S)
                self._check_wanted(pool, number)
            raise ChangeRefusedError(f"no expert shard has come within {timeout_s:g} s")
        except BaseException:
            self._end_ready(ready)
            raise

    async def _join(
        self, pool: Pool, size: int, reason: str, number: int, shrinks: bool, ready: Sequence[Member], begun_s: float
    ) -> None:
        """Let members in or out; all parts have deadlines."""
        async with self._log.change("scale", reason) as record:
            members = self._membership.pool(pool)
            record.append(f"{pool}: {len(members)} → {size}")
            try:
                self._check_wanted(pool, number)
            except ChangeRefusedError:
                self._end_ready(ready)
                raise
            joining, surplus = ready[: max(0, size - len(members))], ready[max(0, size - len(members)) :]
            # Somebody else has scaled the pool meanwhile.
            self._end_ready(surplus)
            if joining:
                record.append(f"processes were ready after {time.monotonic() - begun_s:.1f} s")
                try:
                    await self._grow(pool, joining)
                finally:
                    for member in joining:
                        self._ready.pop(member.worker_id, None)
            elif shrinks and size < len(members):
                await self._shrink(pool, members[size:])

    async def _grow(self, pool: Pool, members: Sequence[Member]) -> None:
        try:
            if pool == "experts":
                # Where none is left, those that come take everything over, as after the loss of all.
                gone = () if self._membership.pool("experts") else self._membership.routing.shards
                await self._moves.reroute(joining=members, leaving=gone, lost=gone)
            else:
                await self._membership.enter(members)
                await self._announcements.tell_frontend()
        except BaseException:
            for member in members:
                self._pools.end(member)
            raise
        await self._announcements.tell_router()

    async def _shrink(self, pool: Pool, leaving: Sequence[Member]) -> None:
        if pool == "experts" and len(leaving) == len(self._membership.pool("experts")):
            if workers := self._membership.pool("prefill") + self._membership.pool("decode"):
                raise ChangeRefusedError(f"shards leave after the workers, of which {len(workers)} are there")
            # The routing stays as it was: nobody routes by it, and the next shards take over from it.
            await self._membership.leave(leaving)
        elif pool == "experts":
            await self._moves.reroute(leaving=[member.worker_id for member in leaving])
        else:
            await self._drain(leaving)
        await self._announcements.tell_router()
        for member in leaving:
            with contextlib.suppress(OctetError):
                # One that does not stop in time is killed all the same.
                await call(member.worker_id, member.actor.stop.remote(), _STOP_S)
            self._pools.end(member)

    async def _drain(self, leaving: Sequence[Member]) -> None:
        """Let attention workers end what they have, or hand it over, and part with them."""
        ids = {member.worker_id for member in leaving}
        self._announcements.draining |= ids
        try:
            await self._announcements.tell_frontend()
            if leaving[0].pool == "decode":
                with contextlib.suppress(OctetError):
                    # Sequences that cannot be handed over end here, or start again elsewhere.
                    await self._membership.hand_over(leaving)
            for _ in range(int(self._plan.config.frontend.drain_s / _POLL_S)):
                if await self._idle(leaving):
                    break
                await asyncio.sleep(_POLL_S)
        finally:
            self._announcements.draining -= ids
        # What is left there starts again elsewhere.
        await self._membership.leave(leaving)
        await self._announcements.tell_frontend()

    async def _idle(self, members: Sequence[Member]) -> bool:
        """Whether none has anything left to end. One that does not answer will not."""
        asked = (call(m.worker_id, answer_of(partial(m.actor.status.remote)), _ANSWER_S) for m in members)
        statuses: list[MemberStatus | BaseException] = await asyncio.gather(*asked, return_exceptions=True)
        loads = [found.load for found in statuses if isinstance(found, MemberStatus) and found.load is not None]
        return all(load.running == load.waiting == load.leases == 0 for load in loads)
