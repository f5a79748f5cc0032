"""The pools' processes as Ray sees them: reserved bundles, actors, calls. The one place that places members."""

from __future__ import annotations

import asyncio
import collections
import dataclasses
import logging
import uuid
from collections.abc import Awaitable, Callable, Mapping, Sequence, Set
from typing import Any, TypeVar

import ray
from ray.util.placement_group import PlacementGroup, placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from cluster.actors import TASK_EVENTS, call, find, kill
from cluster.control.controller_journal import NotedGroup, NotedMember
from cluster.control.keeper import Keeper, group_of
from cluster.members import POOLS, Pool
from cluster.plan import ServingPlan
from cluster.workers.pool_actors import DecodeWorker, ExpertShard, PrefillWorker
from cluster.workers.worker_start import runtime_env
from octet.config import PoolConfig
from octet.errors import ChangeRefusedError, StartupError
from octet.ids import WorkerId

_log = logging.getLogger(__name__)
_T = TypeVar("_T")

_CONCURRENCY = 64
"""A member connects to all others at once, and is asked for its status meanwhile."""
_WAIT_S = 1.0
"""How long a thread waits for Ray at a time: as long it may go on after nobody wants the group any more."""
_CLASSES: dict[Pool, type] = {"prefill": PrefillWorker, "decode": DecodeWorker, "experts": ExpertShard}


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Berth:
    """A bundle of a placement group: the resources of one member."""

    group: PlacementGroup
    index: int


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Member:
    """A process of a pool. Its id is never given again."""

    worker_id: WorkerId
    pool: Pool
    actor: Any
    berth: Berth


class Pools:
    """Reserves, starts and ends members. Belongs to one event loop."""

    def __init__(self, plan: ServingPlan, controller: Any) -> None:
        self._plan, self._controller = plan, controller
        self._keeper = Keeper(plan.config.ray.namespace)
        self._numbers: dict[Pool, int] = dict.fromkeys(POOLS, 0)
        self._groups: dict[PlacementGroup, int] = {}
        """Bundles in use."""
        self._noted: dict[PlacementGroup, NotedGroup] = {}
        self.note: Callable[[], None] = lambda: None
        """Called when what another controller needs to know has changed."""
        self._free: dict[Pool, list[Berth]] = {pool: [] for pool in POOLS}
        self._ended: set[WorkerId] = set()
        self._waiting: collections.Counter[Pool] = collections.Counter()

    @property
    def waiting_for(self) -> str:
        """What Ray was asked to place, as long as it has not; nothing if empty."""
        return ", ".join(self.wanted(pool, count) for pool, count in self._waiting.items() if count)

    def wanted(self, pool: Pool, count: int) -> str:
        """What so many members of a pool need of Ray, in words."""
        return f"{count} × {_bundle(self._config(pool))} for the {pool} pool"

    async def start(self, pool: Pool, count: int, timeout_s: float | None = None, together: int = 0) -> list[Member]:
        """Reserve bundles for so many members, all or none, and start an actor in each.

        Where there is no room, the placement groups are pending, which an autoscaler of Ray's takes for demand: it
        adds nodes if it can.

        Args:
            together: so many of them share a placement group, laid out by the pool's strategy. The others have one
                each, which is gone as soon as they are, so that Ray can give their nodes back; but with a strict
                strategy, which is a matter of groups.

        Raises: ChangeRefusedError if Ray does not place them in time, StartupError if it cannot, and then nothing is
            reserved.
        """
        try:
            async with asyncio.timeout(timeout_s):
                berths = await self._reserve(pool, count, together)
        except TimeoutError:
            wanted = self.wanted(pool, count)
            raise ChangeRefusedError(f"no node had room within {timeout_s:g} s, and none came, for {wanted}") from None
        first = self._numbers[pool]
        self._numbers[pool] += len(berths)
        # Before anybody has them: ids are given once, whichever controller gives them.
        self.note()
        return await self._start_all(pool, first, berths)

    @property
    def ended(self) -> Set[WorkerId]:
        """Members whose processes were told to end."""
        return self._ended

    @property
    def numbers(self) -> Mapping[Pool, int]:
        """The next of each pool."""
        return dict(self._numbers)

    @property
    def groups(self) -> tuple[NotedGroup, ...]:
        """What is reserved."""
        return tuple(self._noted[group] for group in self._groups)

    def take_over(
        self, numbers: Mapping[Pool, int], groups: Sequence[NotedGroup], noted: Sequence[NotedMember]
    ) -> list[Member]:
        """Know what a controller before this one has reserved and started, in that order.

        Args:
            groups: those of them that there are still.
        """
        self._numbers |= numbers
        members = [self._find(one) for one in noted]
        taken = {(member.berth.group, member.berth.index) for member in members}
        for one in groups:
            group = group_of(one.group)
            self._noted[group] = one
            self._groups[group] = sum(where == group for where, _ in taken)
            self._free[one.pool] += [Berth(group, index) for index in range(one.size) if (group, index) not in taken]
        for member in members:
            # One whose group is gone has lost its process with it.
            self._groups.setdefault(member.berth.group, 1)
            unknown = NotedGroup(group=member.berth.group.id.hex(), pool=member.pool, size=1)
            self._noted.setdefault(member.berth.group, unknown)
        return members

    def _find(self, one: NotedMember) -> Member:
        actor = find(one.worker_id, self._plan.config.ray.namespace)
        return Member(worker_id=one.worker_id, pool=one.pool, actor=actor, berth=Berth(group_of(one.group), one.index))

    def end(self, member: Member) -> None:
        """Kill a member's process, whatever it does, and free what it held. Idempotent."""
        kill(member.actor)
        if member.worker_id in self._ended:
            return
        self._ended.add(member.worker_id)
        self._free_berth(member.pool, member.berth)

    def _free_berth(self, pool: Pool, berth: Berth) -> None:
        self._groups[berth.group] -= 1
        if self._groups[berth.group]:
            self._free[pool].append(berth)
            return
        del self._groups[berth.group], self._noted[berth.group]
        self._free[pool] = [free for free in self._free[pool] if free.group != berth.group]
        self._keeper.give_back(berth.group)

    def close(self) -> None:
        """Remove what is still reserved."""
        for group in self._groups:
            self._keeper.give_back(group)
        self._groups.clear()
        self._noted.clear()

    async def _reserve(self, pool: Pool, count: int, together: int) -> list[Berth]:
        """Bundles that members left behind, then new ones."""
        berths = self._take_free(pool, count)
        missing = count - len(berths)
        config = self._config(pool)
        bundle = _bundle(config)
        sizes = group_sizes(missing, missing if config.strategy.startswith("STRICT") else together)
        groups: list[PlacementGroup] = []
        self._waiting[pool] += count
        try:
            groups += await self._ask_for(sizes, bundle, config.strategy)
            # Ray places a bundle again whose node is gone: one that is free may be waiting for another node.
            for group in {*groups, *(berth.group for berth in berths)}:
                await _placed(group)
        except BaseException:
            for group in groups:
                self._keeper.give_back(group)
            for berth in berths:
                self._free_berth(pool, berth)
            raise
        finally:
            self._waiting[pool] -= count
        for group, size in zip(groups, sizes, strict=True):
            self._groups[group] = size
            self._noted[group] = NotedGroup(group=group.id.hex(), pool=pool, size=size)
            berths += [Berth(group, index) for index in range(size)]
        return berths

    def _take_free(self, pool: Pool, most: int) -> list[Berth]:
        """In use from here on, so that a group stays whose last member ends while somebody waits for a berth of it."""
        free = self._free[pool]
        berths = [free.pop() for _ in range(min(most, len(free)))]
        for berth in berths:
            self._groups[berth.group] += 1
        return berths

    async def _ask_for(self, sizes: Sequence[int], bundle: dict[str, float], strategy: str) -> list[PlacementGroup]:
        """Placement groups that are not placed yet. In a thread, since the GCS may not answer. Raises: StartupError."""
        names = [self._keeper.group_name(uuid.uuid4().hex) for _ in sizes]
        groups: list[PlacementGroup] = []

        def ask() -> None:
            for size, name in zip(sizes, names, strict=True):
                groups.append(placement_group([bundle] * size, strategy=strategy, name=name))

        try:
            # By their names: one may have been made whose answer was lost.
            await _in_thread(ask, lambda: self._keeper.give_back_named(names))
        except ray.exceptions.RayError as error:
            raise StartupError(f"Ray did not say that it reserves {bundle} for {sizes} members: {error}") from error
        return groups

    async def _start_all(self, pool: Pool, first: int, berths: Sequence[Berth]) -> list[Member]:
        """One in each. In a thread, since Ray asks the GCS whether there is another one of that name.

        Raises: StartupError, and then none is started.
        """
        members: list[Member] = []

        def start() -> None:
            for number, berth in enumerate(berths, first):
                members.append(self._start_in(berth, pool, number))

        def undo() -> None:
            for berth in berths[len(members) :]:
                self._free_berth(pool, berth)
            for member in members:
                self.end(member)

        try:
            await _in_thread(start, undo)
        except (ray.exceptions.RayError, ValueError) as error:
            raise StartupError(f"Ray did not start a process for the {pool} pool: {error}") from error
        return members

    def _start_in(self, berth: Berth, pool: Pool, number: int) -> Member:
        config = self._config(pool)
        worker_id = WorkerId(f"{pool}-{number}")
        options = {
            "name": worker_id,
            "namespace": self._plan.config.ray.namespace,
            # It goes on without the controller's process; see `cluster.tether`.
            "lifetime": "detached",
            "num_cpus": config.num_cpus,
            "num_gpus": config.num_gpus,
            "resources": config.resources,
            "scheduling_strategy": PlacementGroupSchedulingStrategy(
                berth.group, placement_group_bundle_index=berth.index
            ),
            "max_concurrency": _CONCURRENCY,
            "enable_task_events": TASK_EVENTS,
            "runtime_env": runtime_env(self._plan.config),
        }
        actor: Any = ray.remote(_CLASSES[pool]).options(**options).remote(worker_id, self._plan, self._controller)
        return Member(worker_id=worker_id, pool=pool, actor=actor, berth=berth)

    def _config(self, pool: Pool) -> PoolConfig:
        config: PoolConfig = getattr(self._plan.config.pools, pool)
        return config


async def _placed(group: PlacementGroup) -> None:
    """Wait until Ray has placed all of it. Raises: StartupError if there is no such group any more."""
    try:
        # `ready()` would start a process to find out.
        while not await asyncio.to_thread(group.wait, _WAIT_S):
            pass
    except Exception as error:
        # Of a group that somebody has removed Ray says so with an error that has no class of its own.
        raise StartupError(f"Ray does not place {group.id.hex()}: {error}") from error


async def _in_thread(work: Callable[[], None], undo: Callable[[], None]) -> None:
    """Where it fails, or nobody waits for it any more, it is undone as soon as it is through, in the event loop."""
    working = asyncio.ensure_future(asyncio.to_thread(work))
    try:
        await asyncio.shield(working)
    except BaseException:
        if working.done():
            undo()
        else:

            def end(done: asyncio.Future[None]) -> None:
                if not done.cancelled() and (error := done.exception()) is not None:
                    _log.warning("what was given up has failed: %s", error)
                undo()

            working.add_done_callback(end)
        raise


def group_sizes(count: int, together: int) -> list[int]:
    """Of the placement groups for so many members, of which so many share one."""
    first = min(count, together)
    return [size for size in (first, *[1] * (count - first)) if size]


def _bundle(config: PoolConfig) -> dict[str, float]:
    """What a member holds of its node. Ray takes no empty bundle: this much of a CPU is its smallest share."""
    wanted = {"CPU": config.num_cpus, "GPU": config.num_gpus, **config.resources}
    return {name: amount for name, amount in wanted.items() if amount > 0} or {"CPU": 0.0001}


async def call_all(calls: Sequence[tuple[Member, Awaitable[_T]]], timeout_s: float) -> list[_T]:
    """Await calls of members. Raises: the first failure, see `call`."""
    return await asyncio.gather(*(call(member.worker_id, awaitable, timeout_s) for member, awaitable in calls))
