"""How long frames wait at the shards that many attention workers use at once, and how much all slow each other down.

Each worker is a customer that computes its own part of a layer, sends a frame, and goes on when the slowest shard has
answered: a closed queueing network. A shard takes decode frames before prefill frames and finishes what it has begun (a
CPU's pauses between experts are not simulated), so waits are those of a non-preemptive priority queue (Cobham 1954),
seen by a worker as the others leave it (the arrival theorem, as in approximate mean value analysis: Bard 1979,
Schweitzer 1979), and never more than one frame of every worker that may go first. Shards get the same frames in the
same order, so one shard stands for all of them.

With two micro-batches a worker has two frames under way, and computes one while it waits for the other.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numba
import numpy as np
import numpy.typing as npt

_ROUNDS = 60
_DAMPING = 0.4
_compile: Any = numba.njit(nogil=True, cache=True)
Floats = npt.NDArray[np.float64]


class Contention(NamedTuple):
    decode_wait_s: float
    """Of a frame, before a shard begins with it; mean over the workers, and 0 without any."""
    prefill_wait_s: float
    slowdown: float
    """Everything that computes takes so many times as long, because cores are shared; 1 where they are not."""
    busy_share: float
    """Of the shards' time."""
    decode_busy_share: float
    """The same, for decode frames alone."""


def contend(
    compute_s: Floats, way_s: Floats, peak_s: Floats, fullest_s: Floats, frames: npt.NDArray[np.int64],
    prefill: npt.NDArray[np.bool_], num_shards: int, cores: int, worker_threads: int = 1, others: float = 0.0,
) -> Contention:  # fmt: skip
    """The steady state of workers that go on as they do now.

    Args (one entry per worker that has work):
        compute_s: its own part, per layer and frame.
        way_s: of the frame, there and back.
        peak_s: the slowest shard's time for the frame.
        fullest_s: that of the shard with the most to do over all layers, in the mean over them.
        frames: under way at once, 1 or 2.
        prefill: whether its frames are prefill frames.
        cores: shared by all; 0 if nothing is shared.
        worker_threads: cores that a worker takes while it computes.
        others: cores that processes which are no members take.
    """
    if len(compute_s) == 0:
        return Contention(0.0, 0.0, 1.0, 0.0, 0.0)
    return Contention(
        *_solve(compute_s, way_s, peak_s, fullest_s, frames, prefill, num_shards, cores, worker_threads, others)
    )


def layer_s(
    compute_s: Floats, way_s: Floats, wait_s: float, peak_s: Floats, frames: npt.NDArray[np.int64], slowdown: float
) -> Floats:
    """A layer of each worker's step, all its frames."""
    compute_s, peak_s = compute_s * slowdown, peak_s * slowdown
    one_s = compute_s + way_s + wait_s + peak_s
    two_s = np.maximum.reduce([2 * compute_s, one_s, 2 * peak_s])
    layers_s: Floats = np.where(frames == 1, one_s, two_s)
    return layers_s


@_compile  # type: ignore[untyped-decorator]
def _solve(
    compute: Any, way: Any, peak: Any, mean: Any, frames: Any, prefill: Any, num_shards: Any, cores: Any, threads: Any,
    others: Any,
) -> Any:  # fmt: skip
    num = len(compute)
    wait, rate = np.zeros(num), np.zeros(num)
    slowdown, busy, decode_busy = 1.0, 0.0, 0.0
    # What a frame can find in front of it at worst: one of every other worker, or for decode one prefill frame.
    all_decode, all_prefill, longest = 0.0, 0.0, 0.0
    for i in range(num):
        if prefill[i]:
            all_prefill += mean[i] * frames[i]
            longest = max(longest, mean[i])
        else:
            all_decode += mean[i] * frames[i]
    for _ in range(_ROUNDS):
        decode_busy, busy, residual, at_work = 0.0, 0.0, 0.0, 0.0
        for i in range(num):
            own, there = compute[i] * slowdown, peak[i] * slowdown
            answer = way[i] + wait[i] + there
            cycle = own + answer
            if frames[i] == 2:
                cycle = max(2 * own, own + answer, 2 * there)
            rate[i] = frames[i] / max(cycle, 1e-12)
            used = rate[i] * mean[i] * slowdown
            busy += used
            decode_busy += 0.0 if prefill[i] else used
            residual += used * mean[i] * slowdown / 2
            at_work += min(1.0, rate[i] * own)
        for i in range(num):
            used = rate[i] * mean[i] * slowdown / frames[i]
            before = min(busy - used, 0.999)
            first = min(decode_busy - (0.0 if prefill[i] else used), 0.999)
            waits = max(residual - used * mean[i] * slowdown / 2, 0.0) / (1 - first)
            if prefill[i]:
                waits /= 1 - before
                worst = all_decode + all_prefill - mean[i]
            else:
                worst = all_decode - mean[i] + longest
            wait[i] += _DAMPING * (min(waits, worst * slowdown) - wait[i])
        if cores > 0:
            # Processes that would run at once, if each had a core, are given turns.
            wanted = (at_work * threads + min(busy, 1.0) * num_shards + others) / cores
            slowdown += _DAMPING * (max(1.0, wanted) - slowdown)
    waits_of = np.zeros(2)
    count = np.zeros(2)
    for i in range(num):
        waits_of[int(prefill[i])] += wait[i]
        count[int(prefill[i])] += 1
    whole = max(busy, 1.0)
    return (
        waits_of[0] / max(count[0], 1),
        waits_of[1] / max(count[1], 1),
        slowdown,
        busy / whole,
        decode_busy / whole,
    )
