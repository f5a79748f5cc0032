"""What a plan has to fit: the shards there are, and what moving weights may cost."""

from __future__ import annotations

import dataclasses

from octet.errors import ConfigError


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Topology:
    """The expert shards, in the order of the placement's.

    Raises: ConfigError if the parts contradict each other.
    """

    slots: tuple[int, ...]
    """Slots per layer that each shard offers. A shard that drains, or is lost, offers 0 and keeps its number."""
    nodes: tuple[int, ...] = ()
    """The node, or other failure domain, of each shard, from 0 on. Empty puts every shard on a node of its own."""
    num_groups: int = 1
    """Experts come in so many groups of consecutive ids. With several, each group stays on one node if the nodes have
    the slots for it: the gate's group limit then bounds the nodes that a token visits."""
    min_domains: int = 1
    """2 for survival: every expert on two nodes, if there are slots for it, so that no node takes one with it."""

    def __post_init__(self) -> None:
        if not self.nodes:
            object.__setattr__(self, "nodes", tuple(range(len(self.slots))))
        if not self.slots or min(self.slots) < 0 or max(self.slots) == 0:
            raise ConfigError("topology.slots", self.slots, "0 or more per shard, and a shard that has some")
        if len(self.nodes) != len(self.slots) or min(self.nodes) < 0:
            raise ConfigError("topology.nodes", self.nodes, f"a number from 0 for each of {len(self.slots)} shards")
        if self.num_groups < 1:
            raise ConfigError("topology.num_groups", self.num_groups, "at least 1")
        if self.min_domains not in (1, 2):
            raise ConfigError("topology.min_domains", self.min_domains, "1 or 2")
        if self.min_domains == 2 and self.num_groups > 1:
            raise ConfigError(
                "topology.min_domains", 2, "1 where groups stay on one node each", "set num_groups to 1 for survival"
            )

    @property
    def num_shards(self) -> int:
        return len(self.slots)

    @property
    def num_nodes(self) -> int:
        return max(self.nodes) + 1

    @property
    def slots_per_shard(self) -> int:
        return max(self.slots)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """When moving weights pays. Loads, gains and costs are in one unit, such as token rows in a telemetry window."""

    max_moves: int | None = None
    """Most slots filled by one plan, over all layers; None is no limit. What saves an expert comes on top."""
    move_cost: float = 0.0
    """The load that one shard could have served while it fills one slot."""
    horizon: float = 1.0
    """For how many windows like this one the loads are expected to hold."""

    def __post_init__(self) -> None:
        if self.max_moves is not None and self.max_moves < 0:
            raise ConfigError("budget.max_moves", self.max_moves, "0 or more, or null")
        if self.move_cost < 0:
            raise ConfigError("budget.move_cost", self.move_cost, "0 or more")
        if self.horizon <= 0:
            raise ConfigError("budget.horizon", self.horizon, "more than 0")
