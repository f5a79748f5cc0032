from __future__ import annotations

import dataclasses
import re

import pytest

from cluster.inventory import Inventory
from octet.v1 import octet_pb2 as pb
from ops.bench.changes.leftovers import MAX_MORE, SERVICES, Holdings, leftovers

CLEAN = Holdings(
    status=pb.GetStatusResponse(
        pools=[
            pb.Pool(
                name="decode",
                members=[pb.Member(worker_id="decode-0", pid=7, kv_pages_total=9, kv_pages_free=9)],
            ),
            pb.Pool(name="experts", members=[pb.Member(worker_id="experts-3", pid=8)]),
        ]
    ),
    ray=Inventory(actors=SERVICES | {"decode-0", "experts-3"}, bundles=2),
    processes={7: "DecodeWorker", 8: "ExpertShard", 9: "Router"},
    handles={"decode-0": (40, 20), "experts-3": (30, 10)},
)


def holding(**fields: int) -> pb.GetStatusResponse:
    status = pb.GetStatusResponse()
    status.CopyFrom(CLEAN.status)
    member = status.pools[0].members[0]
    for name, value in fields.items():
        setattr(status if name == "live_requests" else member, name, value)
    return status


def test_what_members_need_is_not_left_over() -> None:
    assert leftovers(CLEAN, CLEAN) == []


def test_what_belongs_to_another_cluster_is_not_left_over_by_this_one() -> None:
    both = Inventory(actors=CLEAN.ray.actors, bundles=3)
    shared = dataclasses.replace(CLEAN, processes={**CLEAN.processes, 20: "ExpertShard"}, ray=both)
    assert leftovers(shared, shared) == []
    # A member that was there before and is none any more has to be gone.
    fewer = pb.GetStatusResponse(pools=[CLEAN.status.pools[0]])
    ray = Inventory(actors=SERVICES | {"decode-0"}, bundles=2)
    (found,) = leftovers(shared, dataclasses.replace(shared, status=fewer, ray=ray))
    assert found == "processes of no member: ExpertShard (8)"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"ray": Inventory(actors=SERVICES | {"decode-0", "experts-3", "decode-1"}, bundles=2)}, "decode-1"),
        ({"ray": Inventory(actors=CLEAN.ray.actors, bundles=3)}, "3 bundles are reserved for 2 members"),
        ({"processes": {**CLEAN.processes, 10: "ExpertShard"}}, r"ExpertShard \(10\)"),
        ({"status": holding(live_requests=2)}, "2 live requests"),
        ({"status": holding(kv_pages_free=6)}, "decode-0: 3 pages"),
        ({"status": holding(leases=1)}, "1 leases"),
        ({"handles": {"decode-0": (40 + MAX_MORE + 1, 20)}}, "open files"),
        ({"handles": {"decode-0": (40, 20 + MAX_MORE + 1)}}, "threads"),
    ],
)
def test_what_nobody_needs_is_named(change: dict[str, object], said: str) -> None:
    (found,) = leftovers(CLEAN, dataclasses.replace(CLEAN, **change))  # type: ignore[arg-type]
    assert re.search(said, found)


def test_more_files_than_a_little_are_a_leak_only_where_the_process_was_there_before() -> None:
    newcomer = dataclasses.replace(CLEAN, handles={**CLEAN.handles, "experts-9": (500, 500)})
    assert leftovers(CLEAN, newcomer) == []
