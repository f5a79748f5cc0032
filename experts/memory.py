"""Memory of stacked weights that costs only what is used, and is given back slot by slot."""

from __future__ import annotations

import math
import mmap

import numpy as np
import torch

from model.host_memory import map_pages

_FLOAT_BYTES = 4


class SlotMemory:
    """fp32 weights `[S, ...]` of all slots of a layer, in one piece. A slot that was never written takes no memory."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self._slot_bytes = math.prod(shape[1:]) * _FLOAT_BYTES
        self._map = map_pages(shape[0] * self._slot_bytes)
        array = np.frombuffer(self._map, np.float32, math.prod(shape)).reshape(shape)
        self.weights = torch.from_numpy(array)

    def release(self, slot: int) -> None:
        """Give a slot's memory back, as far as it shares no page with its neighbours. It reads as zeros then."""
        first = -(-slot * self._slot_bytes // mmap.PAGESIZE) * mmap.PAGESIZE
        last = (slot + 1) * self._slot_bytes // mmap.PAGESIZE * mmap.PAGESIZE
        if last > first and hasattr(mmap, "MADV_DONTNEED"):
            self._map.madvise(mmap.MADV_DONTNEED, first, last - first)
