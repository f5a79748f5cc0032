"""Where each expert is: an immutable value with a version.

Shapes: `L` mixture-of-experts layers, `E` logical experts, `S` physical slots over all shards, `R` replicas.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Sequence

import numpy as np
import numpy.typing as npt

from octet.errors import ConfigError
from octet.ids import PlacementVersion

EMPTY = -1
"""A slot without an expert, or a replica that does not exist."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """Every shard has `slots_per_shard` slots per layer; physical slot `s` is slot `s % slots_per_shard` of shard
    `s // slots_per_shard`. `layers[i]` is the decoder layer that row `i` describes."""

    version: PlacementVersion
    layers: tuple[int, ...]
    num_shards: int
    physical_to_logical: npt.NDArray[np.int32]
    """`[L, S]`, EMPTY where a slot holds nothing."""
    logical_to_physical: npt.NDArray[np.int32]
    """`[L, E, R]`, EMPTY behind the last replica."""
    num_replicas: npt.NDArray[np.int32]
    """`[L, E]`, at least 1."""

    @property
    def slots_per_shard(self) -> int:
        return int(self.physical_to_logical.shape[1]) // self.num_shards

    @property
    def num_experts(self) -> int:
        return int(self.num_replicas.shape[1])

    def held_by(self, shard: int) -> npt.NDArray[np.int32]:
        """Logical experts `[L, slots_per_shard]` of one shard."""
        size = self.slots_per_shard
        return self.physical_to_logical[:, shard * size : (shard + 1) * size]

    def without(self, shards: Collection[int]) -> Placement:
        """The same, but that an expert's slots on these shards are no replicas of it if others are; all stay held."""
        if not shards:
            return self
        slots_LER, size = self.logical_to_physical.copy(), self.slots_per_shard
        spared_LER = (slots_LER != EMPTY) & np.isin(slots_LER // size, list(shards))
        # An expert that only these shards hold is still asked of them.
        spared_LER &= (slots_LER != EMPTY).sum(2, keepdims=True) > spared_LER.sum(2, keepdims=True)
        slots_LER[spared_LER] = EMPTY
        # Replicas first, in their order.
        order = np.argsort(slots_LER == EMPTY, axis=2, kind="stable")
        slots_LER = np.take_along_axis(slots_LER, order, axis=2)
        num_LE = (slots_LER != EMPTY).sum(2).astype(np.int32)
        return dataclasses.replace(self, logical_to_physical=slots_LER, num_replicas=num_LE)


def place_evenly(layers: Sequence[int], num_experts: int, num_shards: int, version: int = 1) -> Placement:
    """Each expert once, in contiguous runs whose lengths differ by at most one.

    Raises: ConfigError if there are more shards than experts.
    """
    if num_shards > num_experts:
        raise ConfigError("pools.experts.size", num_shards, f"at most the model's {num_experts} experts")
    runs = np.array_split(np.arange(num_experts, dtype=np.int32), num_shards)
    per_shard = max(len(run) for run in runs)
    row = np.full(num_shards * per_shard, EMPTY, dtype=np.int32)
    for shard, run in enumerate(runs):
        row[shard * per_shard : shard * per_shard + len(run)] = run
    return from_physical(np.tile(row, (len(layers), 1)), layers, num_experts, num_shards, version)


def from_physical(
    physical_to_logical: npt.NDArray[np.int32], layers: Sequence[int], num_experts: int, num_shards: int, version: int
) -> Placement:
    """Derive the inverse maps. Raises: ValueError if an expert has no slot or a number is out of range."""
    num_layers, num_slots = physical_to_logical.shape
    if num_layers != len(layers) or num_slots % num_shards:
        raise ValueError(
            f"{num_layers} rows of {num_slots} slots do not fit {len(layers)} layers on {num_shards} shards"
        )
    if physical_to_logical.size and not (
        physical_to_logical.min() >= EMPTY and physical_to_logical.max() < num_experts
    ):
        raise ValueError(f"a slot holds an expert outside 0..{num_experts - 1}")
    held = physical_to_logical != EMPTY
    layer_of, slot_of = held.nonzero()
    expert_of = physical_to_logical[held]
    num_replicas = np.zeros((num_layers, num_experts), dtype=np.int32)
    np.add.at(num_replicas, (layer_of, expert_of), 1)
    if num_replicas.size and num_replicas.min() == 0:
        layer, expert = np.argwhere(num_replicas == 0)[0]
        raise ValueError(f"expert {expert} of layer {layers[layer]} has no slot")
    max_replicas = int(num_replicas.max()) if num_replicas.size else 1
    logical_to_physical = np.full((num_layers, num_experts, max_replicas), EMPTY, dtype=np.int32)
    # Sorted by layer and expert, the slots of an expert are a run that begins where the counts before it add up to.
    order = np.lexsort((slot_of, expert_of, layer_of))
    replica_of = np.arange(len(order)) - np.repeat(num_replicas.cumsum() - num_replicas.ravel(), num_replicas.ravel())
    logical_to_physical[layer_of[order], expert_of[order], replica_of] = slot_of[order]
    for array in (physical_to_logical, logical_to_physical, num_replicas):
        array.setflags(write=False)
    return Placement(
        version=PlacementVersion(version),
        layers=tuple(layers),
        num_shards=num_shards,
        physical_to_logical=physical_to_logical,
        logical_to_physical=logical_to_physical,
        num_replicas=num_replicas,
    )
