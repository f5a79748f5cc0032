"""One expert shard: weights, counters, and the answer to a call. It keeps no request state."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING, Protocol

import numpy as np
import numpy.typing as npt
import torch

from experts.grouped import count_slots, grouped_cpu, grouped_gpu, grouped_swiglu
from experts.slots import EMPTY, ExpertSlots
from model.threads import in_parts, num_threads
from octet.errors import ExpertMissingError

PIECE_OPERATIONS = 2**27
"""Multiplications and additions between two pauses: half a millisecond of a core with AVX-512, two with AVX2."""

if TYPE_CHECKING:
    from experts.grouped_gpu import SlotCounters

_Panels = npt.NDArray[np.float32]
_Arrays = tuple[npt.NDArray[np.float32], npt.NDArray[np.int32], npt.NDArray[np.float32]]


class Rows(Protocol):
    """Token rows with the slots that they ask for; see `router.exchange.ExpertRows`."""

    @property
    def x_UH(self) -> torch.Tensor: ...
    @property
    def slots_UK(self) -> torch.Tensor: ...
    @property
    def weights_UK(self) -> torch.Tensor: ...
    @property
    def arrays(self) -> _Arrays: ...


class Pause(Protocol):
    """Lets other rows be served within a long computation."""

    @property
    def due(self) -> npt.NDArray[np.int64]:
        """`[1]`: not 0 when it shall be called behind the piece that is under way. Compiled code looks at it."""

    def __call__(self) -> object: ...


_NEVER = np.zeros(1, np.int64)


class ExpertShard:
    """Computes what its slots contribute to rows, and counts them. One thread at a time serves; meanwhile others may
    empty slots and read the counts."""

    def __init__(self, slots: ExpertSlots) -> None:
        self._slots = slots
        self._counts = {layer: np.zeros(len(slots.held(layer)), dtype=np.int64) for layer in slots.layers}
        self._released = {layer: np.zeros(slots.num_experts, dtype=np.int64) for layer in slots.layers}
        self._releasing = threading.Lock()
        """While what a slot has served becomes what its expert has: it is counted in one of both places."""
        self.num_rows = 0
        self._num_activated = 0
        self._on_device: dict[int, SlotCounters] = {}
        if slots.packed:
            # Compiled now, or loaded from where it was compiled before, so that no request waits for it.
            grouped_cpu()
        elif slots.device.type == "cuda":
            self._on_device = {
                layer: grouped_gpu().slot_counters(len(slots.held(layer)), slots.device) for layer in slots.layers
            }

    @property
    def num_activated(self) -> int:
        """Experts hit, summed over calls: what a call costs where reading weights is what takes time."""
        return self._num_activated + sum(int(counters.activated) for counters in self._on_device.values())

    def serve(
        self,
        layer: int,
        rows: Rows,
        room_UH: torch.Tensor | None = None,
        pause: Pause | None = None,
    ) -> torch.Tensor:
        """The weighted sums `[U, H]` in the dtype of the rows.

        Args:
            room_UH: where they may be written and returned.
            pause: called where it is due within a long computation on a CPU. None if these rows let no others pass.

        Raises: ExpertMissingError if a row asks for a slot that holds no expert. On a GPU nobody waits to see that; all
        of the answer is NaN then.
        """
        if layer not in self._counts:
            raise ExpertMissingError(f"layer {layer}: this shard holds layers {sorted(self._counts)}")
        if self._slots.packed:
            y_UH = torch.empty_like(rows.x_UH) if room_UH is None else room_UH
            self._compute_packed(layer, rows, y_UH, pause)
        elif self._on_device:
            y_UH = self._compute_queued(layer, rows)
        else:
            y_UH = self._compute_stacked(layer, rows)
        self.num_rows += y_UH.shape[0]
        return y_UH

    def counts(self) -> dict[int, npt.NDArray[np.int64]]:
        """Tokens served since the start, `[E]` by logical expert for each layer. A copy."""
        with self._releasing:
            return {layer: self._count(layer) for layer in self._counts}

    def release(self, layer: int, slot: int) -> None:
        """Empty a slot that nobody asks for any more; what it served stays counted."""
        with self._releasing:
            expert = self._slots.held(layer)[slot]
            if expert != EMPTY:
                self._released[layer][expert] += self._served(layer)[slot]
            if self._on_device:
                self._on_device[layer].served_S[slot] = 0
            self._counts[layer][slot] = 0
            self._slots.release(layer, slot)

    def _count(self, layer: int) -> npt.NDArray[np.int64]:
        counts_E, held_S = self._released[layer].copy(), np.array(self._slots.held(layer), dtype=np.int64)
        np.add.at(counts_E, held_S[held_S != EMPTY], self._served(layer)[held_S != EMPTY])
        return counts_E

    def _served(self, layer: int) -> npt.NDArray[np.int64]:
        """Rows that each slot has served, `[S]`."""
        return self._on_device[layer].served_S.cpu().numpy() if self._on_device else self._counts[layer]

    @torch.inference_mode()
    def _compute_queued(self, layer: int, rows: Rows) -> torch.Tensor:
        """On a GPU, without waiting for it."""
        slots = self._slots
        return grouped_gpu().grouped_swiglu(  # type: ignore[no-any-return]
            rows.x_UH,
            rows.slots_UK,
            rows.weights_UK,
            slots.gate_up[layer],
            slots.down[layer],
            slots.holds_on_device[layer],
            self._on_device[layer],
        )

    def _compute_packed(self, layer: int, rows: Rows, y_UH: torch.Tensor, pause: Pause | None) -> None:
        holds_S, (gate_up, down) = self._slots.holds[layer], self._slots.arrays[layer]
        x, slots, weights = rows.arrays
        y = y_UH.numpy()
        operations = 2 * (gate_up.size + down.size) // max(1, len(holds_S))
        most_operations = PIECE_OPERATIONS * num_threads()
        short = slots.size * operations <= most_operations
        if num_threads() == 1 and (short or pause is None):
            # One call: what a frame of a decode step takes is not much more than what calls do.
            hit = grouped_cpu().serve_rows(x, slots, weights, holds_S, self._counts[layer], gate_up, down, y)
            if hit < 0:
                raise self._missing(layer, -1 - hit)
            self._num_activated += hit
            return
        counts_S = np.zeros(len(holds_S), dtype=np.int64)
        missing = grouped_cpu().count_rows(slots, holds_S, counts_S)
        if missing >= 0:
            raise self._missing(layer, missing)
        self._note(layer, counts_S)
        y[:] = 0
        if short:
            self._share_slots(rows, gate_up, down, counts_S, int(counts_S.sum()) * operations, y)
            return
        arrays, most_rows = (x, slots, weights, gate_up, down), most_operations // operations
        if num_threads() == 1 and pause is not None:
            slot, last = 0, len(holds_S)
            while (slot := grouped_cpu().grouped_swiglu(*arrays, slot, last, most_rows, pause.due, y)) < last:
                pause()
            return
        for begin, end, num_pairs in _pieces(counts_S, most_rows):
            if begin > 0 and pause is not None and pause.due[0]:
                pause()
            self._share_rows((x, slots, weights), gate_up, down, (begin, end), num_pairs * operations, y)

    @staticmethod
    def _share_slots(
        rows: Rows,
        gate_up: _Panels,
        down: _Panels,
        counts_S: npt.NDArray[np.int64],
        num_operations: int,
        y: _Panels,
    ) -> None:
        """Each thread reads the weights of its own slots: few rows are bound by that. What they compute is added up in
        the order of the slots, as one thread does it: the bits of a row are the same beside any others."""
        x, slots, weights = rows.arrays
        begins = np.concatenate(([0], counts_S.cumsum()))
        out = np.empty((begins[-1], x.shape[1]), np.float32)

        def compute(first: int, last: int) -> None:
            some = out[begins[first] : begins[last]]
            grouped_cpu().each_swiglu(x, slots, weights, gate_up, down, first, last, some)

        # Those behind the last one that is asked for are no thread's share.
        num_asked = len(counts_S) - int((counts_S[::-1] > 0).argmax())
        in_parts(compute, num_asked, num_operations, parts_per_thread=2)
        grouped_cpu().add_each(out, slots, weights, len(counts_S), y)

    @staticmethod
    def _share_rows(
        rows: _Arrays, gate_up: _Panels, down: _Panels, slots: tuple[int, int], num_operations: int, y: _Panels
    ) -> None:
        """Each thread computes some rows' sums over these slots: many rows are bound by arithmetic."""

        def compute(first: int, last: int) -> None:
            some = (array[first:last] for array in rows)
            grouped_cpu().grouped_swiglu(*some, gate_up, down, *slots, 0, _NEVER, y[first:last])

        in_parts(compute, len(y), num_operations, parts_per_thread=2)

    @torch.inference_mode()
    def _compute_stacked(self, layer: int, rows: Rows) -> torch.Tensor:
        holds_S = self._slots.holds[layer]
        counts_S = count_slots(rows.slots_UK, len(holds_S))
        for slot in counts_S.nonzero()[0].tolist():
            if slot >= len(holds_S) or not holds_S[slot]:
                raise self._missing(layer, slot)
        gate_up, down = self._slots.gate_up[layer], self._slots.down[layer]
        y_UH = grouped_swiglu(rows.x_UH, rows.slots_UK, rows.weights_UK, gate_up, down, counts_S)
        self._note(layer, counts_S)
        return y_UH.to(rows.x_UH.dtype)

    def _note(self, layer: int, counts_S: npt.NDArray[np.int64]) -> None:
        self._counts[layer] += counts_S
        self._num_activated += int(np.count_nonzero(counts_S))

    def _missing(self, layer: int, slot: int) -> ExpertMissingError:
        return ExpertMissingError(f"layer {layer}: no expert in slot {slot} of {len(self._slots.holds[layer])}")


def _pieces(counts_S: npt.NDArray[np.int64], most_rows: int) -> Iterator[tuple[int, int, int]]:
    """Consecutive slots that are asked for by about so many rows together, from the first to the last one asked for:
    the first of a piece, the one behind the last, and their rows."""
    begin, num_rows = 0, 0
    for slot in np.flatnonzero(counts_S).tolist():
        count = int(counts_S[slot])
        if num_rows > 0 and num_rows + count > most_rows:
            yield begin, slot, num_rows
            begin, num_rows = slot, 0
        num_rows += count
    if num_rows > 0:
        yield begin, slot + 1, num_rows
