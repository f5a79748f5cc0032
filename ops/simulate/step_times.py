"""How long steps of attention workers take: their own part, the way of the rows, the shards, and waiting for them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from ops.simulate.contention import Contention, contend, layer_s
from ops.simulate.costs import Costs
from ops.simulate.decode_pool import DecodePool
from ops.simulate.expert_pool import ExpertPool
from ops.simulate.prefill_worker import Chunk
from ops.simulate.shape import Shape

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
ALONE = Contention(0.0, 0.0, 1.0, 0.0, 0.0)


class _Layers(NamedTuple):
    """One layer of several workers' steps, an entry each; see `contend`."""

    compute_s: Floats
    way_s: Floats
    peak_s: Floats
    fullest_s: Floats
    """Of the shard with the most to do over all layers: it is full first."""
    frames: Ints


class StepTimes:
    """Waits are those of the last `update`."""

    def __init__(
        self, shape: Shape, costs: Costs, ping_pong_rows: int | None, decode: DecodePool, experts: ExpertPool
    ) -> None:
        self._shape, self._costs, self._ping_pong = shape, costs, ping_pong_rows
        self._decode, self._experts = decode, experts
        self._num_layers = max(1, len(shape.moe_layers))
        self.contention = ALONE
        self.wait_share = {"prefill": 0.0, "decode": 0.0}
        """Of steps, by pool, the share that does not go by with the worker's own computing."""

    def update(self, rows: Ints, chunks: Iterable[Chunk]) -> None:
        """Work the waits out anew for the decode workers in `rows` and the prefill workers that compute `chunks`."""
        decode, prefill = self._decode_layers(rows), self._prefill_layers(list(chunks))
        together = _Layers(*(np.concatenate(pair) for pair in zip(decode, prefill, strict=True)))
        is_prefill = np.arange(len(together.frames)) >= len(rows)
        costs = self._costs
        tokens_per_s = float((self._decode.batch[rows] / self.decode_steps_s(rows)).sum()) if len(rows) else 0.0
        others = costs.others_cores + costs.others_per_token_s * tokens_per_s
        self.contention = contend(
            *together, is_prefill, self._experts.num_shards, costs.cores, costs.worker_threads, others
        )
        self.wait_share = {
            "prefill": self._wait_share(prefill, self.contention.prefill_wait_s),
            "decode": self._wait_share(decode, self.contention.decode_wait_s),
        }

    def decode_steps_s(self, rows: Ints) -> Floats:
        return self._layers_s(self._decode_layers(rows), self.contention.decode_wait_s) * self._num_layers

    def chunk_s(self, chunk: Chunk) -> float:
        layers = self._layers_s(self._prefill_layers([chunk]), self.contention.prefill_wait_s)
        return float(layers[0]) * self._num_layers

    def _decode_layers(self, rows: Ints) -> _Layers:
        costs, pool = self._costs, self._decode
        own_s = (
            costs.decode_fixed_s
            + costs.decode_per_sequence_s * pool.batch[rows]
            + costs.decode_per_attended_s * pool.context[rows]
        )
        return self._layers(own_s, pool.batch[rows].astype(np.int64))

    def _prefill_layers(self, chunks: list[Chunk]) -> _Layers:
        costs = self._costs
        tokens = np.array([chunk.tokens for chunk in chunks], dtype=np.int64)
        attended = np.array([chunk.attended for chunk in chunks])
        own_s = costs.prefill_fixed_s + costs.prefill_per_token_s * tokens + costs.prefill_per_attended_s * attended
        return self._layers(own_s, tokens)

    def _layers(self, own_s: Floats, tokens: Ints) -> _Layers:
        frames = np.ones_like(tokens)
        if self._ping_pong is not None:
            frames[tokens >= self._ping_pong] = 2
        per_frame = np.maximum(tokens // frames, 1)
        times = self._experts.times
        num_bytes = 2 * self._shape.hidden_bytes * times.rows_sent[per_frame]
        return _Layers(
            compute_s=own_s / self._num_layers / frames,
            way_s=self._costs.exchange_fixed_s + self._costs.exchange_per_byte_s * num_bytes,
            peak_s=times.peak_s[per_frame],
            fullest_s=times.mean_s[per_frame] * self._experts.fullest,
            frames=frames,
        )

    def _layers_s(self, layers: _Layers, wait_s: float) -> Floats:
        slowdown = self.contention.slowdown
        return layer_s(layers.compute_s, layers.way_s, wait_s, layers.peak_s, layers.frames, slowdown)

    def _wait_share(self, layers: _Layers, wait_s: float) -> float:
        if len(layers.frames) == 0:
            return 0.0
        own_s = layers.frames * layers.compute_s * self.contention.slowdown
        total_s = self._layers_s(layers, wait_s)
        return float(np.mean(1 - np.divide(own_s, total_s, out=np.ones_like(total_s), where=total_s > 0)))
