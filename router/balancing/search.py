"""Few moves that level a layer's shards: a local search from the placement that is there, one compiled pass per layer.

Every step relieves the shard with the largest load, by the one edit that takes most off the overload per slot filled;
the overload is the sum over shards of (load above the mean)². An edit is a swap of two experts between that shard and
another, a move into an empty slot, or a replica that takes the place of another replica. No edit puts an expert twice
on a shard, off its home node, on fewer nodes than two if it was on two, or lifts a shard to the load that it reduces.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from router.balancing.pack import ANYWHERE, compiled
from router.placement import EMPTY

_LEAST_PROGRESS = 1e-9


@compiled  # type: ignore[untyped-decorator]
def search_layers(
    tables: Any,
    per_shard: Any,
    nodes: Any,
    homes: Any,
    spread: Any,
    loads: Any,
    free: Any,
    max_moves: Any,
    tolerance: Any,
    steps: Any,
    moves: Any,
    peaks: Any,
    edits: Any,
) -> None:
    """Search from tables `[L, S]`, in place, and write down the way.

    Args:
        free: `[L, X]`, how many experts each shard can take in; no edit beyond it is made.
        max_moves: slots that may be filled per layer.
        tolerance: a layer whose largest load is within this fraction of the mean is left alone.
        steps: `[L]`, written: edits made.
        moves: `[L, N]`, written: slots filled after each edit.
        peaks: `[L, N]`, written: the largest shard load after each edit.
        edits: `[L, N, 4]`, written: two slots and what they hold after the edit; the second slot is -1 if one changed.
    """
    for layer in range(len(tables)):
        steps[layer] = _search(
            tables[layer],
            per_shard,
            nodes,
            homes[layer],
            spread,
            loads[layer],
            free[layer].copy(),
            max_moves,
            tolerance,
            moves[layer],
            peaks[layer],
            edits[layer],
        )


@compiled  # type: ignore[untyped-decorator]
def _search(
    table: Any,
    per_shard: Any,
    nodes: Any,
    home: Any,
    spread: Any,
    load_e: Any,
    free_x: Any,
    max_moves: Any,
    tolerance: Any,
    moves: Any,
    peaks: Any,
    edits: Any,
) -> Any:
    num_experts, num_shards = len(load_e), len(nodes)
    count = np.zeros(num_experts, np.int64)
    held = np.zeros((num_experts, num_shards), np.bool_)
    shards_of = np.zeros((num_experts, num_shards), np.int64)
    on_node = np.zeros((num_experts, nodes.max() + 1), np.int64)
    offers = np.zeros(num_shards, np.bool_)
    for slot, expert in enumerate(table):
        shard = slot // per_shard
        offers[shard] |= expert >= EMPTY
        if expert >= 0:
            _put(shard, expert, nodes, count, held, shards_of, on_node)
    share, loads_x = np.zeros(num_experts), np.zeros(num_shards)
    _add_up(load_e, count, shards_of, share, loads_x)
    mean = load_e.sum() / max(offers.sum(), 1)
    filled, step = 0, 0
    while step < len(peaks) and filled < max_moves:
        hot = np.argmax(loads_x)
        if loads_x[hot] <= mean * (1 + tolerance):
            break
        source, target, gain = _best_swap(
            table, per_shard, nodes, home, spread, share, held, on_node, free_x, loads_x, mean, hot
        )
        expert, slot, gain_2 = _best_replica(
            table,
            per_shard,
            nodes,
            home,
            spread,
            load_e,
            share,
            count,
            held,
            shards_of,
            on_node,
            free_x,
            loads_x,
            mean,
            hot,
        )
        if max(gain, gain_2) <= _LEAST_PROGRESS * mean * mean:
            break
        if gain >= gain_2:
            edits[step, 0], edits[step, 1] = target, table[source]
            edits[step, 2], edits[step, 3] = source, table[target]
            filled += 2 if table[target] != EMPTY else 1
        else:
            edits[step, 0], edits[step, 1], edits[step, 2] = slot, expert, -1
            filled += 1
        for change in range(0, 4, 2):
            if edits[step, change] >= 0 and edits[step, change + 1] != EMPTY:
                free_x[edits[step, change] // per_shard] -= 1
        _apply(edits[step], table, per_shard, nodes, count, held, shards_of, on_node)
        _add_up(load_e, count, shards_of, share, loads_x)
        moves[step], peaks[step] = filled, loads_x.max()
        step += 1
    return step


@compiled  # type: ignore[untyped-decorator]
def _apply(
    edit: Any, table: Any, per_shard: Any, nodes: Any, count: Any, held: Any, shards_of: Any, on_node: Any
) -> None:
    """Make an edit: all of its slots are emptied before one is filled."""
    for change in range(0, 4, 2):
        if edit[change] >= 0:
            old = table[edit[change]]
            if old != EMPTY:
                _remove(edit[change] // per_shard, old, nodes, count, held, shards_of, on_node)
            table[edit[change]] = EMPTY
    for change in range(0, 4, 2):
        new = edit[change + 1]
        if edit[change] >= 0 and new != EMPTY:
            table[edit[change]] = new
            _put(edit[change] // per_shard, new, nodes, count, held, shards_of, on_node)


@compiled  # type: ignore[untyped-decorator]
def _add_up(load_e: Any, count: Any, shards_of: Any, share: Any, loads_x: Any) -> None:
    """What each replica and each shard carries."""
    loads_x[:] = 0
    for expert in range(len(load_e)):
        share[expert] = load_e[expert] / max(count[expert], 1)
        for replica in range(count[expert]):
            loads_x[shards_of[expert, replica]] += share[expert]


@compiled  # type: ignore[untyped-decorator]
def _put(shard: Any, expert: Any, nodes: Any, count: Any, held: Any, shards_of: Any, on_node: Any) -> None:
    held[expert, shard] = True
    shards_of[expert, count[expert]] = shard
    on_node[expert, nodes[shard]] += 1
    count[expert] += 1


@compiled  # type: ignore[untyped-decorator]
def _remove(shard: Any, expert: Any, nodes: Any, count: Any, held: Any, shards_of: Any, on_node: Any) -> None:
    held[expert, shard] = False
    on_node[expert, nodes[shard]] -= 1
    count[expert] -= 1
    for replica in range(count[expert]):
        if shards_of[expert, replica] == shard:
            shards_of[expert, replica] = shards_of[expert, count[expert]]


@compiled  # type: ignore[untyped-decorator]
def _over(load: Any, mean: Any) -> Any:
    return (load - mean) ** 2 if load > mean else 0.0


@compiled  # type: ignore[untyped-decorator]
def _may_leave(expert: Any, node: Any, joins: Any, spread: Any, on_node: Any) -> Any:
    """Whether an expert that is on two nodes still is after it left one, and joined another if `joins` is not -1."""
    if not spread or on_node[expert, node] > 1 or node == joins:
        return True
    before = (on_node[expert] > 0).sum()
    return before - 1 + (joins >= 0 and on_node[expert, joins] == 0) >= min(before, 2)


@compiled  # type: ignore[untyped-decorator]
def _best_swap(
    table: Any,
    per_shard: Any,
    nodes: Any,
    home: Any,
    spread: Any,
    share: Any,
    held: Any,
    on_node: Any,
    free_x: Any,
    loads_x: Any,
    mean: Any,
    hot: Any,
) -> Any:
    """(slot on the hottest shard, slot elsewhere, gain per slot filled); the slot elsewhere may be empty."""
    best_source, best_target, best = -1, -1, 0.0
    peak = loads_x[hot]
    least_cost = 1 if (table == EMPTY).any() else 2
    for source in range(hot * per_shard, (hot + 1) * per_shard):
        expert = table[source]
        if expert < 0:
            continue
        for shard in range(len(nodes)):
            if (
                free_x[shard] < 1
                or loads_x[shard] >= peak
                or held[expert, shard]
                or (home[expert] != ANYWHERE and home[expert] != nodes[shard])
                or not _may_leave(expert, nodes[hot], nodes[shard], spread, on_node)
            ):
                continue
            before = _over(peak, mean) + _over(loads_x[shard], mean)
            if before - _over(peak - share[expert], mean) <= best * least_cost:
                continue
            for target in range(shard * per_shard, (shard + 1) * per_shard):
                other = table[target]
                if other < EMPTY or (other != EMPTY and free_x[hot] < 1):
                    continue
                shift = share[expert]
                if other != EMPTY:
                    shift -= share[other]
                if shift <= 0 or loads_x[shard] + shift >= peak:
                    continue
                gain = before - _over(peak - shift, mean) - _over(loads_x[shard] + shift, mean)
                if other != EMPTY:
                    gain /= 2
                if gain > best and (
                    other == EMPTY
                    or (
                        not held[other, hot]
                        and (home[other] == ANYWHERE or home[other] == nodes[hot])
                        and _may_leave(other, nodes[shard], nodes[hot], spread, on_node)
                    )
                ):
                    best_source, best_target, best = source, target, gain
    return best_source, best_target, best


@compiled  # type: ignore[untyped-decorator]
def _best_replica(
    table: Any,
    per_shard: Any,
    nodes: Any,
    home: Any,
    spread: Any,
    load_e: Any,
    share: Any,
    count: Any,
    held: Any,
    shards_of: Any,
    on_node: Any,
    free_x: Any,
    loads_x: Any,
    mean: Any,
    hot: Any,
) -> Any:
    """(expert, slot for one more replica of it, gain); the slot is empty or loses another replica.

    Either the expert is on the hottest shard, or the slot is.
    """
    best_expert, best_slot, best = -1, -1, 0.0
    peak = loads_x[hot]
    # What one more replica takes off the shards that hold the expert already.
    relief = np.zeros(len(load_e))
    for expert in range(len(load_e)):
        fall = share[expert] - load_e[expert] / (count[expert] + 1)
        for replica in range(count[expert]):
            load = loads_x[shards_of[expert, replica]]
            relief[expert] += _over(load, mean) - _over(load - fall, mean)
    for slot, old in enumerate(table):
        shard = slot // per_shard
        if (
            free_x[shard] < 1
            or old < EMPTY
            or (old != EMPTY and (count[old] < 2 or not _may_leave(old, nodes[shard], -1, spread, on_node)))
        ):
            continue
        lost = rise = 0.0
        if old != EMPTY:
            lost, rise = share[old], load_e[old] / (count[old] - 1) - share[old]
        for candidate in range(len(load_e) if shard == hot else per_shard):
            expert = candidate if shard == hot else table[hot * per_shard + candidate]
            if (
                expert < 0
                or relief[expert] + _over(loads_x[shard], mean) <= best
                or held[expert, shard]
                or (home[expert] != ANYWHERE and home[expert] != nodes[shard])
            ):
                continue
            new_share = load_e[expert] / (count[expert] + 1)
            here = loads_x[shard] - lost + new_share
            gain = relief[expert] + _over(loads_x[shard], mean) - _over(here, mean)
            if here >= peak or gain <= best:
                continue
            fits = True
            for replica in range(count[old] if old != EMPTY else 0):
                other = shards_of[old, replica]
                if other != shard:
                    load = loads_x[other] - (share[expert] - new_share if held[expert, other] else 0.0)
                    gain -= _over(load + rise, mean) - _over(load, mean)
                    fits &= load + rise < peak
            if fits and gain > best:
                best_expert, best_slot, best = expert, slot, gain
    return best_expert, best_slot, best
