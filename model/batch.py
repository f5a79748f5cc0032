"""What one forward pass computes: the tokens of several sequences, packed.

Shapes: `T` tokens, `B` sequences, `P` pages of the longest sequence.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch

from model.pages import PagePool

Wanted = Literal["all", "last", "none"]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """The consecutive tokens of one sequence that a pass computes; everything before `start` has its KV already."""

    token_ids: Sequence[int]
    start: int
    pages: Sequence[int]
    """The page table, covering at least `start + len(token_ids)` tokens."""
    by_token: bool = False
    """Attend with each token on its own, which pays where a few of them follow a long context, as in an answer. A
    prompt's tokens never do, not even a single one: its bits would not be those that it has in a longer chunk."""
    wanted: Wanted = "all"
    """Tokens whose final hidden states somebody reads; of the others, the last layer computes keys and values alone."""

    @property
    def num_wanted(self) -> int:
        return {"all": len(self.token_ids), "last": 1, "none": 0}[self.wanted]

    @property
    def stop(self) -> int:
        return self.start + len(self.token_ids)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """Spans packed along T, with the indices that attention needs, built once and used by every layer."""

    token_ids_T: torch.Tensor
    positions_T: torch.Tensor
    kv_slots_T: torch.Tensor
    """The flat KV slot that each token writes."""
    prefill: tuple[PrefillSpan, ...]
    prefill_table: PrefillTable | None
    """All of `prefill` for one compiled call on a CPU."""
    decode: DecodeSpans | None
    """The tokens of all spans that attend by token, together; they come first in T."""
    wanted: WantedRows | None = None
    """The rows that the last layer computes; None for all."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class PrefillSpan:
    """Consecutive positions of one sequence; they see themselves causally, and all that lies before `start`."""

    rows: slice
    start: int
    pages: torch.Tensor
    """The page table of positions 0..start."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class WantedRows:
    """The last tokens of some spans `W`."""

    rows_W: torch.Tensor
    decode: DecodeSpans | None
    """They attend on their own, however their prompt is cut into passes; None where there are none."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class PrefillTable:
    """Prefill spans `S` as numbers."""

    bounds_S3: torch.Tensor
    """First row, the one behind the last, and the position of the first."""
    pages_SP: torch.Tensor
    """The page tables of what lies before them."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class DecodeSpans:
    """Each token is a row B of its own; those of one sequence share its pages."""

    pages_BP: torch.Tensor
    lengths_B: torch.Tensor
    """Positions that exist, the new one included."""

    def mask_BL(self, page_size: int) -> torch.Tensor:
        """`[B, P · page_size]`, true on positions that exist."""
        positions_L = torch.arange(self.pages_BP.shape[1] * page_size, device=self.lengths_B.device)
        return positions_L < self.lengths_B.unsqueeze(1)


def halve(spans: Sequence[Span]) -> tuple[list[Span], list[Span]]:
    """Two parts of equally many tokens, one at most more; a span in the middle is cut, its end depends on its begin."""
    room = (sum(len(span.token_ids) for span in spans) + 1) // 2
    first: list[Span] = []
    second: list[Span] = []
    for span in spans:
        take = min(room, len(span.token_ids))
        room -= take
        if take == len(span.token_ids):
            first.append(span)
        elif take == 0:
            second.append(span)
        else:
            wanted: Wanted = "none" if span.wanted == "last" else span.wanted
            first.append(dataclasses.replace(span, token_ids=span.token_ids[:take], wanted=wanted))
            second.append(dataclasses.replace(span, token_ids=span.token_ids[take:], start=span.start + take))
    return first, second


def build_batch(spans: Sequence[Span], pool: PagePool, device: torch.device) -> tuple[Batch, list[slice]]:
    """Pack spans; those that attend by token are moved to the front.

    Returns: the batch, and for each span, in the order given, its rows of what a pass returns.
    """
    order = sorted(range(len(spans)), key=lambda index: not spans[index].by_token)
    token_ids: list[int] = []
    positions: list[int] = []
    kv_slots: list[int] = []
    prefill: list[PrefillSpan] = []
    last_rows = [0] * len(spans)
    singles = [span for span in spans if span.by_token]
    for index in order:
        span = spans[index]
        first = len(token_ids)
        token_ids += span.token_ids
        positions += range(span.start, span.stop)
        kv_slots += pool.slots(span.pages, span.start, span.stop)
        last_rows[index] = len(token_ids) - 1
        if not span.by_token:
            before = _numbers(span.pages[: pool.pages_for(span.start)], device)
            prefill.append(PrefillSpan(rows=slice(first, len(token_ids)), start=span.start, pages=before))
    batch = Batch(
        token_ids_T=_numbers(token_ids, device),
        positions_T=_numbers(positions, device),
        kv_slots_T=_numbers(kv_slots, device),
        prefill=tuple(prefill),
        prefill_table=_prefill_table(prefill) if prefill and device.type == "cpu" else None,
        decode=_decode_spans(singles, pool, device) if singles else None,
    )
    if any(span.wanted == "all" for span in spans):
        return batch, [
            slice(last + 1 - len(span.token_ids), last + 1) for span, last in zip(spans, last_rows, strict=True)
        ]
    return _with_wanted(batch, spans, last_rows, pool, device)


def _with_wanted(
    batch: Batch, spans: Sequence[Span], last_rows: Sequence[int], pool: PagePool, device: torch.device
) -> tuple[Batch, list[slice]]:
    """A pass of which no span is wanted as a whole."""
    wanted = [(span, row) for span, row in zip(spans, last_rows, strict=True) if span.wanted == "last"]
    singles = [dataclasses.replace(span, token_ids=span.token_ids[-1:], start=span.stop - 1) for span, _ in wanted]
    rows = WantedRows(
        rows_W=_numbers([row for _, row in wanted], device),
        decode=_decode_spans(singles, pool, device) if singles else None,
    )
    stops = itertools.accumulate(span.num_wanted for span in spans)
    kept = [slice(stop - span.num_wanted, stop) for span, stop in zip(spans, stops, strict=True)]
    return dataclasses.replace(batch, wanted=rows), kept


def build_rows(spans: Sequence[Span], pool: PagePool, device: torch.device) -> Batch:
    """Pack spans in their order, to write keys and values only: nothing attends."""
    return Batch(
        token_ids_T=_numbers([token_id for span in spans for token_id in span.token_ids], device),
        positions_T=torch.cat([torch.arange(span.start, span.stop, device=device) for span in spans]),
        kv_slots_T=_numbers([slot for span in spans for slot in pool.slots(span.pages, span.start, span.stop)], device),
        prefill=(),
        prefill_table=None,
        decode=None,
    )


def _prefill_table(spans: Sequence[PrefillSpan]) -> PrefillTable:
    bounds = [(span.rows.start, span.rows.stop, span.start) for span in spans]
    return PrefillTable(
        bounds_S3=torch.tensor(bounds, dtype=torch.int64),
        pages_SP=torch.nn.utils.rnn.pad_sequence([span.pages for span in spans], batch_first=True),
    )


def _decode_spans(spans: Sequence[Span], pool: PagePool, device: torch.device) -> DecodeSpans:
    num_pages = max(pool.pages_for(span.stop) for span in spans)
    padded = [[*span.pages[:num_pages], *[0] * (num_pages - len(span.pages))] for span in spans]
    pages = [row for row, span in zip(padded, spans, strict=True) for _ in span.token_ids]
    lengths = [stop for span in spans for stop in range(span.start + 1, span.stop + 1)]
    return DecodeSpans(pages_BP=_numbers(pages, device), lengths_B=_numbers(lengths, device))


def _numbers(values: Sequence[int] | Sequence[Sequence[int]], device: torch.device) -> torch.Tensor:
    """int64. Numpy reads lists in a quarter of the time that torch takes."""
    return torch.from_numpy(np.array(values, np.int64)).to(device)
