"""Memory of stacked weights that costs only what is used, and is given back slot by slot."""

from __future__ import annotations

import math
import mmap

import numpy as np
import torch

_FLOAT_BYTES = 4


class SlotMemory:
    """fp32 weights `[S, ...]` of all slots of a layer, in one piece. A slot that was never written takes no memory."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self._slot_bytes = math.prod(shape[1:]) * _FLOAT_BYTES
        self._map = mmap.mmap(-1, max(1, shape[0] * self._slot_bytes), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            # A stream of weights runs through fewer translations, as with numpy's own large arrays.
            self._map.madvise(mmap.MADV_HUGEPAGE)
        array = np.frombuffer(self._map, np.float32, math.prod(shape)).reshape(shape)
        self.weights = torch.from_numpy(array)

    def release(self, slot: int) -> None:
        """Give a slot's memory back, as far as it shares no page with its neighbours. It reads as zeros then."""
        first = -(-slot * self._slot_bytes // mmap.PAGESIZE) * mmap.PAGESIZE
        last = (slot + 1) * self._slot_bytes // mmap.PAGESIZE * mmap.PAGESIZE
        if last > first and hasattr(mmap, "MADV_DONTNEED"):
            self._map.madvise(mmap.MADV_DONTNEED, first, last - first)
