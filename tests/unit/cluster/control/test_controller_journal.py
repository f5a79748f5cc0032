"""What a controller leaves to the next one: nothing is lost on its way, and nothing broken is believed."""

from __future__ import annotations

import dataclasses

import msgpack
import pytest

from cluster.autoscaling.decision_log import Logged
from cluster.change_record import ChangeRecord
from cluster.control.controller_journal import (
    ControllerJournal,
    NotedGroup,
    NotedMember,
    NotedRouting,
    pack_journal,
    unpack_journal,
)
from cluster.members import Endpoint
from octet.errors import WireError
from octet.ids import Epoch, WorkerId
from router.placement import from_physical, place_evenly
from router.routing import Routing

FIRST, SECOND = WorkerId("experts-0"), WorkerId("experts-7")


def noted(worker_id: WorkerId) -> NotedMember:
    endpoint = Endpoint(worker_id=worker_id, mailbox="", store="h:1", node_id="n", pid=7, pulse="tcp://h:2")
    return NotedMember(worker_id=worker_id, pool="experts", group="ab", index=1, endpoint=endpoint)


def routing(epoch: int, version: int) -> Routing:
    placement = place_evenly((1, 2), 4, 2, version)
    slots = placement.physical_to_logical.repeat(2, axis=1)
    replicated = from_physical(slots, placement.layers, 4, 2, version)
    return Routing(epoch=Epoch(epoch), shards=(FIRST, SECOND), placement=replicated, shunned=frozenset({SECOND}))


JOURNAL = ControllerJournal(
    port=8080,
    frontends={WorkerId("frontend-0"): "tcp://h:3"},
    sizes={"prefill": 1, "decode": 2, "experts": 2},
    numbers={"prefill": 1, "decode": 5, "experts": 8},
    next_epoch=12,
    groups=(NotedGroup(group="ab", pool="experts", size=2),),
    members=(noted(FIRST),),
    standby=(),
    routing=NotedRouting.of(routing(11, 3)),
    adopting=NotedRouting.of(routing(12, 4)),
    joining=(noted(SECOND),),
    num_redundant=4,
    under_way="scale",
    changes=(ChangeRecord(at_s=1.5, duration_s=0.5, kind="scale", reason="é", outcome="", succeeded=False),),
    actions=(Logged(at_s=3.0, pool="decode", current=1, wanted=2, target=2, reason="load"),),
)


def test_what_is_packed_comes_back() -> None:
    assert unpack_journal(pack_journal(JOURNAL)) == JOURNAL


def test_routing_comes_back_with_its_inverse_maps() -> None:
    wanted = routing(12, 4)
    assert JOURNAL.adopting is not None
    found = JOURNAL.adopting.routing()
    assert (found.epoch, found.shards, found.shunned) == (12, wanted.shards, wanted.shunned)
    assert found.placement.version == 4
    assert (found.placement.logical_to_physical == wanted.placement.logical_to_physical).all()
    assert (found.placement.num_replicas == wanted.placement.num_replicas).all()


@pytest.mark.parametrize(
    ("packed", "named"),
    [
        (b"", "no msgpack"),
        (pack_journal(JOURNAL)[:-1], "no msgpack"),
        (msgpack.packb([1]), "version"),
        (msgpack.packb({"version": 99}), "version"),
        (msgpack.packb({"version": 1, **dataclasses.asdict(JOURNAL), "port": "none"}), "port"),
        (msgpack.packb({"version": 1, **dataclasses.asdict(JOURNAL), "sizes": {"nowhere": 1}}), "sizes"),
        (msgpack.packb({"version": 1, "port": 1}), "frontends"),
    ],
)
def test_what_is_broken_is_an_error_that_says_where(packed: bytes, named: str) -> None:
    with pytest.raises(WireError, match=named):
        unpack_journal(packed)
