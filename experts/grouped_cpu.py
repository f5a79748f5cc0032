"""Grouped SwiGLU on an fp32 CPU: one compiled call per shard and layer, over weights packed in panels.

A loop of GEMM calls over experts spends its time on overhead and on packing weights when an expert has one or two rows.

Shapes: `U` rows, `K` experts per row, `S` slots, `H` hidden, `I` intermediate.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from model.linear import PANEL
from model.linear_cpu import ROWS, swiglu_rows
from model.rows_cpu import add_scaled_row, copy_row
from model.vectors_cpu import address, declare, inner


@declare("i8(i4[:,::1], b1[::1], i8[::1])")  # type: ignore[untyped-decorator]
def count_rows(slots: Any, held: Any, counts: Any) -> Any:
    """Add the rows of each slot to `counts`.

    Args:
        slots: `[U, K]`; negative entries are skipped.
        held: `[S]`, whether a slot holds an expert.
        counts: `[S]`.

    Returns: -1, or the first slot asked for that holds no expert; then nothing was counted.
    """
    num_rows, top_k = slots.shape
    for row in range(num_rows):
        for k in range(top_k):
            slot = slots[row, k]
            if slot >= len(held) or (slot >= 0 and not held[slot]):
                return slot
    for row in range(num_rows):
        for k in range(top_k):
            if slots[row, k] >= 0:
                counts[slots[row, k]] += 1
    return -1


@inner  # type: ignore[untyped-decorator]
def _count(slots: Any, first_slot: Any, last_slot: Any, begins: Any) -> Any:
    """Where the rows of each slot begin, if they stand slot by slot; the last entry is how many there are.

    Args:
        begins: `[slots + 1]`, zeros, written.

    Returns: the rows of the slot with most of them.
    """
    for row in range(slots.shape[0]):
        for k in range(slots.shape[1]):
            if first_slot <= slots[row, k] < last_slot:
                begins[slots[row, k] - first_slot + 1] += 1
    most = 0
    for slot in range(last_slot - first_slot):
        most = max(most, begins[slot + 1])
        begins[slot + 1] += begins[slot]
    return most


@inner  # type: ignore[untyped-decorator]
def _order(slots: Any, weights: Any, first_slot: Any, last_slot: Any, ends: Any, row_of: Any, weight_of: Any) -> None:
    """The rows of each slot with their weights, slot by slot.

    Args:
        ends: a copy of what `_count` has written, changed.
    """
    for row in range(slots.shape[0]):
        for k in range(slots.shape[1]):
            slot = slots[row, k] - first_slot
            if first_slot <= slots[row, k] < last_slot:
                row_of[ends[slot]] = row
                weight_of[ends[slot]] = weights[row, k]
                ends[slot] += 1


@declare(  # type: ignore[untyped-decorator]
    "i8(f4[:,::1], i4[:,::1], f4[:,::1], f4[:,:,:,::1], f4[:,:,:,::1], i8, i8, i8, i8[::1], f4[:,::1])"
)
def grouped_swiglu(
    x: Any,
    slots: Any,
    weights: Any,
    gate_up: Any,
    down: Any,
    first_slot: Any,
    last_slot: Any,
    most: Any,
    due: Any,
    y: Any,
) -> Any:
    """For each row, the weighted sum of its experts, slot by slot: `y = Σ w · down(silu(gate(x)) · up(x))`.

    Args:
        x: `[U, H]`.
        slots: `[U, K]`; what is not among `first_slot … last_slot - 1` is skipped.
        weights: `[U, K]`.
        gate_up: `[S, 2 · ceil(I / 16), H, 16]`, the gate's panels first.
        down: `[S, ceil(H / 16), I, 16]`.
        most: rows of slots between two pauses, if a single slot has not more. Where one is due, it ends early.
        due: `[1]`, not 0 if one is; another thread may change it.
        y: `[U, H]`, added to.

    Returns: the slot behind the last one that was computed.
    """
    num_slots, hidden = last_slot - first_slot, x.shape[1]
    begins = np.zeros(num_slots + 1, np.int64)
    room = min(_count(slots, first_slot, last_slot, begins), ROWS)
    row_of, weight_of = np.empty(begins[-1], np.int64), np.empty(begins[-1], np.float32)
    _order(slots, weights, first_slot, last_slot, begins.copy(), row_of, weight_of)
    x_of, y_of = np.empty((room, hidden), np.float32), np.empty((room, hidden), np.float32)
    h_of = np.empty((room, gate_up.shape[1] * PANEL), np.float32)
    activated = np.empty((room, down.shape[2]), np.float32)
    for slot in range(num_slots):
        for first in range(begins[slot], begins[slot + 1], ROWS):
            n = min(ROWS, begins[slot + 1] - first)
            for i in range(n):
                copy_row(address(x, row_of[first + i] * hidden), hidden, address(x_of, i * hidden))
            swiglu_rows(x_of[:n], gate_up[first_slot + slot], down[first_slot + slot], h_of, activated, y_of[:n])
            for i in range(n):
                row, weight = row_of[first + i], weight_of[first + i]
                add_scaled_row(address(y_of, i * hidden), weight, hidden, address(y, row * hidden))
        if 0 < begins[slot + 1] < begins[num_slots] and begins[slot + 2] > most and due[0] != 0:
            return first_slot + slot + 1
    return last_slot


@declare(  # type: ignore[untyped-decorator]
    "void(f4[:,::1], i4[:,::1], f4[:,::1], f4[:,:,:,::1], f4[:,:,:,::1], i8, i8, f4[:,::1])"
)
def each_swiglu(
    x: Any, slots: Any, weights: Any, gate_up: Any, down: Any, first_slot: Any, last_slot: Any, out: Any
) -> None:
    """What `grouped_swiglu` adds up, before it is weighted: of every row of every slot, slot by slot.

    Args:
        out: `[pairs of a row and one of these slots, H]`, written.
    """
    num_slots, hidden = last_slot - first_slot, x.shape[1]
    begins = np.zeros(num_slots + 1, np.int64)
    room = min(_count(slots, first_slot, last_slot, begins), ROWS)
    row_of, weight_of = np.empty(begins[-1], np.int64), np.empty(begins[-1], np.float32)
    _order(slots, weights, first_slot, last_slot, begins.copy(), row_of, weight_of)
    x_of = np.empty((room, hidden), np.float32)
    h_of = np.empty((room, gate_up.shape[1] * PANEL), np.float32)
    activated = np.empty((room, down.shape[2]), np.float32)
    for slot in range(num_slots):
        for first in range(begins[slot], begins[slot + 1], ROWS):
            n = min(ROWS, begins[slot + 1] - first)
            for i in range(n):
                copy_row(address(x, row_of[first + i] * hidden), hidden, address(x_of, i * hidden))
            y_of = out[first : first + n]
            swiglu_rows(x_of[:n], gate_up[first_slot + slot], down[first_slot + slot], h_of, activated, y_of)


@declare("void(f4[:,::1], i4[:,::1], f4[:,::1], i8, f4[:,::1])")  # type: ignore[untyped-decorator]
def add_each(out: Any, slots: Any, weights: Any, num_slots: Any, y: Any) -> None:
    """Add up what `each_swiglu` has written of all slots, with the bits that `grouped_swiglu` gives.

    Args:
        y: `[U, H]`, added to.
    """
    hidden, begins = y.shape[1], np.zeros(num_slots + 1, np.int64)
    _count(slots, 0, num_slots, begins)
    row_of, weight_of = np.empty(begins[-1], np.int64), np.empty(begins[-1], np.float32)
    _order(slots, weights, 0, num_slots, begins.copy(), row_of, weight_of)
    for pair in range(len(row_of)):
        add_scaled_row(address(out, pair * hidden), weight_of[pair], hidden, address(y, row_of[pair] * hidden))


@declare(  # type: ignore[untyped-decorator]
    "i8(f4[:,::1], i4[:,::1], f4[:,::1], b1[::1], i8[::1], f4[:,:,:,::1], f4[:,:,:,::1], f4[:,::1])"
)
def serve_rows(x: Any, slots: Any, weights: Any, held: Any, totals: Any, gate_up: Any, down: Any, y: Any) -> Any:
    """`count_rows`, and if all slots hold experts, `grouped_swiglu` over them; `y` is overwritten.

    Args:
        totals: `[S]`, to which the rows of each slot are added.

    Returns: how many slots are asked for, or a negative number: -1 less the first one that holds no expert.
    """
    counts = np.zeros(len(held), np.int64)
    missing = count_rows(slots, held, counts)
    if missing >= 0:
        return -1 - missing
    hit = 0
    for slot in range(len(held)):
        totals[slot] += counts[slot]
        hit += counts[slot] > 0
    y[:] = 0
    grouped_swiglu(x, slots, weights, gate_up, down, 0, len(held), 0, np.zeros(1, np.int64), y)
    return hit
