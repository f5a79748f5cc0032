"""Which experts get replicas, and which shard each replica goes to: one compiled pass per layer.

DeepSeek's EPLB does it in two greedy steps, and so does this: the next replica goes to the expert whose replicas have
the largest share of load each; then replicas are packed by falling share onto the least loaded shard with a free slot
(longest processing time first; Graham, SIAM J. Appl. Math. 17, 1969). New here: shards differ in slots, no shard gets
two replicas of an expert, what a table holds already stays, and replicas can be spread over nodes.

A table's row `[S]` has an expert, EMPTY or BLOCKED in every slot; BLOCKED is a slot that its shard does not have.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np

from router.placement import EMPTY

BLOCKED = -2
ANYWHERE = -1
"""The home of an expert that may be on every node."""

compiled: Any = numba.njit(nogil=True, cache=True, error_model="numpy")


@compiled  # type: ignore[untyped-decorator]
def pack_layers(tables: Any, per_shard: Any, nodes: Any, homes: Any, spread: Any, loads: Any, fill: Any) -> None:
    """Give every expert of each layer a slot, in place; with `fill`, the slots that are left to replicas.

    Args:
        tables: `[L, S]` int64, changed.
        per_shard: slots of each shard in a table, BLOCKED ones included.
        nodes: `[X]` of each shard.
        homes: `[L, E]` node that an expert must be on, or ANYWHERE.
        spread: put replicas on two nodes where possible.
        loads: `[L, E]` float64.
    """
    for layer in range(len(tables)):
        _pack(tables[layer], per_shard, nodes, homes[layer], spread, loads[layer], fill)


@compiled  # type: ignore[untyped-decorator]
def _pack(table: Any, per_shard: Any, nodes: Any, home: Any, spread: Any, load_e: Any, fill: Any) -> None:
    num_experts, num_shards = len(load_e), len(nodes)
    held = np.zeros((num_experts, num_shards), np.bool_)
    count, free = np.zeros(num_experts, np.int64), np.zeros(num_shards, np.int64)
    for slot, expert in enumerate(table):
        if expert >= 0:
            held[expert, slot // per_shard] = True
            count[expert] += 1
        elif expert == EMPTY:
            free[slot // per_shard] += 1
    # Experts without load are told apart by their counts.
    weight = load_e + 1e-9 * max(load_e.sum(), 1.0)
    _make_room(table, per_shard, nodes, home, weight, held, count, free)
    target = np.maximum(count, 1)
    if fill:
        _replicate(nodes, home, spread, weight, held, target, free)
    share = weight / target
    loads_x = np.zeros(num_shards)
    for slot, expert in enumerate(table):
        if expert >= 0:
            loads_x[slot // per_shard] += share[expert]
    for expert in np.argsort(-share, kind="mergesort"):
        while count[expert] < target[expert]:
            shard = _lightest(expert, nodes, home, spread, held, free, loads_x)
            if shard >= 0:
                _put(table, per_shard, shard, expert, held, free)
                loads_x[shard] += share[expert]
            elif not _make_way(table, per_shard, nodes, home, expert, share, held, free, loads_x):
                break
            count[expert] += 1
    if fill:
        _use_up(table, per_shard, nodes, home, weight, held, count, free)


@compiled  # type: ignore[untyped-decorator]
def _put(table: Any, per_shard: Any, shard: Any, expert: Any, held: Any, free: Any) -> None:
    for slot in range(shard * per_shard, (shard + 1) * per_shard):
        if table[slot] == EMPTY:
            table[slot] = expert
            held[expert, shard] = True
            free[shard] -= 1
            return


@compiled  # type: ignore[untyped-decorator]
def _make_room(
    table: Any, per_shard: Any, nodes: Any, home: Any, weight: Any, held: Any, count: Any, free: Any
) -> None:
    """Clear the least loaded replicas until what is missing fits, on each node for its own."""
    for node in range(ANYWHERE, nodes.max() + 1):
        missing = 0
        for expert in range(len(count)):
            if count[expert] == 0 and home[expert] == node:
                missing += 1
        for shard in range(len(nodes)):
            if node == ANYWHERE or nodes[shard] == node:
                missing -= free[shard]
        for _ in range(missing):
            least = -1
            for slot, expert in enumerate(table):
                if (
                    expert >= 0
                    and count[expert] > 1
                    and (node == ANYWHERE or nodes[slot // per_shard] == node)
                    and (least < 0 or weight[expert] / count[expert] < weight[table[least]] / count[table[least]])
                ):
                    least = slot
            if least < 0:
                break
            expert = table[least]
            table[least] = EMPTY
            held[expert, least // per_shard] = False
            count[expert] -= 1
            free[least // per_shard] += 1


@compiled  # type: ignore[untyped-decorator]
def _replicate(nodes: Any, home: Any, spread: Any, weight: Any, held: Any, target: Any, free: Any) -> None:
    """Raise the number of replicas of the expert with the largest share until the free slots are taken."""
    for node in range(ANYWHERE, nodes.max() + 1):
        room, widest = 0, 0
        for shard in range(len(nodes)):
            if node == ANYWHERE or nodes[shard] == node:
                room += free[shard]
                widest += free[shard] > 0 or held[:, shard].any()
        residents = 0
        for expert in range(len(target)):
            if home[expert] == node:
                residents += 1
                room -= target[expert] - held[expert].sum()
        # Survival first: while everyone can have two, nobody gets a third.
        everyone = spread and room >= residents - (target[home == node] > 1).sum()
        for _ in range(room):
            best = -1
            for expert in range(len(target)):
                if home[expert] != node or target[expert] >= widest:
                    continue
                if best < 0:
                    best = expert
                    continue
                if everyone and (target[expert] < 2) != (target[best] < 2):
                    if target[expert] < 2:
                        best = expert
                elif weight[expert] / target[expert] > weight[best] / target[best]:
                    best = expert
            if best < 0:
                break
            target[best] += 1


@compiled  # type: ignore[untyped-decorator]
def _lightest(expert: Any, nodes: Any, home: Any, spread: Any, held: Any, free: Any, loads_x: Any) -> Any:
    """The least loaded shard that can take the expert, on a second node if that is wanted and possible; or -1."""
    best, best_new = -1, False
    for shard in range(len(nodes)):
        if free[shard] == 0 or held[expert, shard] or (home[expert] != ANYWHERE and home[expert] != nodes[shard]):
            continue
        new = False
        if spread:
            new = True
            for other in range(len(nodes)):
                new &= not (held[expert, other] and nodes[other] == nodes[shard])
        if best < 0 or (new and not best_new) or (new == best_new and loads_x[shard] < loads_x[best]):
            best, best_new = shard, new
    return best


@compiled  # type: ignore[untyped-decorator]
def _make_way(
    table: Any,
    per_shard: Any,
    nodes: Any,
    home: Any,
    expert: Any,
    share: Any,
    held: Any,
    free: Any,
    loads_x: Any,
) -> Any:
    """Every shard with a free slot holds the expert: move another one there, and take its place."""
    room = -1
    for shard in range(len(nodes)):
        if (
            free[shard] > 0
            and (home[expert] == ANYWHERE or home[expert] == nodes[shard])
            and (room < 0 or loads_x[shard] < loads_x[room])
        ):
            room = shard
    if room < 0:
        return False
    best, best_load = -1, np.inf
    for slot, other in enumerate(table):
        shard = slot // per_shard
        if (
            other < 0
            or held[expert, shard]
            or held[other, room]
            or (home[expert] != ANYWHERE and home[expert] != nodes[shard])
            or (home[other] != ANYWHERE and home[other] != nodes[room])
        ):
            continue
        load = max(loads_x[room] + share[other], loads_x[shard] - share[other] + share[expert])
        if load < best_load:
            best, best_load = slot, load
    if best < 0:
        return False
    other, shard = table[best], best // per_shard
    table[best] = expert
    held[other, shard], held[expert, shard] = False, True
    loads_x[shard] += share[expert] - share[other]
    loads_x[room] += share[other]
    _put(table, per_shard, room, other, held, free)
    return True


@compiled  # type: ignore[untyped-decorator]
def _use_up(table: Any, per_shard: Any, nodes: Any, home: Any, weight: Any, held: Any, count: Any, free: Any) -> None:
    """Slots that no planned replica could take go to the largest share that can."""
    for shard in range(len(nodes)):
        while free[shard] > 0:
            best = -1
            for expert in range(len(count)):
                if held[expert, shard] or (home[expert] != ANYWHERE and home[expert] != nodes[shard]):
                    continue
                if best < 0 or weight[expert] / count[expert] > weight[best] / count[best]:
                    best = expert
            if best < 0:
                break
            _put(table, per_shard, shard, best, held, free)
            count[best] += 1
