"""How long frames wait at the shards that many attention workers use at once, and how much all slow each other down.

Each worker is a customer that computes its own part of a layer, sends a frame, and goes on when the slowest shard has
answered: a closed queueing network. A shard takes decode frames before prefill frames, so waits are those of a priority
queue (Cobham 1954), seen by a worker as the others leave it (the arrival theorem, as in approximate mean value
analysis: Bard 1979, Schweitzer 1979), and never more than one frame of every worker that may go first. A shard ends
what it has begun; but where it pauses within prefill frames, decode frames wait for the piece at hand only, and prefill
frames take longer by those that pass (a preemptive priority, once the piece is done). Shards get the same frames in the
same order, so one shard stands for all of them.

With two micro-batches a worker has two frames under way, and computes one while it waits for the other.

Where members share cores, threads that would run at once are given turns, by their weights (generalized processor
sharing: Parekh and Gallager 1993), on the cores that other processes leave at the time. Whoever computes sees the
others as they are in the mean while he does: who has one frame under way does not compute while his shards do. What is
shorter than a turn has its core to itself once it has one, but waits for half of what every thread too many keeps its
core for, whatever its weight: a turn, or less if its part of a layer is shorter.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numba
import numpy as np
import numpy.typing as npt

_ROUNDS = 60
_DAMPING = 0.4
_MOST_TAKEN = 0.9
"""Of the cores, by other processes."""
_compile: Any = numba.njit(nogil=True, cache=True)
Floats = npt.NDArray[np.float64]


class Contention(NamedTuple):
    decode_wait_s: float
    """Of a frame, before a shard begins with it; mean over the workers, and 0 without any."""
    prefill_wait_s: float
    prefill_stretch: float
    """A prefill frame takes a shard so many times as long as it has to compute for it, since decode frames pass it."""
    shard_slowdown: float
    """What shards compute takes so many times as long, because cores are shared; 1 where they are not."""
    decode_slowdown: float
    """The same of what decode workers compute; mean over the workers, and 1 without any."""
    prefill_slowdown: float
    behind_slowdown: float
    """Of prefill workers that have stepped back."""
    busy_share: float
    """Of the shards' time."""
    decode_busy_share: float
    """The same, for decode frames alone."""


class SharedCores(NamedTuple):
    """Of one machine, on which all members are."""

    cores: int
    others: float
    """Cores that processes take, in the mean, which are no members. They go first."""
    threads: Floats
    """Cores that a worker takes while it computes; one entry per worker."""
    weight_behind: float
    """Of a thread that has stepped back; a thread of any other member has 1."""
    turn_s: float
    """For which a thread that goes on computing keeps its core when others want it."""


class _Workers(NamedTuple):
    """As `contend` is given them."""

    compute: Floats
    way: Floats
    peak: Floats
    fullest: Floats
    frames: npt.NDArray[np.int64]
    prefill: npt.NDArray[np.bool_]
    behind: npt.NDArray[np.bool_]


class _Now(NamedTuple):
    """What is known of each worker so far."""

    wait: Floats
    """Of a frame."""
    slowdown: Floats
    rate: Floats
    """Frames of a layer per second."""
    used: Floats
    """Share of the time of a shard, which computes as slowly as shards do now."""
    at_work: Floats
    """Share of its time in which it computes."""


ALONE = Contention(0.0, 0.0, 1.0, 1.0, 1.0, 1.0, 1.0, 0.0, 0.0)


def contend(
    compute_s: Floats, way_s: Floats, peak_s: Floats, fullest_s: Floats, frames: npt.NDArray[np.int64],
    prefill: npt.NDArray[np.bool_], behind: npt.NDArray[np.bool_], num_shards: int, piece_s: float = np.inf,
    shared: SharedCores | None = None,
) -> Contention:  # fmt: skip
    """The steady state of workers that go on as they do now.

    Args (one entry per worker that has work):
        compute_s: its own part, per layer and frame.
        way_s: of the frame, there and back.
        peak_s: the slowest shard's time for the frame.
        fullest_s: that of the shard with the most to do over all layers, in the mean over them.
        frames: under way at once, 1 or 2.
        prefill: whether its frames are prefill frames.
        behind: whether its threads have stepped back behind those of other members.
        piece_s: for which a shard computes a prefill frame before decode frames may pass; infinite if they never do.
        shared: None if every member has a machine of its own.
    """
    if len(compute_s) == 0:
        return ALONE
    if shared is None:
        shared = SharedCores(0, 0.0, np.zeros_like(compute_s), 1.0, 0.0)
    workers = _Workers(compute_s, way_s, peak_s, fullest_s, frames, prefill, behind)
    return Contention(*_solve(workers, num_shards, piece_s, shared))


def layer_s(compute_s: Floats, way_s: Floats, wait_s: Floats, peak_s: Floats, frames: npt.NDArray[np.int64]) -> Floats:
    """A layer of each worker's step, all its frames, with what each part of it takes under contention."""
    one_s = compute_s + way_s + wait_s + peak_s
    two_s = np.maximum.reduce([2 * compute_s, one_s, 2 * peak_s])
    layers_s: Floats = np.where(frames == 1, one_s, two_s)
    return layers_s


@_compile  # type: ignore[untyped-decorator]
def _left(cores: Any, others: Any) -> Any:
    """How probable it is that other processes leave none, one, two … of the cores: they have each of them for the same
    part of the time, whatever they do with the rest (a binomial distribution)."""
    left = np.zeros(cores + 1)
    left[0] = 1.0
    if cores == 0:
        return left
    taken = min(others / cores, _MOST_TAKEN)
    for known in range(cores):
        for num in range(known, -1, -1):
            left[num + 1] += left[num] * (1 - taken)
            left[num] *= taken
    return left


@_compile  # type: ignore[untyped-decorator]
def _share(left: Any, threads: Any) -> Any:
    """Of a core, for each of so many threads, in the mean over what other processes leave."""
    share = 0.0
    for num in range(len(left)):
        share += left[num] * min(1.0, num / max(threads, 1e-12))
    return share


@_compile  # type: ignore[untyped-decorator]
def _slowdown(alone: Any, left: Any, front: Any, behind: Any, weight_behind: Any, kept: Any) -> Any:
    """What takes `alone` seconds of a core takes so many times as long beside so many threads, itself among `front`, if
    a thread keeps its core for `kept` seconds."""
    by_weight = 1 / _share(left, front + weight_behind * behind) - 1
    by_turn = (1 / _share(left, front + behind) - 1) * kept / 2 / max(alone, 1e-12)
    return 1 + max(by_weight, by_turn)


@_compile  # type: ignore[untyped-decorator]
def _solve(workers: Any, num_shards: Any, piece: Any, shared: Any) -> Any:
    num = len(workers.compute)
    now = _Now(np.zeros(num), np.ones(num), np.zeros(num), np.zeros(num), np.zeros(num))
    shard_slowdown, stretch, busy, decode_busy = 1.0, 1.0, 0.0, 0.0
    left = _left(shared.cores, shared.others)
    for _ in range(_ROUNDS):
        busy, decode_busy = _go_on(workers, now, shard_slowdown, stretch)
        _wait(workers, now, busy, decode_busy, piece, shard_slowdown)
        if piece < np.inf:
            stretch += _DAMPING * (1 / (1 - min(decode_busy, 0.999)) - stretch)
        if shared.cores > 0:
            front, back = _at_once(workers, now, shared)
            _slow_workers(workers, now, num_shards, shared, left, front, back)
            factor = _shards_factor(workers, now, num_shards, shared, left, front, back, busy)
            shard_slowdown += _DAMPING * (factor - shard_slowdown)
    whole = max(busy, 1.0)
    wait, slow = _means(workers, now)
    busy_share, decode_share = busy / whole, decode_busy / whole
    return wait[0], wait[1], stretch, shard_slowdown, slow[0], slow[1], slow[2], busy_share, decode_share


@_compile  # type: ignore[untyped-decorator]
def _go_on(workers: Any, now: Any, shard_slowdown: Any, stretch: Any) -> Any:
    """How often workers come round. Returns: how busy that keeps a shard, with all frames and with decode frames."""
    busy, decode_busy = 0.0, 0.0
    for i in range(len(workers.compute)):
        own = workers.compute[i] * now.slowdown[i]
        there = workers.peak[i] * shard_slowdown * (stretch if workers.prefill[i] else 1.0)
        cycle = own + (workers.way[i] + now.wait[i] + there)
        if workers.frames[i] == 2:
            cycle = max(2 * own, cycle, 2 * there)
        now.rate[i] = workers.frames[i] / max(cycle, 1e-12)
        now.used[i] = now.rate[i] * workers.fullest[i] * shard_slowdown
        now.at_work[i] = min(1.0, now.rate[i] * own)
        busy += now.used[i]
        decode_busy += 0.0 if workers.prefill[i] else now.used[i]
    return busy, decode_busy


@_compile  # type: ignore[untyped-decorator]
def _wait(workers: Any, now: Any, busy: Any, decode_busy: Any, piece: Any, shard_slowdown: Any) -> Any:
    """How long frames wait in a queue that is so busy."""
    residual, piece_residual = 0.0, 0.0
    # What a frame can find in front of it at worst: one of every other worker, or for decode one prefill frame.
    all_decode, all_prefill, longest = 0.0, 0.0, 0.0
    for i in range(len(workers.compute)):
        mean = workers.fullest[i]
        residual += now.used[i] * mean * shard_slowdown / 2
        piece_residual += now.used[i] * (min(mean, piece) if workers.prefill[i] else mean) * shard_slowdown / 2
        if workers.prefill[i]:
            all_prefill += mean * workers.frames[i]
            longest = max(longest, min(mean, piece))
        else:
            all_decode += mean * workers.frames[i]
    for i in range(len(workers.compute)):
        mean, mine = workers.fullest[i], now.used[i] / workers.frames[i]
        before = min(busy - mine, 0.999)
        first = min(decode_busy - (0.0 if workers.prefill[i] else mine), 0.999)
        if workers.prefill[i]:
            waits = max(residual - mine * mean * shard_slowdown / 2, 0.0) / (1 - first)
            waits /= 1 - before
            worst = all_decode + all_prefill - mean
        else:
            waits = max(piece_residual - mine * mean * shard_slowdown / 2, 0.0) / (1 - first)
            worst = all_decode - mean + longest
        now.wait[i] += _DAMPING * (min(waits, worst * shard_slowdown) - now.wait[i])


@_compile  # type: ignore[untyped-decorator]
def _at_once(workers: Any, now: Any, shared: Any) -> Any:
    """Threads of workers that would run at once, if each had a core: of those that go first, and of those behind."""
    front, back = 0.0, 0.0
    for i in range(len(workers.compute)):
        running = now.at_work[i] * shared.threads[i]
        if workers.behind[i]:
            back += running
        else:
            front += running
    return front, back


@_compile  # type: ignore[untyped-decorator]
def _kept(workers: Any, now: Any, num_shards: Any, shared: Any, waits: Any) -> Any:
    """For how long a thread keeps its core, in the mean over those that have one: a turn, or until its part is done.

    Args:
        waits: the worker that waits for it, of whose own threads none is meant; -1 for a shard.
    """
    threads, kept = 0.0, 0.0
    for i in range(len(workers.compute)):
        computing = now.rate[i] * workers.compute[i] * shared.threads[i]
        at_shards = now.rate[i] * workers.fullest[i] * num_shards
        if i == waits:
            # With one frame, it is not at the shards while the worker has something to compute.
            computing, at_shards = 0.0, at_shards if workers.frames[i] == 2 else 0.0
        kept += computing * min(workers.compute[i], shared.turn_s)
        kept += at_shards * min(workers.fullest[i], shared.turn_s)
        threads += computing + at_shards
    return kept / max(threads, 1e-12)


@_compile  # type: ignore[untyped-decorator]
def _slow_workers(
    workers: Any, now: Any, num_shards: Any, shared: Any, left: Any, front: Any, back: Any
) -> Any:  # fmt: skip
    """Each by the threads of all others, and of the shards while it computes."""
    # What shards would run, and what those that go first use of the cores.
    at_shards, used_front = 0.0, 0.0
    for i in range(len(workers.compute)):
        at_shards += now.used[i] * num_shards
        used_front += now.rate[i] * workers.fullest[i] * num_shards
        if not workers.behind[i]:
            used_front += now.rate[i] * workers.compute[i] * shared.threads[i]
    for i in range(len(workers.compute)):
        threads = shared.threads[i]
        running = now.at_work[i] * threads
        # With one frame, it is in the worker's own part or at the shards, and never both.
        absent = now.used[i] * num_shards if workers.frames[i] == 1 else 0.0
        seen = max(front + min(at_shards - absent, num_shards), 0.0)
        if workers.behind[i]:
            beside = back - running + threads
            by_weight = _share(left, (seen + shared.weight_behind * beside) / shared.weight_behind)
            of_rest = min(1.0, (shared.cores - shared.others - used_front) / beside)
            factor = 1 / max(by_weight, of_rest)
        else:
            beside = seen - running + threads
            kept = _kept(workers, now, num_shards, shared, i)
            factor = _slowdown(workers.compute[i], left, beside, back, shared.weight_behind, kept)
        now.slowdown[i] += _DAMPING * (factor - now.slowdown[i])


@_compile  # type: ignore[untyped-decorator]
def _shards_factor(
    workers: Any, now: Any, num_shards: Any, shared: Any, left: Any, front: Any, back: Any, busy: Any
) -> Any:  # fmt: skip
    """By which shards are slowed down: in the mean over the frames, beside those that run while one is served."""
    front_served, back_served, served = 0.0, 0.0, 0.0
    for i in range(len(workers.compute)):
        mean, used = workers.fullest[i], now.used[i]
        gone = now.at_work[i] * shared.threads[i] if workers.frames[i] == 1 else 0.0
        front_served += used * (num_shards * mean / max(workers.peak[i], 1e-12) + front)
        front_served -= 0.0 if workers.behind[i] else used * gone
        back_served += used * (back - (gone if workers.behind[i] else 0.0))
        served += used * mean
    whole = max(busy, 1e-12)
    beside = front_served / whole, back_served / whole
    kept = _kept(workers, now, num_shards, shared, -1)
    return _slowdown(served / whole, left, beside[0], beside[1], shared.weight_behind, kept)


@_compile  # type: ignore[untyped-decorator]
def _means(workers: Any, now: Any) -> Any:
    """Waits of decode and prefill workers, and how much these and those that have stepped back are slowed down."""
    wait, slowdown, count = np.zeros(2), np.zeros(3), np.zeros(3)
    for i in range(len(workers.compute)):
        kind = 2 if workers.behind[i] else int(workers.prefill[i])
        slowdown[kind] += now.slowdown[i]
        count[kind] += 1
        wait[int(workers.prefill[i])] += now.wait[i]
    wait[0] /= max(count[0], 1)
    wait[1] /= max(count[1] + count[2], 1)
    for kind in range(3):
        slowdown[kind] = slowdown[kind] / count[kind] if count[kind] > 0 else 1.0
    return wait, slowdown
