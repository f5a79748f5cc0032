"""How long steps of attention workers take: their own part, the way of the rows, the shards, and waiting for them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from ops.simulate.contention import ALONE, SharedCores, contend, layer_s
from ops.simulate.costs import Costs
from ops.simulate.decode_pool import DecodePool
from ops.simulate.expert_pool import ExpertPool
from ops.simulate.prefill_worker import Chunk
from ops.simulate.shape import Shape

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Flags = npt.NDArray[np.bool_]


class _Layers(NamedTuple):
    """One layer of several workers' steps, an entry each; see `contend`."""

    compute_s: Floats
    way_s: Floats
    peak_s: Floats
    fullest_s: Floats
    """Of the shard with the most to do over all layers: it is full first."""
    frames: Ints
    prefill: Flags
    behind: Flags


class StepTimes:
    """Waits are those of the last `update`."""

    def __init__(
        self,
        shape: Shape,
        costs: Costs,
        ping_pong_rows: int | None,
        weight_behind: float,
        decode: DecodePool,
        experts: ExpertPool,
    ) -> None:
        """
        Args:
            weight_behind: of the threads of a prefill worker that has stepped back, where cores are shared; those of
                other members have 1.
        """
        self._shape, self._costs, self._ping_pong = shape, costs, ping_pong_rows
        self._weight_behind = weight_behind
        self._decode, self._experts = decode, experts
        self._num_layers = max(1, len(shape.moe_layers))
        self._num_decoding = 0
        """Decode workers that run something."""
        self.contention = ALONE
        self.wait_share = {"prefill": 0.0, "decode": 0.0}
        """Of steps, by pool, the share that does not go by with the worker's own computing."""

    def update(self, rows: Ints, chunks: Iterable[Chunk]) -> None:
        """Work the waits out anew for the decode workers in `rows` and the prefill workers that compute `chunks`."""
        self._num_decoding = len(rows)
        decode, prefill = self._decode_layers(rows), self._prefill_layers(list(chunks))
        together = _Layers(*(np.concatenate(pair) for pair in zip(decode, prefill, strict=True)))
        self.contention = contend(
            *together, self._experts.num_shards, self._costs.expert_piece_s, self._shared_cores(rows, together.prefill)
        )
        self.wait_share = {"prefill": self._wait_share(prefill), "decode": self._wait_share(decode)}

    def decode_steps_s(self, rows: Ints) -> Floats:
        return self._layers_s(self._decode_layers(rows)) * self._num_layers

    def chunk_s(self, chunk: Chunk) -> float:
        return float(self._layers_s(self._prefill_layers([chunk]))[0]) * self._num_layers

    def _shared_cores(self, rows: Ints, prefill: Flags) -> SharedCores | None:
        costs = self._costs
        if costs.cores == 0:
            return None
        tokens_per_s = float((self._decode.batch[rows] / self.decode_steps_s(rows)).sum()) if len(rows) else 0.0
        return SharedCores(
            cores=costs.cores,
            others=costs.others_cores + costs.others_per_token_s * tokens_per_s,
            threads=np.where(prefill, float(costs.worker_threads), costs.decode_cores),
            weight_behind=self._weight_behind,
            turn_s=costs.turn_s,
        )

    def _decode_layers(self, rows: Ints) -> _Layers:
        costs, pool = self._costs, self._decode
        own_s = (
            costs.decode_fixed_s
            + costs.decode_per_sequence_s * pool.batch[rows]
            + costs.decode_per_attended_s * pool.context[rows]
        )
        tokens = pool.batch[rows].astype(np.int64)
        none = np.zeros(len(rows), np.bool_)
        return self._layers(own_s, tokens, none, none)

    def _prefill_layers(self, chunks: list[Chunk]) -> _Layers:
        costs = self._costs
        tokens = np.array([chunk.tokens for chunk in chunks], dtype=np.int64)
        attended = np.array([chunk.attended for chunk in chunks])
        own_s = costs.prefill_fixed_s + costs.prefill_per_token_s * tokens + costs.prefill_per_attended_s * attended
        behind = np.array([chunk.behind for chunk in chunks], np.bool_)
        return self._layers(own_s, tokens, np.ones(len(chunks), np.bool_), behind)

    def _layers(self, own_s: Floats, tokens: Ints, prefill: Flags, behind: Flags) -> _Layers:
        frames = np.ones_like(tokens)
        if self._ping_pong is not None:
            # Shards have a thread each: see `RoutedExperts.crowded`.
            crowded = prefill & (self._num_decoding <= 1 and 0 < self._costs.cores <= self._experts.num_shards)
            frames[(tokens >= self._ping_pong) & ~crowded] = 2
        per_frame = np.maximum(tokens // frames, 1)
        times = self._experts.times
        num_bytes = 2 * self._shape.hidden_bytes * times.rows_sent[per_frame]
        compute_s = own_s / self._num_layers / frames
        way_s = self._costs.exchange_fixed_s + self._costs.exchange_per_byte_s * num_bytes
        if self._costs.cores > 0:
            # What takes time on the way is packing, sending and adding up, on the worker's cores.
            compute_s, way_s = compute_s + way_s, np.zeros_like(way_s)
        return _Layers(
            compute_s=compute_s,
            way_s=way_s,
            peak_s=times.peak_s[per_frame],
            fullest_s=times.mean_s[per_frame] * self._experts.fullest,
            frames=frames,
            prefill=prefill,
            behind=behind,
        )

    def _layers_s(self, layers: _Layers) -> Floats:
        now = self.contention
        wait_s = np.where(layers.prefill, now.prefill_wait_s, now.decode_wait_s)
        stretch = np.where(layers.prefill, now.prefill_stretch, 1.0)
        peak_s = layers.peak_s * now.shard_slowdown * stretch
        return layer_s(self._own_s(layers), layers.way_s, wait_s, peak_s, layers.frames)

    def _own_s(self, layers: _Layers) -> Floats:
        """The worker's own part of a frame of a layer."""
        now = self.contention
        of_prefill = np.where(layers.behind, now.behind_slowdown, now.prefill_slowdown)
        own_s: Floats = layers.compute_s * np.where(layers.prefill, of_prefill, now.decode_slowdown)
        return own_s

    def _wait_share(self, layers: _Layers) -> float:
        if len(layers.frames) == 0:
            return 0.0
        own_s, total_s = layers.frames * self._own_s(layers), self._layers_s(layers)
        return float(np.mean(1 - np.divide(own_s, total_s, out=np.ones_like(total_s), where=total_s > 0)))
