"""Attention of many queries of one sequence over its paged keys and values, on an fp32 CPU.

Keys are taken a block at a time, packed as a matrix's panels are, and the softmax is carried on from block to block
(Milakov and Gimelshein, Online normalizer calculation for softmax, 2018; Dao et al., FlashAttention, 2022). Blocks
begin at multiples of their size, whatever a step computes: a row comes out the same, bit for bit, however its prompt is
cut into chunks and whatever of it was cached.

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
from model.rows_cpu import exp, exponentials, largest_of
from model.threads import in_parts
from model.tiles_cpu import COLUMNS, MAX_ROWS, multiply
from model.vectors_cpu import address, declare, inner

_Array = npt.NDArray[np.float32]

_KEYS = 128
"""Of a block: packed, they and their values stay near the core while many queries see them."""
_QUERIES = 64
"""Tokens of a span that a thread takes at once, for one KV head: enough to pack keys for."""


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
def _carry_on(scores: Any, own: Any, largest: Any, total: Any, row: Any) -> Any:
    """Turn a row's scores into exponentials, of which the first `own` count.

    Returns: what the sums so far are to be multiplied by.
    """
    if own <= 0:
        scores[:] = 0
        return np.float32(1)
    # A score that is NaN is no maximum, but makes the sum NaN.
    most = largest_of(address(scores, 0), own, largest[row])
    added = exponentials(address(scores, 0), own, most)
    for s in range(own, scores.shape[0]):
        scores[s] = 0
    factor = np.float32(1)
    if most != largest[row]:
        factor = exp(largest[row] - most)
    total[row] = total[row] * factor + added
    largest[row] = most
    return factor


@inner  # type: ignore[untyped-decorator]
def _pack(
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
    dim = k_cache.shape[2]
    for s in range(size):
        at = begin + s
        slot = pages[at // page_size] * page_size + at % page_size if at < start else kv_slots[at - start]
        for i in range(dim):
            keys[s // PANEL, i, s % PANEL] = k_cache[slot, kv_head, i]
            values[s, i] = v_cache[slot, kv_head, i]
    # Keys behind the last one are nobody's, but what lies there must not be NaN.
    for s in range(size, -(-size // COLUMNS) * COLUMNS):
        keys[s // PANEL, :, s % PANEL] = 0


@inner  # type: ignore[untyped-decorator]
def _attend_tile(
    queries: Any,
    keys: Any,
    values: Any,
    first_own: Any,
    behind: Any,
    group: Any,
    size: Any,
    goes_on: Any,
    scores: Any,
    sums: Any,
    largest: Any,
    total: Any,
) -> None:
    """A tile of rows and a block of keys; see `_attend_block`.

    Args:
        first_own: positions of the block that the first row sees, if there are as many; each token's rows see one more
            than those of the token before it.
        behind: rows of the first token that are not in this tile.
        group: rows of a token.
        size: positions of the block.
        goes_on: whether there were blocks before this one.
    """
    count, dim = queries.shape
    seen = min(size, first_own + (behind + count - 1) // group)
    for key in range(0, seen, COLUMNS):
        multiply(
            count,
            COLUMNS,
            dim,
            address(queries, 0),
            dim,
            address(keys, key * dim),
            PANEL,
            dim * PANEL,
            address(scores, key),
            _KEYS,
            0,
            address(keys, key * dim),
            0,
        )
    for r in range(count):
        if not goes_on:
            largest[r], total[r] = scores[r, 0], np.float32(0)
        factor = _carry_on(scores[r, :seen], min(first_own + (behind + r) // group, seen), largest, total, r)
        if goes_on and factor != np.float32(1):
            for i in range(dim):
                sums[r, i] *= factor
    for column in range(0, dim, COLUMNS):
        multiply(
            count,
            min(COLUMNS, dim - column),
            seen,
            address(scores, 0),
            _KEYS,
            address(values, column),
            dim,
            PANEL,
            address(sums, column),
            dim,
            1 if goes_on else 0,
            address(values, column),
            0,
        )


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
    queries: Any,
    sums: Any,
    largest: Any,
    total: Any,
) -> None:
    """The query heads of one KV head, for the rows `first_row … last_row - 1` of a span.

    Tokens with their heads are rows of one matrix, and so are the sums: taken from where they are, they would lie
    whole pages apart and displace each other from the cache.

    Args:
        kv_slots: of the span's positions from `start` on; those before it are in `pages`.
        position: of the first row.
        keys: room for `[_KEYS / 16, D, 16]`; `values` for `[_KEYS, D]`; `scores` for `[MAX_ROWS, _KEYS]`.
        queries: room for `[_QUERIES · Q / N, D]`, likewise `sums`.
        largest: room for each row's largest score and, in `total`, for its sum of exponentials.
    """
    group, dim, num_tokens = q.shape[1] // k_cache.shape[1], q.shape[2], last_row - first_row
    num_rows, first_head = num_tokens * group, kv_head * group
    for row in range(num_rows):
        for i in range(dim):
            queries[row, i] = q[first_row + row // group, first_head + row % group, i] * scale
    for begin in range(0, position + num_tokens, _KEYS):
        size = min(_KEYS, position + num_tokens - begin)
        _pack(k_cache, v_cache, kv_slots, pages, page_size, kv_head, start, begin, size, keys, values)
        # Rows that end before this block see nothing of it.
        for row in range(max(begin - position, 0) * group // MAX_ROWS * MAX_ROWS, num_rows, MAX_ROWS):
            last = min(row + MAX_ROWS, num_rows)
            _attend_tile(
                queries[row:last],
                keys,
                values,
                position + 1 - begin + row // group,
                row % group,
                group,
                size,
                begin > 0,
                scores,
                sums[row:last],
                largest[row:last],
                total[row:last],
            )
    for row in range(num_rows):
        factor = np.float32(1) / total[row]
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
    keys, values = np.empty((_KEYS // PANEL, dim, PANEL), np.float32), np.empty((_KEYS, dim), np.float32)
    scores = np.empty((MAX_ROWS, _KEYS), np.float32)
    room = _QUERIES * (q.shape[1] // num_kv)
    queries, sums = np.empty((room, dim), np.float32), np.empty((room, dim), np.float32)
    largest, total = np.empty(room, np.float32), np.empty(room, np.float32)
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
                queries,
                sums,
                largest,
                total,
            )
        number += num_blocks * num_kv
