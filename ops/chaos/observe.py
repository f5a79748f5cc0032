"""Facts about a cluster: from its status, from Ray, and from the processes of this machine."""

from __future__ import annotations

import collections
import pathlib
import time
from collections.abc import Collection, Iterator, Mapping

from cluster.inventory import Inventory
from octet.v1 import octet_pb2 as pb
from ops.chaos.history import Facts


def facts_of(
    status: pb.GetStatusResponse,
    ray: Inventory,
    processes: Mapping[int, str],
    ports: int,
    num_experts: int,
    num_redundant: int,
) -> Facts:
    """Pure.

    Args:
        processes: actors' classes by pid.
        num_experts: over all layers.
        num_redundant: likewise.
    """
    members = [member for pool in status.pools for member in pool.members if member.state != "STANDBY"]
    return Facts(
        at_s=time.time(),
        state=status.state,
        epoch=status.epoch,
        placement_version=status.placement_version,
        sizes={pool.name: sum(m.state != "STANDBY" for m in pool.members) for pool in status.pools},
        live_requests=status.live_requests,
        pages=sum(member.kv_pages_total - member.kv_pages_free for member in members),
        leases=sum(member.leases for member in members),
        sequences=sum(member.running + member.waiting for member in members),
        slots=sum(member.num_held for member in members),
        least_slots=num_experts,
        most_slots=num_experts + num_redundant,
        actors=collections.Counter(name.partition("-")[0] for name in ray.actors),
        bundles=ray.bundles,
        unplaced=ray.unplaced,
        processes=collections.Counter(processes.values()),
        ports=ports,
    )


def state_of(pid: int) -> str:
    """The letter of /proc: R, S, D, T for stopped; an empty string where it is gone, or a zombie."""
    try:
        state = pathlib.Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()[0]
    except OSError:
        return ""
    return "" if state in "ZX" else state


def name_of(pid: int) -> str:
    """Of its program, in at most 15 characters; empty where it is gone."""
    try:
        return pathlib.Path(f"/proc/{pid}/comm").read_text(errors="replace").strip()
    except OSError:
        return ""


_LISTENING = "0A"


def num_ports(pids: Collection[int]) -> int:
    """TCP sockets on which these processes listen."""
    hosts = {host: pid for pid in pids if (host := _network(pid))}
    listening = {inode for pid in hosts.values() for inode in _listening(pid)}
    return sum(link in listening for pid in pids for link in _links(pid))


def _network(pid: int) -> str:
    """The network namespace of a process, each of which has sockets of its own; empty if it is gone."""
    try:
        return str(pathlib.Path(f"/proc/{pid}/ns/net").readlink())
    except OSError:
        return ""


def _listening(pid: int) -> Iterator[str]:
    """In the network namespace of this process."""
    for table in ("tcp", "tcp6"):
        try:
            lines = pathlib.Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]
        except OSError:
            # It has just ended.
            continue
        for line in lines:
            fields = line.split()
            if fields[3] == _LISTENING:
                yield f"socket:[{fields[9]}]"


def _links(pid: int) -> list[str]:
    found = []
    try:
        for file in pathlib.Path(f"/proc/{pid}/fd").iterdir():
            try:
                found.append(str(file.readlink()))
            except OSError:
                # It was closed meanwhile.
                continue
    except OSError:
        # So is the process.
        return []
    return found
