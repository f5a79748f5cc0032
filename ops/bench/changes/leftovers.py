"""What a cluster holds, and what of it should not be there any more."""

from __future__ import annotations

import asyncio
import dataclasses
import pathlib
import time
from collections.abc import Mapping

from cluster.inventory import Inventory, inventory
from octet.v1 import octet_pb2 as pb
from ops.bench.changes.stage import Stage
from ops.bench.soak import family_memory

SERVICES = frozenset({"controller", "frontend-0", "router"})
_POOL_CLASSES = ("PrefillWorker", "DecodeWorker", "ExpertShard")
_SERVICE_CLASSES = ("FrontendActor", "Router", "Controller")
_SETTLE_S, _POLL_S = 30.0, 0.5
MAX_MORE = 10
"""Open files, or threads, that a process may have more after any number of changes: thread pools fill."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Holdings:
    """Of a cluster at one moment."""

    status: pb.GetStatusResponse
    ray: Inventory
    processes: Mapping[int, str]
    """Of actors, by pid: what Ray calls them."""
    handles: Mapping[str, tuple[int, int]]
    """Open files (sockets are files) and threads of each process that is a member or a service."""


async def take_stock(stage: Stage) -> Holdings:
    """Of this process's own cluster on its own Ray."""
    status = await stage.client.status()
    pids = {member.worker_id: member.pid for pool in status.pools for member in pool.members}
    processes = actor_processes()
    pids |= {name: pid for pid, name in processes.items() if name in _SERVICE_CLASSES}
    return Holdings(
        status=status,
        ray=inventory(stage.cluster.plan.config.ray.namespace),
        processes=processes,
        handles={name: found for name, pid in pids.items() if (found := _handles(pid)) is not None},
    )


async def leftovers_once_settled(stage: Stage, before: Holdings) -> tuple[list[str], Holdings]:
    """What is there too much, after giving it time to go."""
    deadline_s = time.monotonic() + _SETTLE_S
    while True:
        after = await take_stock(stage)
        found = leftovers(before, after)
        if not found or time.monotonic() > deadline_s:
            return found, after
        await asyncio.sleep(_POLL_S)


def leftovers(before: Holdings, after: Holdings) -> list[str]:
    """What is held beyond what the members need. Pure."""
    members = {m.worker_id: m for pool in after.status.pools for m in pool.members}
    found = []
    if strangers := after.ray.actors - members.keys() - SERVICES:
        found.append(f"actors that are no members: {', '.join(sorted(strangers))}")
    # What other clusters on the same Ray hold was there before, and belonged to no member then either.
    members_before = {member.pid for pool in before.status.pools for member in pool.members}
    bundles = after.ray.bundles - (before.ray.bundles - len(members_before))
    if bundles != len(members):
        found.append(f"{bundles} bundles are reserved for {len(members)} members")
    known = {member.pid for member in members.values()} | (before.processes.keys() - members_before)
    orphans = {pid: name for pid, name in after.processes.items() if pid not in known and name in _POOL_CLASSES}
    if orphans:
        found.append(f"processes of no member: {', '.join(f'{name} ({pid})' for pid, name in orphans.items())}")
    if after.status.live_requests:
        found.append(f"{after.status.live_requests} live requests")
    for member in members.values():
        pages = member.kv_pages_total - member.kv_pages_free
        if pages or member.leases or member.running or member.waiting:
            found.append(f"{member.worker_id}: {pages} pages, {member.leases} leases, {member.running} sequences run")
    for name, (files, threads) in after.handles.items():
        files_before, threads_before = before.handles.get(name, (files, threads))
        if files - files_before > MAX_MORE or threads - threads_before > MAX_MORE:
            found.append(f"{name}: {files_before} → {files} open files, {threads_before} → {threads} threads")
    return found


def actor_processes() -> dict[int, str]:
    """Processes below this one that Ray names after an actor of Octet, and the class of it."""
    found = {}
    for pid, _ in family_memory():
        try:
            title = pathlib.Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace")
        except OSError:
            continue
        name = title.removeprefix("ray::").partition(".")[0].partition("\0")[0].strip()
        if title.startswith("ray::") and name in (*_POOL_CLASSES, *_SERVICE_CLASSES):
            found[pid] = name
    return found


def _handles(pid: int) -> tuple[int, int] | None:
    process = pathlib.Path(f"/proc/{pid}")
    try:
        return len(list((process / "fd").iterdir())), len(list((process / "task").iterdir()))
    except OSError:
        return None
