"""What one forward pass computes: the tokens of several sequences, packed.

Shapes: `T` tokens, `B` sequences, `P` pages of the longest sequence.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch

from model.pages import PagePool


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """The consecutive tokens of one sequence that a pass computes; everything before `start` has its KV already."""

    token_ids: Sequence[int]
    start: int
    pages: Sequence[int]
    """The page table, covering at least `start + len(token_ids)` tokens."""

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
    decode: DecodeSpans | None
    """All spans of a single token, together; they come first in T."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class PrefillSpan:
    """Consecutive positions of one sequence; they see themselves causally, and all that lies before `start`."""

    rows: slice
    start: int
    pages: torch.Tensor
    """The page table of positions 0..start."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class DecodeSpans:
    pages_BP: torch.Tensor
    lengths_B: torch.Tensor
    """Positions that exist, the new one included."""
    mask_BL: torch.Tensor
    """`[B, P · page_size]`, true on positions that exist."""


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
            first.append(dataclasses.replace(span, token_ids=span.token_ids[:take]))
            second.append(dataclasses.replace(span, token_ids=span.token_ids[take:], start=span.start + take))
    return first, second


def build_batch(spans: Sequence[Span], pool: PagePool, device: torch.device) -> tuple[Batch, list[int]]:
    """Pack spans; single-token ones are moved to the front.

    Returns: the batch, and for each span, in the order given, the row of its last token.
    """
    order = sorted(range(len(spans)), key=lambda index: len(spans[index].token_ids) > 1)
    token_ids: list[int] = []
    positions: list[int] = []
    kv_slots: list[int] = []
    prefill: list[PrefillSpan] = []
    last_rows = [0] * len(spans)
    singles = [spans[index] for index in order if len(spans[index].token_ids) == 1]
    for index in order:
        span = spans[index]
        first = len(token_ids)
        token_ids += span.token_ids
        positions += range(span.start, span.stop)
        kv_slots += pool.slots(span.pages, span.start, span.stop)
        last_rows[index] = len(token_ids) - 1
        if len(span.token_ids) > 1:
            before = torch.tensor(span.pages[: pool.pages_for(span.start)], dtype=torch.int64, device=device)
            prefill.append(PrefillSpan(rows=slice(first, len(token_ids)), start=span.start, pages=before))
    batch = Batch(
        token_ids_T=torch.tensor(token_ids, device=device),
        positions_T=torch.tensor(positions, device=device),
        kv_slots_T=torch.tensor(kv_slots, device=device),
        prefill=tuple(prefill),
        decode=_decode_spans(singles, pool, device) if singles else None,
    )
    return batch, last_rows


def _decode_spans(spans: Sequence[Span], pool: PagePool, device: torch.device) -> DecodeSpans:
    num_pages = max(pool.pages_for(span.stop) for span in spans)
    pages = [[*span.pages[:num_pages], *[0] * (num_pages - len(span.pages))] for span in spans]
    lengths = torch.tensor([span.stop for span in spans], device=device)
    mask = torch.arange(num_pages * pool.page_size, device=device) < lengths.unsqueeze(1)
    return DecodeSpans(pages_BP=torch.tensor(pages, device=device), lengths_B=lengths, mask_BL=mask)
