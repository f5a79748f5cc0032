"""What a cluster has in Ray: named actors and reserved bundles; for checks that nothing is left, and for faults."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Collection

import ray
from ray.util import list_named_actors, placement_group_table

from cluster.control.controller_journal import ControllerJournal, unpack_journal
from cluster.control.keeper import Keeper

CONTROLLER = "controller"
"""The name of its actor."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Inventory:
    actors: frozenset[str]
    """Names of living actors of the namespace."""
    bundles: int
    """Of all placement groups of this Ray that are not removed, whoever made them; but for those that are free beside a
    member of the cluster, as Ray takes a group back only as a whole."""
    unplaced: int = 0
    """Those of these groups for which no node has room, wholly or in part."""


def inventory(namespace: str) -> Inventory:
    """Needs this process's connection to Ray."""
    actors = list_named_actors(all_namespaces=True)
    table = {key: group for key, group in placement_group_table().items() if group["state"] != "REMOVED"}
    groups, journal = list(table.values()), Keeper(namespace).read()
    free = num_free(unpack_journal(journal), table.keys()) if journal else 0
    return Inventory(
        actors=frozenset(actor["name"] for actor in actors if actor["namespace"] == namespace),
        bundles=sum(len(group["bundles"]) for group in groups) - free,
        unplaced=sum(group["state"] != "CREATED" for group in groups),
    )


def num_free(journal: ControllerJournal, reserved: Collection[str]) -> int:
    """Bundles that are kept for the next member because their group has others. Pure.

    Args:
        reserved: ids of the placement groups that there are.
    """
    members = (*journal.members, *journal.standby, *journal.joining)
    used = collections.Counter(group for group, _ in {(member.group, member.index) for member in members})
    known = [group for group in journal.groups if group.group in reserved and used[group.group]]
    return sum(group.size - used[group.group] for group in known)


def kill_service(namespace: str, name: str) -> None:
    """End the process of an actor at once, whatever it does. Raises: ValueError if there is none of that name."""
    ray.kill(ray.get_actor(name, namespace=namespace))
