"""What a captured decode step is told: token ids, positions, pages, always at the same place.

Shapes: `B` rows of a batch, `P` pages of the longest sequence that may be.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from model.batch import Batch, DecodeSpans, Span
from model.pages import PagePool

_MOST_TAKEN_BACK = 32
"""Pages at the end of a page table that may have been taken back and replaced since the last step: those of drafts."""


class StepInputs:
    """The inputs of batches of up to so many rows, in one place of the device's memory."""

    def __init__(self, most_rows: int, most_pages: int, nobodys_slot: int, device: torch.device) -> None:
        """
        Args:
            nobodys_slot: where rows that only fill a batch up write.
        """
        self._nobodys_slot = nobodys_slot
        # Pinned, so that copies to the device are queued like its kernels.
        pinned = device.type == "cuda"
        self._host_4B = torch.zeros((4, most_rows), dtype=torch.int64, pin_memory=pinned)
        self._host_BP = torch.zeros((most_rows, most_pages), dtype=torch.int32, pin_memory=pinned)
        self._numbers_4B, self._pages_BP = self._host_4B.numpy(), self._host_BP.numpy()
        self._device_4B = self._host_4B.to(device, copy=True)
        self._device_BP = self._host_BP.to(device, copy=True)
        self._written: list[tuple[Sequence[int], int]] = [((), 0)] * most_rows

    def fill(self, spans: Sequence[Span], pool: PagePool) -> None:
        """Write a batch, and have nothing in the rows behind it. What the device computed from the last one is done."""
        tokens_B, positions_B, slots_B, lengths_B = self._numbers_4B
        tokens_B[:], positions_B[:], slots_B[:], lengths_B[:] = 0, 0, self._nobodys_slot, 0
        row, widest = 0, 1
        for span in spans:
            count = len(span.token_ids)
            rows = slice(row, row + count)
            tokens_B[rows] = span.token_ids
            positions_B[rows] = range(span.start, span.stop)
            slots_B[rows] = pool.slots(span.pages, span.start, span.stop)
            lengths_B[rows] = range(span.start + 1, span.stop + 1)
            num_pages = pool.pages_for(span.stop)
            widest = max(widest, num_pages)
            for each in range(row, row + count):
                self._write_pages(each, span.pages, num_pages)
            row += count
        self._device_4B.copy_(self._host_4B, non_blocking=True)
        if row:
            self._device_BP[:row, :widest].copy_(self._host_BP[:row, :widest], non_blocking=True)

    def batch(self, size: int) -> Batch:
        """The first so many rows, as views: what is filled in later is there, too."""
        tokens_B, positions_B, slots_B, lengths_B = self._device_4B[:, :size]
        return Batch(
            token_ids_T=tokens_B,
            positions_T=positions_B,
            kv_slots_T=slots_B,
            prefill=(),
            prefill_table=None,
            decode=DecodeSpans(pages_BP=self._device_BP[:size], lengths_B=lengths_B),
        )

    def _write_pages(self, row: int, pages: Sequence[int], num_pages: int) -> None:
        """A sequence's table grows at its end, so that of one that was here before only the end is written."""
        before, written = self._written[row]
        first = max(0, min(written, num_pages) - _MOST_TAKEN_BACK) if before is pages else 0
        self._pages_BP[row, first:num_pages] = pages[first:num_pages]
        self._written[row] = pages, num_pages
