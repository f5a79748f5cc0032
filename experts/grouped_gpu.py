"""Grouped SwiGLU on a GPU, without a word to the host: a step's kernels can be queued ahead, or captured in a graph.

Rows are sorted by slot, and each slot's are cut into tiles, by kernels; how many tiles there are only the device knows,
so that as many programs are started as there may be, and those without a tile end at once. A tile's weights are the
rows of the product and its tokens the columns: a tensor core's columns come in eights, its rows in sixty-fours, and few
tokens ask for the same expert.

Shapes: `U` rows, `K` experts per row, `S` slots, `H` hidden, `I` intermediate, `N = U · K` pairs of row and
slot, `X` tiles.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import triton
from triton.tools.tensor_descriptor import TensorDescriptor

from experts import grouped_kernels as kernels


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Blocks:
    """How a product is cut up."""

    weights: int
    """Rows of a weight matrix per program; the first product has twice as many, of gate and of up."""
    tokens: int
    """Most rows of a tile."""
    fewer: int = 0
    """Tiles of at most so many rows are multiplied as if they had so many, and not `tokens`."""
    depth: int
    num_warps: int
    num_stages: int


@dataclasses.dataclass(slots=True)
class SlotCounters:
    """What a layer's slots have served, on the device."""

    served_S: torch.Tensor
    """int64 rows of each slot."""
    activated: torch.Tensor
    """int64 `[1]`: slots hit, summed over calls."""


def slot_counters(num_slots: int, device: torch.device) -> SlotCounters:
    return SlotCounters(
        served_S=torch.zeros(num_slots, dtype=torch.int64, device=device),
        activated=torch.zeros(1, dtype=torch.int64, device=device),
    )


def grouped_swiglu(
    x_UH: torch.Tensor,
    slots_UK: torch.Tensor,
    weights_UK: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    holds_S: torch.Tensor,
    counters: SlotCounters,
    blocks: tuple[Blocks, Blocks] | None = None,
) -> torch.Tensor:
    """For each row, the weighted sum of its experts: `Σ w · down(silu(gate(x)) · up(x))`, `[U, H]` in the rows' dtype.

    Sums are taken in fp32, in the order of a row's slots, whichever tile computed them. Where any row asks for a slot
    that holds nothing, every number is NaN: nobody can take that for an answer, and no host had to look.

    Args:
        slots_UK: int32; negative entries are skipped.
        gate_up: `[S, 2I, H]`.
        down: `[S, H, I]`.
        holds_S: uint8, which slots may be asked for.
        counters: added to.
        blocks: of both products; None for what suits so many rows.
    """
    of_gate_up, of_down = blocks or choose_blocks(slots_UK.numel(), len(gate_up), x_UH.dtype)
    assert of_gate_up.tokens == of_down.tokens, "both products have the same tiles"
    tiles = cut_tiles(slots_UK, holds_S, counters, of_gate_up.tokens)
    h_NI = multiply_gate_up(x_UH, slots_UK.shape[1], gate_up, tiles, of_gate_up)
    out_NH = multiply_down(h_NI, down, tiles, of_down)
    return add_up(out_NH, slots_UK, weights_UK, tiles)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Tiles:
    """Pairs by slot, in pieces."""

    order_N: torch.Tensor
    """The pairs, sorted by slot; rows of the products stand in this order in between."""
    table: torch.Tensor
    """int32 `[3, X]`: slot, first pair and number of pairs of each tile."""
    num_tiles: torch.Tensor
    """int32 `[1]`, how many of them there are."""
    poison: torch.Tensor
    """fp32 `[1]`: NaN if a slot is asked for that holds nothing, else 0."""

    @property
    def most(self) -> int:
        """How many tiles there may be."""
        return self.table.shape[1]


def cut_tiles(slots_UK: torch.Tensor, holds_S: torch.Tensor, counters: SlotCounters, tile_rows: int) -> Tiles:
    """Sort the pairs, count them, and cut them into tiles of at most so many rows."""
    num_pairs, num_slots, device = slots_UK.numel(), len(holds_S), slots_UK.device
    sorted_N, order_N = slots_UK.flatten().sort(stable=True)
    tiles = Tiles(
        order_N=order_N,
        table=torch.empty(
            (3, min(num_pairs, -(-num_pairs // tile_rows) + num_slots)), dtype=torch.int32, device=device
        ),
        num_tiles=torch.empty(1, dtype=torch.int32, device=device),
        poison=torch.empty(1, device=device),
    )
    kernels.cut[(1,)](
        sorted_N,
        num_pairs,
        holds_S,
        counters.served_S,
        counters.activated,
        tiles.table,
        tiles.num_tiles,
        tiles.poison,
        num_slots,
        tiles.most,
        ROWS=tile_rows,
        SLOTS=triton.next_power_of_2(num_slots + 1),
        STEPS=num_pairs.bit_length(),
        num_warps=8,
    )
    return tiles


def multiply_gate_up(
    x_UH: torch.Tensor, top_k: int, gate_up: torch.Tensor, tiles: Tiles, blocks: Blocks
) -> torch.Tensor:
    """`silu(gate(x)) · up(x)`, `[N, I]` in the order of the tiles."""
    hidden, intermediate = gate_up.shape[2], gate_up.shape[1] // 2
    h_NI = torch.empty((len(tiles.order_N), intermediate), dtype=x_UH.dtype, device=x_UH.device)
    kernels.gate_up[(tiles.most * triton.cdiv(intermediate, blocks.weights),)](
        x_UH,
        tiles.order_N,
        _matrix(gate_up, blocks),
        h_NI,
        tiles.table,
        tiles.num_tiles,
        tiles.most,
        hidden,
        intermediate,
        top_k,
        **_constants(blocks, hidden),
    )
    return h_NI


def multiply_down(h_NI: torch.Tensor, down: torch.Tensor, tiles: Tiles, blocks: Blocks) -> torch.Tensor:
    """`down(h)`, `[N, H]` in the order of the pairs; pairs without a slot are left as they are."""
    hidden = down.shape[1]
    out_NH = torch.empty((len(h_NI), hidden), dtype=h_NI.dtype, device=h_NI.device)
    kernels.down[(tiles.most * triton.cdiv(hidden, blocks.weights),)](
        h_NI,
        tiles.order_N,
        _matrix(down, blocks),
        out_NH,
        tiles.table,
        tiles.num_tiles,
        tiles.most,
        hidden,
        h_NI.shape[1],
        **_constants(blocks, h_NI.shape[1]),
    )
    return out_NH


def add_up(out_NH: torch.Tensor, slots_UK: torch.Tensor, weights_UK: torch.Tensor, tiles: Tiles) -> torch.Tensor:
    """Each row's pairs, weighted, `[U, H]`."""
    num_rows, top_k = slots_UK.shape
    hidden = out_NH.shape[1]
    y_UH = torch.empty((num_rows, hidden), dtype=out_NH.dtype, device=out_NH.device)
    columns = min(1024, triton.next_power_of_2(hidden))
    kernels.add_up[(num_rows, triton.cdiv(hidden, columns))](
        out_NH, slots_UK, weights_UK, tiles.poison, y_UH, hidden, TOP_K=top_k, COLUMNS=columns, num_warps=4
    )
    return y_UH


def choose_blocks(num_pairs: int, num_slots: int, dtype: torch.dtype) -> tuple[Blocks, Blocks]:
    """Those of gate and up, and of down, by the rows that a slot gets if all get as many; tried out on an H200."""
    if dtype == torch.float32:
        both = Blocks(weights=32, tokens=16, depth=32, num_warps=4, num_stages=2)
        return both, both
    rows = num_pairs / num_slots
    if rows <= 12:
        both = Blocks(weights=128, tokens=16, depth=128, num_warps=8, num_stages=3)
        return both, both
    if rows <= 48:
        return (
            Blocks(weights=128, tokens=32, depth=128, num_warps=4, num_stages=3),
            Blocks(weights=128, tokens=32, depth=128, num_warps=4, num_stages=4),
        )
    if rows <= 96:
        both = Blocks(weights=128, tokens=64, depth=64, num_warps=8, num_stages=4)
        return both, both
    return (
        Blocks(weights=128, tokens=128, fewer=64, depth=64, num_warps=8, num_stages=4),
        Blocks(weights=256, tokens=128, fewer=64, depth=64, num_warps=8, num_stages=4),
    )


def _matrix(weights: torch.Tensor, blocks: Blocks) -> Any:
    """The matrices of all slots below one another; for the copy engine where there is one (Hopper and later)."""
    flat = weights.view(-1, weights.shape[2])
    return TensorDescriptor.from_tensor(flat, [blocks.weights, blocks.depth]) if _has_copy_engine(weights) else flat


def _has_copy_engine(weights: torch.Tensor) -> bool:
    if weights.device.type != "cuda" or torch.cuda.get_device_capability(weights.device) < (9, 0):
        return False
    # It reads rows that begin at multiples of 16 bytes.
    return weights.shape[2] * weights.element_size() % 16 == 0


def _constants(blocks: Blocks, depth: int) -> dict[str, Any]:
    return {
        "WEIGHTS": blocks.weights,
        "TOKENS": blocks.tokens,
        "FEWER": blocks.fewer or blocks.tokens,
        "DEPTH": blocks.depth,
        "EVEN": depth % blocks.depth == 0,
        "num_warps": blocks.num_warps,
        "num_stages": blocks.num_stages,
    }
