"""The balancer: from expert loads, shards and the placement that is, to the placement that should be.

Shapes: `L` layers, `E` experts, `S` slots, `N` edits of a search.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from octet.errors import ConfigError
from router.balancing.allot import allot, replay
from router.balancing.groups import home_nodes
from router.balancing.measure import Floats, balancedness, table_loads
from router.balancing.pack import ANYWHERE, BLOCKED, pack_layers
from router.balancing.search import search_layers
from router.balancing.survive import spread_layers
from router.balancing.tables import Table, fitted
from router.balancing.topology import Budget, Topology
from router.placement import EMPTY, Placement, from_physical

_TOLERANCE = 1e-3
"""A layer whose largest shard load is this close to the mean is level."""
_MAX_EDITS = 128
"""Of the search in one layer."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Move:
    """One slot to fill with an expert's weights."""

    layer: int
    """The decoder layer."""
    expert: int
    slot: int
    """Physical slot of the new placement."""
    replaces: int
    """The expert in that slot now, or EMPTY."""
    gain: float
    """What it takes off its layer's largest shard load per window: an equal part of what the layer's moves do together.
    Infinite where the expert would otherwise be lost, or on fewer nodes than the topology asks for."""


class Rebalance(NamedTuple):
    placement: Placement
    """The current one itself where nothing is to change."""
    moves: tuple[Move, ...]
    """Largest gains first. A layer's moves are worth their gain only together."""
    reason: str


def plan(
    loads_LE: npt.ArrayLike,
    topology: Topology,
    budget: Budget,
    current: Placement | None,
    layers: Sequence[int] | None = None,
    free_LX: Table | None = None,
) -> Rebalance:
    """The placement that levels these loads, within the budget.

    Without a current placement every slot is filled, greedily as DeepSeek's EPLB does it (`pack`), and a local search
    goes on from there. With one, the search starts from it and its edits are made while they pay: a move has to take
    more than `budget.move_cost / budget.horizon` off its layer's largest shard load. Layers run one after the other,
    so the sum of their largest loads is what a step waits for. Experts that the topology leaves without a slot, or off
    their node, are placed whatever it costs. Loads are predicted with equal shares for replicas, which the choice of
    replicas for each batch (`router.replica_choice`) betters.

    Args:
        loads_LE: load of each logical expert per window, such as token rows.
        layers: decoder layers of the rows where there is no current placement; 0, 1, … if not given.
        free_LX: how many experts each shard can take in, as many as it likes if not given. Only an expert that the
            topology leaves without a slot is placed all the same.

    Raises: ConfigError if there are too few slots, or loads, topology and placement do not fit each other.
    """
    loads_LE = np.ascontiguousarray(loads_LE, dtype=np.float64)
    _check(loads_LE, topology, current)
    start_LS = fitted(current, topology, len(loads_LE))
    homes_LE = home_nodes(loads_LE, topology, start_LS)
    # Whatever places an expert counts it down.
    free_LX = np.full((len(loads_LE), topology.num_shards), loads_LE.size) if free_LX is None else free_LX.copy()
    packed_LS = _packed(start_LS, homes_LE, loads_LE, topology, free_LX, fill=current is None)
    table_LS = _improved(packed_LS, homes_LE, loads_LE, topology, free_LX, None if current is None else budget)
    held_LS = np.where(table_LS == BLOCKED, EMPTY, table_LS).astype(np.int32)
    level = _balancedness(table_LS, loads_LE, topology)
    if current is None:
        placement = from_physical(
            held_LS, tuple(layers or range(len(loads_LE))), loads_LE.shape[1], topology.num_shards, version=1
        )
        return Rebalance(placement, (), f"a first placement, of balancedness {level:.4f}")
    # Other shards may have as many slots in all.
    if current.num_shards == topology.num_shards and np.array_equal(held_LS, current.physical_to_logical):
        return Rebalance(current, (), f"no move pays: balancedness stays {level:.4f}")
    placement = from_physical(
        held_LS, current.layers, current.num_experts, topology.num_shards, version=current.version + 1
    )
    moves = _moves(start_LS, packed_LS, table_LS, loads_LE, topology, current.layers)
    was = _balancedness(packed_LS, loads_LE, topology)
    return Rebalance(
        placement, moves, f"{len(moves)} of {held_LS.size} slots are filled: balancedness {was:.4f} → {level:.4f}"
    )


def _check(loads_LE: Floats, topology: Topology, current: Placement | None) -> None:
    if loads_LE.ndim != 2 or not np.isfinite(loads_LE).all() or (loads_LE < 0).any():
        raise ConfigError("loads_LE", f"an array of shape {loads_LE.shape}", "[layers, experts], finite and 0 or more")
    num_layers, num_experts = loads_LE.shape
    if (room := sum(min(slots, num_experts) for slots in topology.slots)) < num_experts:
        raise ConfigError(
            "topology.slots", f"room for {room}", f"a slot for each of {num_experts} experts", "add shards"
        )
    if current is None:
        return
    if (len(current.layers), current.num_experts) != loads_LE.shape:
        expected = f"[{len(current.layers)}, {current.num_experts}] as in the placement"
        raise ConfigError("loads_LE", f"shape {[num_layers, num_experts]}", expected)
    if current.num_shards > topology.num_shards:
        raise ConfigError(
            "topology.slots",
            f"{topology.num_shards} shards",
            f"the {current.num_shards} of the placement",
            "a shard that leaves offers 0 slots",
        )


def _packed(
    start_LS: Table, homes_LE: Table, loads_LE: Floats, topology: Topology, free_LX: Table, fill: bool
) -> Table:
    """Every expert has a slot, on its node; and a second node, where that is asked for. Takes what it fills off
    `free_LX`."""
    table_LS, nodes = start_LS.copy(), np.array(topology.nodes)
    homes_LS = np.take_along_axis(homes_LE, np.maximum(table_LS, 0), axis=1)
    strays_LS = (homes_LS != ANYWHERE) & (homes_LS != np.repeat(nodes, topology.slots_per_shard))
    table_LS[strays_LS & (table_LS >= 0)] = EMPTY
    spread = topology.min_domains == 2
    pack_layers(table_LS, topology.slots_per_shard, nodes, homes_LE, spread, loads_LE, fill)
    arrived_LS = (table_LS != start_LS) & (table_LS >= 0)
    free_LX -= arrived_LS.reshape(*free_LX.shape, -1).sum(2)
    if spread:
        spread_layers(table_LS, topology.slots_per_shard, nodes, loads_LE, free_LX)
    return table_LS


def _improved(
    packed_LS: Table, homes_LE: Table, loads_LE: Floats, topology: Topology, free_LX: Table, budget: Budget | None
) -> Table:
    """The local search of every layer, and of its edits those that the budget allows; all of them without one."""
    num_layers, num_slots = packed_LS.shape
    room = num_layers * num_slots if budget is None or budget.max_moves is None else budget.max_moves
    steps_L = np.zeros(num_layers, dtype=np.int64)
    moves_LN = np.zeros((num_layers, _MAX_EDITS), dtype=np.int64)
    peaks_LN = np.zeros((num_layers, _MAX_EDITS))
    edits_LN4 = np.zeros((num_layers, _MAX_EDITS, 4), dtype=np.int64)
    table_LS = packed_LS.copy()
    search_layers(
        table_LS,
        topology.slots_per_shard,
        np.array(topology.nodes),
        homes_LE,
        topology.min_domains == 2,
        loads_LE,
        free_LX,
        room,
        _TOLERANCE,
        steps_L,
        moves_LN,
        peaks_LN,
        edits_LN4,
    )
    if budget is None:
        return table_LS
    base_L = table_loads(packed_LS, topology.num_shards, loads_LE).max(1)
    table_LS = packed_LS.copy()
    least_gain = budget.move_cost / budget.horizon
    replay(table_LS, edits_LN4, allot(base_L, steps_L, moves_LN, peaks_LN, room, least_gain))
    return table_LS


def _moves(
    start_LS: Table, packed_LS: Table, table_LS: Table, loads_LE: Floats, topology: Topology, layers: Sequence[int]
) -> tuple[Move, ...]:
    layer_of, slot_of = ((table_LS != start_LS) & (table_LS >= 0)).nonzero()
    expert_of = table_LS[layer_of, slot_of]
    gain_L = (
        table_loads(packed_LS, topology.num_shards, loads_LE).max(1)
        - table_loads(table_LS, topology.num_shards, loads_LE).max(1)
    ) / np.maximum(np.bincount(layer_of, minlength=len(layers)), 1)
    needed = _num_domains(start_LS, loads_LE.shape[1], topology) < np.minimum(
        topology.min_domains, _num_domains(table_LS, loads_LE.shape[1], topology)
    )
    gain = np.where(needed[layer_of, expert_of], np.inf, gain_L[layer_of])
    replaces = np.maximum(start_LS[layer_of, slot_of], EMPTY)
    order = np.argsort(-gain, kind="stable")
    columns = (layer_of, expert_of, slot_of, replaces, gain)
    return tuple(
        Move(layer=layers[layer], expert=expert, slot=slot, replaces=old, gain=worth)
        for layer, expert, slot, old, worth in zip(*(column[order].tolist() for column in columns), strict=True)
    )


def _num_domains(table_LS: Table, num_experts: int, topology: Topology) -> Table:
    """On how many nodes each expert is, `[L, E]`."""
    on_node = np.zeros((len(table_LS), num_experts, topology.num_nodes), dtype=np.bool_)
    layer_of, slot_of = (table_LS >= 0).nonzero()
    node_of_slot = np.repeat(topology.nodes, topology.slots_per_shard)
    on_node[layer_of, table_LS[layer_of, slot_of], node_of_slot[slot_of]] = True
    num_LE: Table = on_node.sum(2)
    return num_LE


def _balancedness(table_LS: Table, loads_LE: Floats, topology: Topology) -> float:
    """Mean over layers."""
    offering = sum(slots > 0 for slots in topology.slots)
    return float(balancedness(table_loads(table_LS, topology.num_shards, loads_LE), offering).mean())
