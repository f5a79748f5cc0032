"""Attention of many queries of one sequence over its paged keys and values, on an fp32 CPU.

Keys are taken a block at a time, and the softmax is carried on from block to block (Milakov and Gimelshein, Online
normalizer calculation for softmax, 2018; Dao et al., FlashAttention, 2022). Queries are packed as a matrix's panels
are, and keys are the rows that meet them: a query's scores lie in one lane of vectors, which need no sum over their
lanes then. Blocks begin at multiples of their size, whatever a step computes: a row comes out the same, bit for bit,
however its prompt is cut into chunks and whatever of it was cached.

Shapes: `T` tokens, `S` spans, `Q` and `N` query and KV heads, `D` head dim, `P` pages of the longest span.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from model.batch import PrefillTable
from model.linear import PANEL
from model.rows_cpu import copy_row, exponential_columns, pack_rows
from model.threads import in_parts
from model.tiles_cpu import COLUMNS, MAX_ROWS, multiply, multiply_turned
from model.vectors_cpu import LANES, address, declare, inner

_Array = npt.NDArray[np.float32]

_KEYS = 128
"""Of a block: they and their values stay near the core while many queries see them."""
_QUERIES = 64
"""Tokens of a span that a thread takes at once, for one KV head: enough to gather keys for."""


class PrefillAttention:
    """The attention of a batch's spans, whose arrays are made ready once for all layers."""

    def __init__(self, table: PrefillTable, kv_slots_T: torch.Tensor, page_size: int, scale: float) -> None:
        """
        Args:
            kv_slots_T: where the tokens' own keys and values are written.
        """
        bounds = table.bounds_S3.numpy()
        firsts, lasts, starts = bounds.T
        self._num_blocks = int((-(-(lasts - firsts) // _QUERIES)).sum())
        self._num_seen = int(((lasts - firsts) * (starts + (lasts - firsts) // 2)).sum())
        self._spans = kv_slots_T.numpy(), bounds, table.pages_SP.numpy(), page_size, np.float32(scale)

    def __call__(self, q_TQD: _Array, k_cache: _Array, v_cache: _Array, out_TQD: _Array) -> None:
        """Each span's tokens attend to themselves causally and to all that lies before them; rows of no span stay.

        Args:
            k_cache: `[slots, N, D]`, in which the tokens' own keys are written; likewise `v_cache`.
            out_TQD: written.
        """
        compute = functools.partial(_attend_blocks, q_TQD, k_cache, v_cache, *self._spans, out_TQD)
        num_operations = 4 * self._num_seen * q_TQD.shape[1] * q_TQD.shape[2]
        in_parts(compute, self._num_blocks * k_cache.shape[1], num_operations)


@inner  # type: ignore[untyped-decorator]
def _gather(
    k_cache: Any,
    v_cache: Any,
    kv_slots: Any,
    pages: Any,
    page_size: Any,
    kv_head: Any,
    start: Any,
    begin: Any,
    size: Any,
    keys: Any,
    values: Any,
) -> None:
    """Take the keys and values of the positions `begin … begin + size - 1` from where they are; see `_attend_block`."""
    num_kv, dim = k_cache.shape[1], k_cache.shape[2]
    for s in range(size):
        at = begin + s
        slot = pages[at // page_size] * page_size + at % page_size if at < start else kv_slots[at - start]
        copy_row(address(k_cache, (slot * num_kv + kv_head) * dim), dim, address(keys, s * dim))
        copy_row(address(v_cache, (slot * num_kv + kv_head) * dim), dim, address(values, s * dim))


@inner  # type: ignore[untyped-decorator]
def _hide(scores: Any, first_own: Any, behind: Any, group: Any, seen: Any) -> None:
    """Keys that lie behind a row's token do not count for it; see `_attend_strip`."""
    for key in range(max(first_own, 0), seen):
        for r in range(min((key - first_own + 1) * group - behind, COLUMNS)):
            scores[key, r] = -np.inf


@inner  # type: ignore[untyped-decorator]
def _add_values(scores: Any, values: Any, seen: Any, goes_on: Any, sums: Any) -> None:
    """Of the positions that a strip sees, weighed by what its scores have become; see `_attend_strip`."""
    count, dim = sums.shape
    num_tiles = -(-count // MAX_ROWS)
    for column in range(0, dim, COLUMNS):
        for tile in range(num_tiles):
            row, next_row = tile * count // num_tiles, (tile + 1) * count // num_tiles
            multiply_turned(
                next_row - row,
                min(COLUMNS, dim - column),
                seen,
                address(scores, row),
                COLUMNS,
                address(values, column),
                dim,
                PANEL,
                address(sums, row * dim + column),
                dim,
                1 if goes_on else 0,
            )


@inner  # type: ignore[untyped-decorator]
def _attend_strip(
    queries: Any,
    keys: Any,
    values: Any,
    count: Any,
    first_own: Any,
    behind: Any,
    group: Any,
    size: Any,
    goes_on: Any,
    scores: Any,
    sums: Any,
    largest: Any,
    total: Any,
    factors: Any,
) -> None:
    """A strip of rows and a block of keys; see `_attend_block`.

    Args:
        queries: `[COLUMNS / 16, D, 16]`.
        count: rows that there are.
        first_own: positions of the block that the first row sees, if there are as many; each token's rows see one more
            than those of the token before it.
        behind: rows of the first token that are not in this strip.
        group: rows of a token.
        size: positions of the block.
        goes_on: whether there were blocks before this one.
        sums: `[count, D]`.
        largest: `[COLUMNS]`, likewise `total` and `factors`.
    """
    dim = keys.shape[1]
    seen = min(size, first_own + (behind + count - 1) // group)
    for key in range(0, seen, MAX_ROWS):
        multiply(
            min(MAX_ROWS, seen - key),
            COLUMNS,
            dim,
            address(keys, key * dim),
            dim,
            address(queries, 0),
            PANEL,
            dim * PANEL,
            address(scores, key * COLUMNS),
            COLUMNS,
            0,
            address(queries, 0),
            0,
        )
    _hide(scores, first_own, behind, group, seen)
    if not goes_on:
        largest[:], total[:] = -np.inf, 0
    for c in range(0, COLUMNS, LANES):
        so_far, added, factor = address(largest, c), address(total, c), address(factors, c)
        exponential_columns(address(scores, c), COLUMNS, seen, so_far, added, factor)
    if goes_on:
        for r in range(count):
            if factors[r] != np.float32(1):
                for i in range(dim):
                    sums[r, i] *= factors[r]
    _add_values(scores, values, seen, goes_on, sums)


@inner  # type: ignore[untyped-decorator]
def _pack_queries(
    q: Any, first_row: Any, first_head: Any, group: Any, num_rows: Any, scale: Any, offsets: Any, queries: Any
) -> None:
    """Rows behind the last one repeat it, up to whole strips, and nobody reads what they give; see `_attend_block`."""
    num_q, dim = q.shape[1], q.shape[2]
    whole, flat = dim // PANEL * PANEL, q.reshape(q.size)
    for panel in range(-(-num_rows // COLUMNS) * COLUMNS // PANEL):
        for r in range(PANEL):
            row = min(panel * PANEL + r, num_rows - 1)
            offsets[r] = ((first_row + row // group) * num_q + first_head + row % group) * dim
        pack_rows(address(q, 0), offsets, whole, scale, address(queries, panel * dim * PANEL))
        for i in range(whole, dim):
            for r in range(PANEL):
                queries[panel, i, r] = flat[offsets[r] + i] * scale


@inner  # type: ignore[untyped-decorator]
def _attend_block(
    q: Any,
    k_cache: Any,
    v_cache: Any,
    kv_slots: Any,
    pages: Any,
    page_size: Any,
    scale: Any,
    out: Any,
    kv_head: Any,
    first_row: Any,
    last_row: Any,
    start: Any,
    position: Any,
    keys: Any,
    values: Any,
    scores: Any,
    offsets: Any,
    queries: Any,
    sums: Any,
    softmax: Any,
) -> None:
    """The query heads of one KV head, for the rows `first_row … last_row - 1` of a span.

    Tokens with their heads are rows of one matrix, and so are the sums: taken from where they are, they would lie
    whole pages apart and displace each other from the cache.

    Args:
        kv_slots: of the span's positions from `start` on; those before it are in `pages`.
        position: of the first row.
        keys: room for `[_KEYS, D]`, likewise `values`; `scores` for `[_KEYS, COLUMNS]`.
        queries: room for `[_QUERIES · Q / N / 16, D, 16]`; `sums` for `[_QUERIES · Q / N, D]`.
        softmax: room for `[3, _QUERIES · Q / N]`: each row's largest score, sum of exponentials and factor.
    """
    group, dim, num_tokens = q.shape[1] // k_cache.shape[1], q.shape[2], last_row - first_row
    num_rows, first_head = num_tokens * group, kv_head * group
    _pack_queries(q, first_row, kv_head * group, group, num_rows, scale, offsets, queries)
    for begin in range(0, position + num_tokens, _KEYS):
        size = min(_KEYS, position + num_tokens - begin)
        _gather(k_cache, v_cache, kv_slots, pages, page_size, kv_head, start, begin, size, keys, values)
        # Rows that end before this block see nothing of it.
        for row in range(max(begin - position, 0) * group // COLUMNS * COLUMNS, num_rows, COLUMNS):
            last = min(row + COLUMNS, num_rows)
            _attend_strip(
                queries[row // PANEL : (row + COLUMNS) // PANEL],
                keys,
                values,
                last - row,
                position + 1 - begin + row // group,
                row % group,
                group,
                size,
                begin > 0,
                scores,
                sums[row:last],
                softmax[0, row : row + COLUMNS],
                softmax[1, row : row + COLUMNS],
                softmax[2, row : row + COLUMNS],
            )
    for row in range(num_rows):
        factor = np.float32(1) / softmax[1, row]
        for i in range(dim):
            out[first_row + row // group, first_head + row % group, i] = sums[row, i] * factor


@declare(  # type: ignore[untyped-decorator]
    "void(f4[:,:,::1], f4[:,:,::1], f4[:,:,::1], i8[::1], i8[:,::1], i8[:,::1], i8, f4, f4[:,:,::1], i8, i8)"
)
def _attend_blocks(
    q: Any,
    k_cache: Any,
    v_cache: Any,
    kv_slots: Any,
    bounds: Any,
    pages: Any,
    page_size: Any,
    scale: Any,
    out: Any,
    first: Any,
    last: Any,
) -> None:
    """Of all blocks of queries, span by span, and in a span head by head, those numbered `first … last - 1`."""
    num_kv, dim = k_cache.shape[1], k_cache.shape[2]
    keys, values = np.empty((_KEYS, dim), np.float32), np.empty((_KEYS, dim), np.float32)
    scores, offsets = np.empty((_KEYS, COLUMNS), np.float32), np.empty(PANEL, np.int64)
    room = -(-_QUERIES * (q.shape[1] // num_kv) // COLUMNS) * COLUMNS
    queries, sums = np.empty((room // PANEL, dim, PANEL), np.float32), np.empty((room, dim), np.float32)
    softmax = np.empty((3, room), np.float32)
    number = 0
    for span in range(bounds.shape[0]):
        first_row, last_row, start = bounds[span]
        num_blocks = -(-(last_row - first_row) // _QUERIES)
        for block in range(max(first - number, 0), min(last - number, num_blocks * num_kv)):
            row = first_row + block % num_blocks * _QUERIES
            _attend_block(
                q,
                k_cache,
                v_cache,
                kv_slots[first_row:],
                pages[span],
                page_size,
                scale,
                out,
                block // num_blocks,
                row,
                min(row + _QUERIES, last_row),
                start,
                start + row - first_row,
                keys,
                values,
                scores,
                offsets,
                queries,
                sums,
                softmax,
            )
        number += num_blocks * num_kv
