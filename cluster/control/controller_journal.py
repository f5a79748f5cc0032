"""What a controller writes down for the one that takes its place, as a value and as bytes. Pure.

Whatever members can be asked for is not in it. msgpack: what is read is checked field by field, and never evaluated.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import msgpack
import numpy as np
import pydantic

from cluster.autoscaling.decision_log import Logged
from cluster.change_record import ChangeRecord
from cluster.members import Endpoint, Pool
from octet.errors import WireError
from octet.ids import Epoch, WorkerId
from router.placement import from_physical
from router.routing import Routing

_VERSION = 1


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class NotedGroup:
    """A placement group, by Ray's id in hexadecimal."""

    group: str
    pool: Pool
    size: int


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class NotedMember:
    """A process that was started and is of use. Its actor has its id for a name."""

    worker_id: WorkerId
    pool: Pool
    group: str
    index: int
    endpoint: Endpoint


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class NotedRouting:
    """A `Routing`."""

    epoch: int
    shards: tuple[WorkerId, ...]
    shunned: tuple[WorkerId, ...]
    version: int
    layers: tuple[int, ...]
    num_experts: int
    physical: tuple[tuple[int, ...], ...]
    """The logical expert of each physical slot, by layer."""

    @staticmethod
    def of(routing: Routing) -> NotedRouting:
        placement = routing.placement
        return NotedRouting(
            epoch=routing.epoch,
            shards=routing.shards,
            shunned=tuple(sorted(routing.shunned)),
            version=placement.version,
            layers=placement.layers,
            num_experts=placement.num_experts,
            physical=tuple(map(tuple, placement.physical_to_logical.tolist())),
        )

    def routing(self) -> Routing:
        """Raises: ValueError if it is none."""
        slots = np.array(self.physical, dtype=np.int32).reshape(len(self.layers), -1)
        placement = from_physical(slots, self.layers, self.num_experts, len(self.shards), self.version)
        return Routing(
            epoch=Epoch(self.epoch), shards=self.shards, placement=placement, shunned=frozenset(self.shunned)
        )


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ControllerJournal:
    """Everything that a controller goes on with."""

    port: int
    frontends: Mapping[WorkerId, str]
    """Mailboxes."""
    sizes: Mapping[Pool, int]
    numbers: Mapping[Pool, int]
    """The next of each pool: ids are given once."""
    next_epoch: int
    groups: tuple[NotedGroup, ...]
    members: tuple[NotedMember, ...]
    standby: tuple[NotedMember, ...]
    routing: NotedRouting
    adopting: NotedRouting | None = None
    """Some workers may route by it already: there is no way back."""
    joining: tuple[NotedMember, ...] = ()
    """Shards that are members once it is adopted."""
    num_redundant: int = 0
    under_way: str = ""
    """The kind of the change that was being made."""
    changes: tuple[ChangeRecord, ...] = ()
    actions: tuple[Logged, ...] = ()
    latest: tuple[Logged, ...] = ()


_schema: pydantic.TypeAdapter[ControllerJournal] = pydantic.TypeAdapter(ControllerJournal)


def pack_journal(journal: ControllerJournal) -> bytes:
    packed: bytes = msgpack.packb({"version": _VERSION, **dataclasses.asdict(journal)})
    return packed


def unpack_journal(packed: bytes) -> ControllerJournal:
    """Raises: WireError naming the field, if it is no journal, or one of another version."""
    try:
        tree: Any = msgpack.unpackb(packed, use_list=False, strict_map_key=True)
    except (ValueError, msgpack.exceptions.UnpackException) as error:
        raise WireError(f"controller's journal: {len(packed)} bytes are no msgpack: {error}") from error
    if not isinstance(tree, dict) or tree.pop("version", None) != _VERSION:
        raise WireError(f"controller's journal: found another form, expected version {_VERSION}")
    try:
        return _schema.validate_python(tree)
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"]))
        raise WireError(f"controller's journal: '{field}': {first['msg']}") from error
