"""Which layers spend a limited number of moves: those whose next ones take most off their largest load, each."""

from __future__ import annotations

from typing import Any

import numpy as np

from router.balancing.pack import compiled


@compiled  # type: ignore[untyped-decorator]
def allot(base: Any, steps: Any, moves: Any, peaks: Any, max_moves: Any, least_gain: Any) -> Any:
    """How many edits of each layer's search to make, `[L]`: greedy along the concave hulls of its gains.

    Args:
        base: `[L]`, the largest load of each layer before the search; the rest is what `search_layers` has written.
        least_gain: what a move has to take off its layer's largest load to pay.
    """
    kept, ahead, slope = np.zeros_like(steps), np.zeros_like(steps), np.zeros(len(steps))
    for layer in range(len(steps)):
        ahead[layer], slope[layer] = _steepest(base[layer], steps[layer], moves[layer], peaks[layer], 0, max_moves)
    room = max_moves
    while len(slope):
        layer = int(np.argmax(slope))
        if slope[layer] <= least_gain:
            break
        cost = _after(moves[layer], ahead[layer]) - _after(moves[layer], kept[layer])
        if cost <= room:
            room -= cost
            kept[layer] = ahead[layer]
        ahead[layer], slope[layer] = _steepest(base[layer], steps[layer], moves[layer], peaks[layer], kept[layer], room)
    return kept


@compiled  # type: ignore[untyped-decorator]
def replay(tables: Any, edits: Any, kept: Any) -> None:
    """Make the first `kept` edits of each layer, in place."""
    for layer in range(len(tables)):
        for step in range(kept[layer]):
            for change in range(0, 4, 2):
                if edits[layer, step, change] >= 0:
                    tables[layer, edits[layer, step, change]] = edits[layer, step, change + 1]


@compiled  # type: ignore[untyped-decorator]
def _after(moves: Any, step: Any) -> Any:
    return moves[step - 1] if step > 0 else 0


@compiled  # type: ignore[untyped-decorator]
def _steepest(base: Any, steps: Any, moves: Any, peaks: Any, kept: Any, room: Any) -> Any:
    """(number of edits, gain per move) of the best way on from `kept` edits with so many moves left."""
    best, slope = kept, 0.0
    filled = _after(moves, kept)
    peak = peaks[kept - 1] if kept > 0 else base
    for step in range(kept + 1, steps + 1):
        if moves[step - 1] - filled > room:
            break
        if (peak - peaks[step - 1]) / (moves[step - 1] - filled) > slope:
            best, slope = step, (peak - peaks[step - 1]) / (moves[step - 1] - filled)
    return best, slope
