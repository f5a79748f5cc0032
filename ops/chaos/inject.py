"""Carries a schedule out, and notes what came of each of its events."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import math
import signal
import time
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from typing import TypeVar

from octet.client import CallError
from octet.errors import ConfigError, OctetError
from octet.faults import Fault
from ops.chaos.cable import Cable
from ops.chaos.history import Injected
from ops.chaos.observe import name_of, state_of
from ops.chaos.resources import filled, memory_limit
from ops.chaos.schedule import (
    Arm,
    Cut,
    Event,
    FillDisk,
    JumpClock,
    Kill,
    KillNode,
    LimitMemory,
    Rebalance,
    Scale,
    Schedule,
    Slow,
    Stop,
)
from ops.chaos.stage import Stage, ids_of, signal_to

T = TypeVar("T")

_POLL_S = 0.02
_PATIENCE_S = 8.0
"""How long after the schedule's time, and after it was armed, a fault may still strike."""
_CHANGE_PATIENCE_S = 45.0
"""The same at a step of a change, which may wait for processes to start."""
_CHANGE_S = 120.0
_TURN_S = 1.5
_GHOST_S = 90.0
"""How long the process of a member that was lost with its host may be there after the host is back."""
_HEADROOM_KIB, _GROWING_S = 64, 60.0
"""How much more memory a limited process may take, and how long it is given to take it."""
_OF_CHANGES = ("link", "prepare", "adopt", "retire", "change.linked", "change.prepared", "change.adopted")
"""Steps that everybody reaches who takes part; others are reached by who has work."""


async def play(stage: Stage, schedule: Schedule, begin_s: float) -> list[Injected]:
    """Every event at its time; returns when all are over.

    Args:
        begin_s: of the schedule, in seconds since 1970.
    """
    over = asyncio.Event()
    arms = {id(event): asyncio.Event() for event in schedule.events if isinstance(event, Arm)}

    async def run(event: Event) -> Injected:
        await asyncio.sleep(max(0.0, begin_s + event.at_s - time.time()))
        # What is to strike during a change is armed before the change begins, however long that takes.
        for earlier in schedule.events:
            if id(earlier) in arms and not isinstance(event, Arm) and earlier.at_s <= event.at_s:
                await arms[id(earlier)].wait()
        return await _play(stage, event, arms.get(id(event), asyncio.Event()), over)

    running = [(event, asyncio.create_task(run(event))) for event in schedule.events]
    arming = [task for event, task in running if id(event) in arms]
    try:
        done = list(await asyncio.gather(*(task for event, task in running if id(event) not in arms)))
        await asyncio.sleep(max(0.0, begin_s + schedule.duration_s - time.time()))
        if arming:
            # Both may take their time on a machine that is busy.
            await asyncio.gather(*(armed.wait() for armed in arms.values()))
            of_changes = any(isinstance(event, Arm) and event.point in _OF_CHANGES for event in schedule.events)
            await asyncio.wait(arming, timeout=_CHANGE_PATIENCE_S if of_changes else _PATIENCE_S)
    finally:
        over.set()
    done += await asyncio.gather(*arming)
    return sorted(done, key=lambda injected: injected.at_s)


async def _play(stage: Stage, event: Event, armed: asyncio.Event, over: asyncio.Event) -> Injected:
    """
    Args:
        armed: set when an armed fault is there, or will never be.
        over: set when it may not strike any more.
    """
    at_s = time.time()
    try:
        match event:
            case Kill():
                return await _kill(stage, event)
            case Stop():
                return await _stop(stage, event)
            case Arm():
                return await _arm(stage, event, armed, over)
            case Scale():
                return await _scale(stage, event)
            case Rebalance():
                moves = len((await stage.client.rebalance(timeout_s=_CHANGE_S)).moves)
                return _done(event, at_s, "rebalance", note=f"{moves} moves")
            case Cut():
                return await _cut(stage, event)
            case Slow():
                return await _slow(stage, event)
            case KillNode():
                return await _kill_node(stage, event)
            case LimitMemory():
                return await _limit_memory(stage, event)
            case FillDisk():
                return await _fill_disk(stage, event)
            case JumpClock():
                return await _jump_clock(stage, event)
    except OctetError as error:
        # What others do to the cluster may let this fail: the cluster says so, and is as it was.
        return _done(event, at_s, event.kind, fired=False, note=str(error))
    finally:
        armed.set()


async def _kill(stage: Stage, event: Kill) -> Injected:
    victims = await _victims(stage, event)
    at_s = time.time()
    for pid in victims.values():
        signal_to(pid, signal.SIGKILL)
    well = await stage.without(victims)
    return _done(event, at_s, f"kill {', '.join(victims)}", note="" if well else "it was never done without")


async def _victims(stage: Stage, event: Kill) -> Mapping[str, int]:
    """Pids by name."""
    if event.all and event.target in stage.sizes:
        return {name: await stage.pid(name) for name in await stage.members(event.target)}
    name = await stage.name_of(event.target, event.which, deadly=True)
    return {name: await stage.pid(name)}


async def _stop(stage: Stage, event: Stop) -> Injected:
    name = await stage.name_of(event.target, event.which, deadly=False)
    pid = await stage.pid(name)
    at_s = time.time()
    signal_to(pid, signal.SIGSTOP)
    try:
        # Whoever is killed for standing still need not be waited for any longer.
        await _seen(lambda: not state_of(pid), time.monotonic() + event.for_s)
    finally:
        signal_to(pid, signal.SIGCONT)
    note = "" if state_of(pid) else "it was killed for it"
    if note:
        await stage.without({name: pid})
    return _done(event, at_s, f"stop {name} for {event.for_s:g} s", note=note)


async def _arm(stage: Stage, event: Arm, armed: asyncio.Event, over: asyncio.Event) -> Injected:
    """At the member that is meant; where it has nothing to do, at the others in turn."""
    fault = Fault(point=event.point, action=event.action, after=event.after, for_s=event.for_s)
    for turn in itertools.count(event.which):
        name = await stage.name_of(event.target, turn, deadly=event.action == "kill")
        pid, armed_s = await stage.pid(name), time.time()
        await stage.arm(name, fault)
        armed.set()
        until_s = math.inf if event.point in _OF_CHANGES else time.monotonic() + _TURN_S
        struck_s = await _struck(stage, name, pid, fault, armed_s, until_s, over)
        if not struck_s:
            times_s = [struck.at_s for struck in await stage.disarm(name) if struck.fault == fault]
            # It may have struck in the very last moment.
            struck_s = max((at_s for at_s in times_s if at_s >= armed_s), default=0.0)
            struck_s = struck_s or (time.time() if state_of(pid) in ("", "T") else 0.0)
        if struck_s or over.is_set():
            break
    if struck_s:
        await _aftermath(stage, event, name, pid)
    return Injected(
        at_s=struck_s or time.time(),
        what=f"{event.action} {name} at {event.point}",
        kind=event.kind,
        until_s=time.time(),
        fired=bool(struck_s),
        note="" if struck_s else "not reached",
    )


async def _struck(
    stage: Stage, name: str, pid: int, fault: Fault, armed_s: float, until_s: float, over: asyncio.Event
) -> float:
    """When it was; 0.0 if `over` or the time came first."""
    match fault.action:
        case "kill":
            return await _seen(lambda: not state_of(pid), until_s, over)
        case "stop":
            return await _seen(lambda: state_of(pid) == "T", until_s, over)
    while not over.is_set() and time.monotonic() < until_s:
        await asyncio.sleep(10 * _POLL_S)
        times_s = [struck.at_s for struck in await stage.struck(name) if struck.fault == fault]
        if times_s and times_s[-1] >= armed_s:
            return times_s[-1]
    return 0.0


async def _aftermath(stage: Stage, event: Arm, name: str, pid: int) -> None:
    """Until its effect is over."""
    match event.action:
        case "kill":
            await stage.without({name: pid})
        case "stop":
            await asyncio.sleep(event.for_s)
            signal_to(pid, signal.SIGCONT)
        case "delay":
            await asyncio.sleep(event.for_s)


async def _seen(condition: Callable[[], bool], until_s: float, over: asyncio.Event | None = None) -> float:
    """Look until it is true. Returns: when it was; 0.0 if `over`, or `until_s` of the monotonic clock, came first."""
    while time.monotonic() < until_s and not (over is not None and over.is_set()):
        if condition():
            return time.time()
        await asyncio.sleep(_POLL_S)
    return 0.0


async def _scale(stage: Stage, event: Scale) -> Injected:
    at_s = time.time()
    size = max(1, len(await stage.members(event.pool)) + event.by)
    try:
        await stage.client.scale(**{event.pool: size}, timeout_s=_CHANGE_S)
    except CallError as error:
        return _done(event, at_s, f"{event.pool} → {size}", fired=False, note=str(error))
    return _done(event, at_s, f"{event.pool} → {size}")


async def _cut(stage: Stage, event: Cut) -> Injected:
    cable, far = _cable(stage), await stage.far_members()
    at_s = time.time()
    cable.cut(event.way)
    if event.for_s is None:
        # Nobody on the other host is of any use from now on.
        well = await stage.without(far)
        return _done(event, at_s, event.kind, note=_lost(far) if well else "it was never done without the other host")
    await asyncio.sleep(event.for_s)
    cable.mend()
    healed_s = time.time()
    present = ids_of(await stage.status())
    lost = {name: pid for name, pid in far.items() if name not in present}
    for pid in lost.values():
        # What is left of them there ends, as soon as it hears.
        await _seen(lambda pid=pid: not state_of(pid), time.monotonic() + _GHOST_S)  # type: ignore[misc]
    ghosts = [name for name, pid in lost.items() if state_of(pid)]
    note = _lost(lost) + (f"; {', '.join(ghosts)} did not end" if ghosts else "")
    ended = f"; their processes ended {time.time() - healed_s:.1f} s after the cut did" if lost and not ghosts else ""
    return _done(event, at_s, f"{event.kind} for {event.for_s:g} s", note=note + ended)


async def _slow(stage: Stage, event: Slow) -> Injected:
    cable, far = _cable(stage), await stage.far_members()
    at_s = time.time()
    if event.mbit_per_s is not None:
        cable.throttle(event.mbit_per_s)
    if event.delay_s:
        cable.delay(event.delay_s)
    await asyncio.sleep(event.for_s)
    cable.mend()
    present = ids_of(await stage.status())
    return _done(event, at_s, f"{event.kind} for {event.for_s:g} s", note=_lost(far.keys() - present))


async def _kill_node(stage: Stage, event: KillNode) -> Injected:
    cable, far = _cable(stage), await stage.far_members()
    raylets = [pid for pid in cable.processes("far") if name_of(pid) == "raylet"]
    at_s = time.time()
    for pid in raylets:
        signal_to(pid, signal.SIGKILL)
    well = await stage.without(far)
    until_s = time.monotonic() + _GHOST_S
    for pid in far.values():
        await _seen(lambda pid=pid: not state_of(pid), until_s)  # type: ignore[misc]
    ghosts = [name for name, pid in far.items() if state_of(pid)]
    note = _lost(far) + (f"; {', '.join(ghosts)} did not end" if ghosts else "")
    return _done(event, at_s, event.kind, note=note if well else "it was never done without the other host")


async def _limit_memory(stage: Stage, event: LimitMemory) -> Injected:
    name = await stage.name_of(event.target, event.which, deadly=True)
    pid, at_s = await stage.pid(name), time.time()
    async with _threaded(memory_limit(pid, _HEADROOM_KIB)) as limit:
        await _seen(lambda: not state_of(pid), time.monotonic() + _GROWING_S)
        killed = limit.num_killed > 0
    what = f"limit memory of {name}"
    if not killed:
        return _done(event, at_s, what, fired=False, note=f"it took no more for {_GROWING_S:g} s")
    well = await stage.without({name: pid})
    return _done(event, at_s, what, note="the kernel killed it" if well else "it was never done without")


@contextlib.asynccontextmanager
async def _threaded(context: AbstractContextManager[T]) -> AsyncIterator[T]:
    """Begun and ended outside of the thread in which users note when a token came."""
    with contextlib.ExitStack() as stack:
        yield await asyncio.to_thread(stack.enter_context, context)
        await asyncio.to_thread(stack.close)


async def _fill_disk(stage: Stage, event: FillDisk) -> Injected:
    if (disk := stage.rig.disk) is None:
        raise ConfigError("events", "a disk to be filled", "a cluster that was started on a small one")
    async with _threaded(filled(disk)):
        at_s = time.time()
        await asyncio.sleep(event.for_s)
    return _done(event, at_s, f"{event.kind} for {event.for_s:g} s")


async def _jump_clock(stage: Stage, event: JumpClock) -> Injected:
    if (clock := stage.rig.clock) is None:
        raise ConfigError("events", "a clock that jumps", "a cluster that was started with one")
    at_s = time.time()
    clock.jump(clock.off_s + event.by_s)
    jumped = len(await asyncio.to_thread(clock.followers))
    what, note = event.kind, f"for {jumped} processes"
    if event.for_s is not None:
        await asyncio.sleep(event.for_s)
        clock.jump(clock.off_s - event.by_s)
        what += f" for {event.for_s:g} s"
    return _done(event, at_s, what, fired=jumped > 0, note=note)


def _cable(stage: Stage) -> Cable:
    """Raises: ConfigError."""
    if stage.rig.cable is None:
        raise ConfigError("events", "a fault of the cable between hosts", "a cluster on two of them", "--hosts 2")
    return stage.rig.cable


def _lost(names: Iterable[str]) -> str:
    return f"{', '.join(sorted(names)) or 'nobody'} was lost"


def _done(event: Event, at_s: float, what: str, fired: bool = True, note: str = "") -> Injected:
    return Injected(at_s=at_s, what=what, kind=event.kind, until_s=time.time(), fired=fired, note=note)
