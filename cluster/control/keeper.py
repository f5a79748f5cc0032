"""Where the controller's journal is kept: with Ray's GCS, which lives as long as any actor of the cluster can be found.

One small value for each cluster, written whole. The controller is the only one that writes it, one at a time. While the
GCS is gone, what was written last waits for its return, and the controller does not.
"""

from __future__ import annotations

import logging
from collections.abc import Collection

import ray
from ray.experimental import internal_kv
from ray.util import list_named_actors, placement_group_table, remove_placement_group
from ray.util.placement_group import PlacementGroup

from cluster.control.errands import Errands
from cluster.members import POOLS

_log = logging.getLogger(__name__)

_SPACE = b"octet"
_OURS = frozenset({*POOLS, "frontend", "router"})
"""How names of actors begin."""


class Keeper:
    """Of one cluster."""

    def __init__(self, namespace: str) -> None:
        self._namespace, self._key = namespace, f"controller/{namespace}".encode()
        self._errands = Errands()
        self._newest = b""

    def write(self, packed: bytes) -> None:
        """In place of what was there; a millisecond, or a quarter of a second where the GCS does not answer."""
        self._newest = packed
        if not self._errands.run(lambda: self._put(packed)):
            _log.warning("the GCS does not answer; the controller's journal is written when it does")

    def read(self) -> bytes | None:
        found: bytes | None = internal_kv._internal_kv_get(self._key, namespace=_SPACE)
        return found

    def erase(self) -> None:
        self._newest = b""
        self._errands.run(lambda: internal_kv._internal_kv_del(self._key, namespace=_SPACE))

    def give_back(self, group: PlacementGroup) -> None:
        """Remove a placement group, now or when the GCS answers."""
        self._errands.run(lambda: remove_placement_group(group))

    def give_back_named(self, names: Collection[str]) -> None:
        """The same with those that may have been made: whoever asked for them has had no answer."""

        def remove() -> None:
            for group, info in placement_group_table().items():
                if info["name"] in names and info["state"] != "REMOVED":
                    remove_placement_group(group_of(group))

        self._errands.run(remove)

    def _put(self, packed: bytes) -> None:
        if packed is self._newest:
            internal_kv._internal_kv_put(self._key, packed, overwrite=True, namespace=_SPACE)

    def group_name(self, unique: str) -> str:
        """Of a placement group, so that it is known whose it is."""
        return f"octet/{self._namespace}/{unique}"

    def actors(self) -> set[str]:
        """Names of this cluster's living members and services."""
        found = list_named_actors(all_namespaces=True)
        names = {actor["name"] for actor in found if actor["namespace"] == self._namespace}
        return {name for name in names if name.partition("-")[0] in _OURS}

    def groups(self) -> set[str]:
        """Ids of this cluster's placement groups, placed or not."""
        prefix = self.group_name("")
        found = placement_group_table().items()
        return {group for group, info in found if info["name"].startswith(prefix) and info["state"] != "REMOVED"}

    def sweep(self, actors: frozenset[str] = frozenset(), groups: frozenset[str] = frozenset()) -> set[str]:
        """Kill all actors but these, and the controller, and remove all placement groups but these.

        Returns: names of the actors that were killed.
        """
        strangers = self.actors() - actors
        for name in strangers:
            try:
                ray.kill(ray.get_actor(name, namespace=self._namespace))
            except ValueError:
                # It has ended by itself meanwhile.
                continue
        for group in self.groups() - groups:
            remove_placement_group(group_of(group))
        return strangers


def group_of(group: str) -> PlacementGroup:
    """By its id in hexadecimal."""
    return PlacementGroup(ray.PlacementGroupID.from_hex(group))
