"""What members of a cluster tell about themselves."""

from __future__ import annotations

import dataclasses
from typing import Literal

from octet.ids import WorkerId
from octet.messages import WorkerLoad

Role = Literal["prefill", "decode"]
Pool = Literal["prefill", "decode", "experts"]
POOLS: tuple[Pool, ...] = ("prefill", "decode", "experts")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Endpoint:
    """Where a member can be reached."""

    worker_id: WorkerId
    mailbox: str
    store: str
    node_id: str
    pid: int
    pulse: str = ""
    """Address of its `octet.pulse.Pulse`, if it has one."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class MemberStatus:
    """One member, for the status page. Fields that its pool does not have are 0."""

    worker_id: WorkerId
    node_id: str
    pid: int
    state: str
    load: WorkerLoad | None = None
    resident_bytes: int = 0
    num_rows: int = 0
    num_slots: int = 0
    num_held: int = 0
    lanes: tuple[str, ...] = ()
    reason: str = ""
    severed: tuple[WorkerId, ...] = ()
    """Workers from or to which KV pages went over a channel that has broken."""
    refused: int = 0
    """Connections of strangers to its sockets."""
    dropped: int = 0
    """What came to its mailbox and was no message, or none that it takes."""
