"""What the processes of a breakdown report: plain values, with times on the machine's one monotonic clock."""

from __future__ import annotations

import dataclasses

from ops.bench.breakdown.stopwatch import Lap


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Round:
    """One dispatch and combine, as the attention worker sees it."""

    layer: int
    num_bytes: int
    """Of the frames there and back, over all shards, without their headers."""
    sent_s: float
    """When it began to be packed."""
    wait_s: float
    """When its replies were asked for."""
    received_s: float


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One turn of an attention worker's loop: from one call of the engine's `step` to the next."""

    lap: Lap
    num_sequences: int
    """Spans of the forward pass; 0 if there was none."""
    num_tokens: int
    num_attended: int
    """Positions that its tokens attend to, summed over the tokens. Of a decode step: of all sequences' contexts."""
    rounds: tuple[Round, ...]
    processor_s: float
    """Of all threads of the worker's process."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ShardCall:
    """One call of a shard's experts."""

    layer: int
    num_rows: int
    num_pairs: int
    """(row, expert) pairs that were computed."""
    num_experts: int
    """Experts that at least one row asked for."""
    start_s: float
    stop_s: float
    processor_s: float
    """Of the thread that computes it, receiving the frame and replying included."""

    @property
    def total_s(self) -> float:
        return self.stop_s - self.start_s
