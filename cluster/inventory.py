"""What a cluster has in Ray: named actors and reserved bundles; for checks that nothing is left, and for faults."""

from __future__ import annotations

import dataclasses

import ray
from ray.util import list_named_actors, placement_group_table

CONTROLLER = "controller"
"""The name of its actor."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Inventory:
    actors: frozenset[str]
    """Names of living actors of the namespace."""
    bundles: int
    """Of all placement groups of this Ray that are not removed, whoever made them."""
    unplaced: int = 0
    """Those of these groups for which no node has room, wholly or in part."""


def inventory(namespace: str) -> Inventory:
    """Needs this process's connection to Ray."""
    actors = list_named_actors(all_namespaces=True)
    groups = [group for group in placement_group_table().values() if group["state"] != "REMOVED"]
    return Inventory(
        actors=frozenset(actor["name"] for actor in actors if actor["namespace"] == namespace),
        bundles=sum(len(group["bundles"]) for group in groups),
        unplaced=sum(group["state"] != "CREATED" for group in groups),
    )


def kill_service(namespace: str, name: str) -> None:
    """End the process of an actor at once, whatever it does. Raises: ValueError if there is none of that name."""
    ray.kill(ray.get_actor(name, namespace=namespace))
