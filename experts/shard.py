"""One expert shard: weights, counters, and the answer to a call. It keeps no request state."""

from __future__ import annotations

from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from experts.grouped import MAX_ROWS, count_slots, cpu_kernel, grouped_swiglu
from experts.slots import EMPTY, ExpertSlots
from octet.errors import ExpertMissingError


class Rows(Protocol):
    """Token rows with the slots that they ask for; see `router.exchange.ExpertRows`."""

    @property
    def x_UH(self) -> torch.Tensor: ...
    @property
    def slots_UK(self) -> torch.Tensor: ...
    @property
    def weights_UK(self) -> torch.Tensor: ...


class ExpertShard:
    """Computes what its slots contribute to rows, and counts them. Used by one thread at a time."""

    def __init__(self, slots: ExpertSlots) -> None:
        self._slots = slots
        self._missing = {
            layer: np.array([expert == EMPTY for expert in experts], dtype=bool)
            for layer, experts in slots.held.items()
        }
        self._counts = {layer: np.zeros(len(experts), dtype=np.int64) for layer, experts in slots.held.items()}
        self._few_rows = cpu_kernel() if slots.on_fp32_cpu else None
        self.num_rows = 0

    @torch.inference_mode()
    def serve(self, layer: int, rows: Rows) -> torch.Tensor:
        """The weighted sums `[U, H]` in the dtype of the rows.

        Raises: ExpertMissingError if a row asks for a slot that holds no expert.
        """
        if layer not in self._counts:
            raise ExpertMissingError(f"layer {layer}: this shard holds layers {sorted(self._counts)}")
        counts_S = self._count(layer, rows.slots_UK)
        y_UH = self._compute(layer, rows, counts_S)
        self._counts[layer] += counts_S
        self.num_rows += len(rows.x_UH)
        return y_UH.to(rows.x_UH.dtype)

    def counts(self) -> dict[int, npt.NDArray[np.int64]]:
        """Tokens served since the start, by layer and slot. A copy."""
        return {layer: counts.copy() for layer, counts in self._counts.items()}

    def _compute(self, layer: int, rows: Rows, counts_S: npt.NDArray[np.int64]) -> torch.Tensor:
        gate_up, down = self._slots.gate_up[layer], self._slots.down[layer]
        if self._few_rows is not None and len(rows.x_UH) <= MAX_ROWS:
            return self._few_rows(rows.x_UH, rows.slots_UK, rows.weights_UK, gate_up, down)
        return grouped_swiglu(rows.x_UH, rows.slots_UK, rows.weights_UK, gate_up, down, counts_S)

    def _count(self, layer: int, slots_UK: torch.Tensor) -> npt.NDArray[np.int64]:
        missing_S = self._missing[layer]
        counts_S = count_slots(slots_UK, len(missing_S))
        if len(counts_S) > len(missing_S) or counts_S[missing_S].any():
            asked = counts_S.nonzero()[0].tolist()
            absent = [slot for slot in asked if slot >= len(missing_S) or missing_S[slot]]
            raise ExpertMissingError(f"layer {layer}: no expert in slots {absent} of {len(missing_S)}")
        return counts_S
