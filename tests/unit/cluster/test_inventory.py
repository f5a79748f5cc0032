"""What counts as reserved."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from cluster.control.controller_journal import NotedGroup, NotedMember
from cluster.inventory import num_free
from octet.ids import WorkerId
from tests.unit.cluster.control.test_controller_journal import JOURNAL, noted

ALONE = dataclasses.replace(noted(WorkerId("experts-1")), group="ab", index=0)


@pytest.mark.parametrize(
    ("members", "size", "reserved", "free"),
    [
        ((ALONE,), 3, {"ab"}, 2),
        ((ALONE, dataclasses.replace(ALONE, index=2)), 3, {"ab"}, 1),
        ((ALONE, ALONE), 2, {"ab"}, 1),
        # Nobody is in it: it should have been given back.
        ((), 2, {"ab"}, 0),
        # It is gone.
        ((ALONE,), 2, set(), 0),
    ],
)
def test_only_what_is_free_beside_a_member_is_not_counted(
    members: tuple[NotedMember, ...], size: int, reserved: set[str], free: int
) -> None:
    group = NotedGroup(group="ab", pool="experts", size=size)
    journal = dataclasses.replace(JOURNAL, groups=(group,), members=members, joining=())
    assert num_free(journal, reserved) == free


@pytest.mark.parametrize("where", ["members", "standby", "joining"])
def test_a_place_is_held_by_who_serves_waits_or_joins(where: str) -> None:
    group = NotedGroup(group="ab", pool="experts", size=3)
    journal = dataclasses.replace(JOURNAL, groups=(group,), members=(), standby=(), joining=())
    held: dict[str, Any] = {where: (ALONE,)}
    assert num_free(dataclasses.replace(journal, **held), {"ab"}) == 2
