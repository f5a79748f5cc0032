"""Replicas on a second node for every expert that can have one, so that the loss of a node loses no expert."""

from __future__ import annotations

from typing import Any

import numpy as np

from router.balancing.pack import BLOCKED, compiled
from router.placement import EMPTY


@compiled  # type: ignore[untyped-decorator]
def spread_layers(tables: Any, per_shard: Any, nodes: Any, loads: Any, free: Any) -> None:
    """Change tables `[L, S]` in place, the most loaded experts first.

    Where there are two slots for every expert, replicas of others give way if those stay on two nodes; where there are
    not, replicas that exist only change places. No shard takes in more than `free` `[L, X]` experts, which is counted
    down.
    """
    num_nodes = nodes.max() + 1
    for layer in range(len(tables)):
        table, num_experts = tables[layer], loads.shape[1]
        on_node = np.zeros((num_experts, num_nodes), np.int64)
        held = np.zeros((num_experts, len(nodes)), np.bool_)
        for slot, expert in enumerate(table):
            if expert >= 0:
                on_node[expert, nodes[slot // per_shard]] += 1
                held[expert, slot // per_shard] = True
        everyone = (table != BLOCKED).sum() >= 2 * num_experts
        for expert in np.argsort(-loads[layer], kind="mergesort"):
            if (on_node[expert] > 0).sum() == 1 and not (
                everyone and _take_slot(table, per_shard, nodes, expert, loads[layer], free[layer], on_node, held)
            ):
                _change_places(table, per_shard, nodes, expert, everyone, free[layer], on_node, held)


@compiled  # type: ignore[untyped-decorator]
def _can_be_missed(table: Any, per_shard: Any, nodes: Any, slot: Any, on_node: Any) -> Any:
    """Whether the slot is empty, or its expert is on two nodes without it."""
    expert, node = table[slot], nodes[slot // per_shard]
    return expert == EMPTY or (on_node[expert] > 0).sum() - (on_node[expert, node] == 1) >= 2


@compiled  # type: ignore[untyped-decorator]
def _take_slot(
    table: Any, per_shard: Any, nodes: Any, expert: Any, load_e: Any, free_x: Any, on_node: Any, held: Any
) -> Any:
    """One replica more, in an empty slot or in that of the least loaded replica that can be missed."""
    best, best_share = -1, np.inf
    for slot, other in enumerate(table):
        if (
            other != BLOCKED
            and free_x[slot // per_shard] > 0
            and on_node[expert, nodes[slot // per_shard]] == 0
            and _can_be_missed(table, per_shard, nodes, slot, on_node)
        ):
            share = load_e[other] / on_node[other].sum() if other != EMPTY else -1.0
            if share < best_share:
                best, best_share = slot, share
    if best < 0:
        return False
    _fill(table, per_shard, nodes, best, expert, free_x, on_node, held)
    return True


@compiled  # type: ignore[untyped-decorator]
def _change_places(
    table: Any, per_shard: Any, nodes: Any, expert: Any, everyone: Any, free_x: Any, on_node: Any, held: Any
) -> None:
    """Take the slot of an expert on another node, which goes to a slot here: to that of a second replica, or of one
    that can be missed."""
    for slot, found in enumerate(table):
        shard = slot // per_shard
        if found == BLOCKED or on_node[expert, nodes[shard]] == 0:
            continue
        if found == expert:
            if on_node[expert, nodes[shard]] == 1:
                continue
        elif not everyone or not _can_be_missed(table, per_shard, nodes, slot, on_node):
            continue
        for target, other in enumerate(table):
            there = target // per_shard
            if other in (BLOCKED, found) or nodes[there] == nodes[shard] or free_x[there] < 1:
                continue
            if other != EMPTY:
                if held[other, shard] or free_x[shard] < 1:
                    continue
                on_node[other, nodes[there]] -= 1
                on_node[other, nodes[shard]] += 1
                covered = (on_node[other] > 0).sum() > 1 or on_node[other].sum() == 1
                on_node[other, nodes[there]] += 1
                on_node[other, nodes[shard]] -= 1
                if not covered:
                    continue
            _fill(table, per_shard, nodes, target, expert, free_x, on_node, held)
            _fill(table, per_shard, nodes, slot, other, free_x, on_node, held)
            return


@compiled  # type: ignore[untyped-decorator]
def _fill(table: Any, per_shard: Any, nodes: Any, slot: Any, expert: Any, free_x: Any, on_node: Any, held: Any) -> None:
    shard = slot // per_shard
    old = table[slot]
    if old != EMPTY:
        on_node[old, nodes[shard]] -= 1
        held[old, shard] = False
    table[slot] = expert
    if expert != EMPTY:
        free_x[shard] -= 1
        on_node[expert, nodes[shard]] += 1
        held[expert, shard] = True
