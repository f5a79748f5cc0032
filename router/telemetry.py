"""Sliding windows over what the members of a cluster count.

Members count for themselves, and only ever upward (`octet.counters`). Every step, the router service reads all of
them; this module keeps the differences of a window's worth of steps, and exponentially weighted means beside it.
Members come and go; one that was started again counts from 0; the next answer makes up for one that was missed.

Shapes: `L` mixture-of-experts layers, `E` logical experts.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Collection, Iterable, Sequence

import numpy as np
import numpy.typing as npt

from octet.config import TelemetryConfig
from octet.counters import FrameCounters
from octet.ids import WorkerId
from router.telemetry_samples import Sample, ShardSample, WorkerSample
from router.telemetry_sums import ShardSums, WorkerSums, shard_sums, total, worker_sums
from router.telemetry_window import LaneTelemetry, ShardTelemetry, TelemetryWindow, WorkerTelemetry

Sums = ShardSums | WorkerSums

_WHOLE = 0.9
"""Of a step: a reading that comes a little early ends it all the same, or it would grow to twice its length."""


@dataclasses.dataclass(slots=True, kw_only=True)
class _Member:
    last: Sample
    heard_s: float
    recent_part: float = 0.0
    recent_whole: float = 0.0
    """Sums that fade with age; their quotient is the exponentially weighted mean of a share."""


@dataclasses.dataclass(slots=True, kw_only=True)
class _Step:
    start_s: float
    end_s: float
    tokens_LE: npt.NDArray[np.int64]
    members: dict[WorkerId, Sums]


class Telemetry:
    """Samples in by `record`, windows out of `window`. The clock is the caller's. Belongs to one thread."""

    def __init__(
        self,
        layers: Sequence[int],
        num_experts: int,
        experts_per_token: int,
        config: TelemetryConfig,
        now_s: float,
        incarnation: int = 0,
    ) -> None:
        self._incarnation = incarnation
        self._layers, self._experts_per_token, self._config = tuple(layers), experts_per_token, config
        self._steps: collections.deque[_Step] = collections.deque()
        self._members: dict[WorkerId, _Member] = {}
        self._recorded_s = now_s
        self._total_LE = np.zeros((len(layers), num_experts), dtype=np.int64)
        self._recent_LE = np.zeros((len(layers), num_experts))
        self._recent_s = 0.0

    def record(self, now_s: float, samples: Iterable[Sample]) -> None:
        """Take what the members that answered have counted. Readings within one step count as one."""
        step = self._step(now_s)
        before_LE = step.tokens_LE.copy()
        for sample in samples:
            self._take(now_s, sample, step)
        elapsed_s, self._recorded_s = now_s - self._recorded_s, now_s
        fade = self._fade(elapsed_s)
        self._recent_LE = self._recent_LE * fade + (step.tokens_LE - before_LE)
        self._recent_s = self._recent_s * fade + elapsed_s
        self._forget_old_steps(now_s)

    def keep(self, members: Collection[WorkerId]) -> None:
        """Forget every member but these. What they served stays in the window's loads."""
        for worker_id in self._members.keys() - set(members):
            del self._members[worker_id]

    def window(self, now_s: float, last_s: float | None = None) -> TelemetryWindow:
        """The last `last_s` seconds, at most and by default `telemetry.window_s`, in whole steps; one at least.

        Members that were silent for `telemetry.silent_s` are left out.
        """
        self._forget_old_steps(now_s)
        steps = list(self._steps)
        if last_s is not None:
            steps = [step for step in steps if step.start_s >= now_s - last_s] or steps[-1:]
        loads_LE = np.zeros(self._total_LE.shape, dtype=np.int64)
        did: dict[WorkerId, list[Sums]] = collections.defaultdict(list)
        for step in steps:
            loads_LE += step.tokens_LE
            for worker_id, of_step in step.members.items():
                did[worker_id].append(of_step)
        parts = [
            _telemetry(member, total(did[worker_id]))
            for worker_id, member in sorted(self._members.items())
            if now_s - member.heard_s <= self._config.silent_s and worker_id in did
        ]
        return TelemetryWindow(
            end_s=self._recorded_s,
            incarnation=self._incarnation,
            duration_s=sum(step.end_s - step.start_s for step in steps),
            layers=self._layers,
            experts_per_token=self._experts_per_token,
            loads_LE=loads_LE.astype(np.float64),
            ewma_LE=self._recent_LE / self._recent_s if self._recent_s else self._recent_LE.copy(),
            total_LE=self._total_LE.copy(),
            shards=tuple(part for part in parts if isinstance(part, ShardTelemetry)),
            workers=tuple(part for part in parts if isinstance(part, WorkerTelemetry)),
        )

    def halves(self, now_s: float) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
        """Token rows `[L, E]` of the window's earlier steps and of its later ones, about as many of each.

        What holds of the one and of the other alike is not their noise.
        """
        self._forget_old_steps(now_s)
        earlier_LE, later_LE = np.zeros(self._total_LE.shape), np.zeros(self._total_LE.shape)
        half, before = sum(int(step.tokens_LE.sum()) for step in self._steps) / 2, 0
        for step in self._steps:
            part_LE = earlier_LE if before < half else later_LE
            part_LE += step.tokens_LE
            before += int(step.tokens_LE.sum())
        return earlier_LE, later_LE

    def _step(self, now_s: float) -> _Step:
        """The step that a reading belongs to: the last one, unless it is as long as a step already."""
        last = self._steps[-1] if self._steps else None
        if last is None or last.end_s - last.start_s >= _WHOLE * self._config.step_s:
            tokens_LE = np.zeros_like(self._total_LE)
            self._steps.append(_Step(start_s=self._recorded_s, end_s=now_s, tokens_LE=tokens_LE, members={}))
        self._steps[-1].end_s = now_s
        return self._steps[-1]

    def _take(self, now_s: float, sample: Sample, step: _Step) -> None:
        member = self._members.get(sample.worker_id)
        if member is None or member.last.incarnation != sample.incarnation:
            # Counted since it began to serve. If that is long ago, nobody knows when: only the total can have it.
            counted, tokens_LE = self._counted(sample, None)
            if sample.uptime_s > self._config.window_s:
                self._total_LE += tokens_LE
                counted, tokens_LE = self._counted(sample, sample)
        elif sample.uptime_s <= member.last.uptime_s:
            # Answers may overtake each other.
            return
        else:
            counted, tokens_LE = self._counted(sample, member.last)
        member = member or _Member(last=sample, heard_s=now_s)
        member.last, member.heard_s = sample, now_s
        part, whole = _share(counted)
        fade = self._fade(counted.elapsed_s)
        member.recent_part = member.recent_part * fade + part
        member.recent_whole = member.recent_whole * fade + whole
        self._members[sample.worker_id] = member
        of_step = step.members.get(sample.worker_id)
        step.members[sample.worker_id] = counted if of_step is None else total([of_step, counted])
        step.tokens_LE += tokens_LE
        self._total_LE += tokens_LE

    def _counted(self, sample: Sample, last: Sample | None) -> tuple[Sums, npt.NDArray[np.int64]]:
        """What a member did since its last reading, and the token rows `[L, E]` that it computed."""
        if isinstance(sample, ShardSample):
            return shard_sums(sample, last if isinstance(last, ShardSample) else None)
        return worker_sums(sample, last if isinstance(last, WorkerSample) else None), np.zeros_like(self._total_LE)

    def _fade(self, elapsed_s: float) -> float:
        return float(0.5 ** (elapsed_s / self._config.half_life_s))

    def _forget_old_steps(self, now_s: float) -> None:
        # A window of less than a step is a step.
        while len(self._steps) > 1 and self._steps[0].start_s < now_s - self._config.window_s:
            self._steps.popleft()


def _share(sums: Sums) -> tuple[float, float]:
    """Part and whole of the share that is watched: of a shard's time its work, of a step's time the wait."""
    if isinstance(sums, ShardSums):
        return sums.frames.busy_s, sums.elapsed_s
    return sums.steps.combine_s, sums.steps.step_s


def _telemetry(member: _Member, sums: Sums) -> ShardTelemetry | WorkerTelemetry:
    sample, ewma = member.last, _ratio(member.recent_part, member.recent_whole)
    if isinstance(sample, ShardSample):
        assert isinstance(sums, ShardSums)
        return _shard(sample, sums, ewma)
    assert isinstance(sums, WorkerSums)
    return _worker(sample, sums, ewma)


def _shard(sample: ShardSample, sums: ShardSums, ewma: float) -> ShardTelemetry:
    frames = sums.frames
    return ShardTelemetry(
        worker_id=sample.worker_id,
        busy_share=_ratio(frames.busy_s, sums.elapsed_s),
        busy_ewma=ewma,
        wait_s=_ratio(frames.wait_s, frames.frames),
        queue_depth=_ratio(frames.wait_s, sums.elapsed_s),
        waiting=sample.waiting,
        frames_per_s=_ratio(frames.frames, sums.elapsed_s),
        rows_per_s=_ratio(frames.rows, sums.elapsed_s),
        activated_experts=_ratio(sums.activated, frames.frames),
        tokens_L=sums.tokens_L,
        # Of a lane that has been closed only what it did is left.
        lanes={name: _lane(sums.lanes[name], sums.elapsed_s) for name in sorted(sample.lanes) if name in sums.lanes},
        since_start=sample.frames,
    )


def _lane(frames: FrameCounters, elapsed_s: float) -> LaneTelemetry:
    return LaneTelemetry(
        busy_share=_ratio(frames.busy_s, elapsed_s),
        wait_s=_ratio(frames.wait_s, frames.frames),
        frames_per_s=_ratio(frames.frames, elapsed_s),
        rows_per_s=_ratio(frames.rows, elapsed_s),
    )


def _worker(sample: WorkerSample, sums: WorkerSums, ewma: float) -> WorkerTelemetry:
    steps = sums.steps
    return WorkerTelemetry(
        worker_id=sample.worker_id,
        role=sample.role,
        busy_share=_ratio(steps.step_s, sums.elapsed_s),
        step_s=_ratio(steps.step_s, steps.steps),
        combine_share=_ratio(steps.combine_s, steps.step_s),
        combine_ewma=ewma,
        steps_per_s=_ratio(steps.steps, sums.elapsed_s),
        tokens_per_s=_ratio(steps.tokens, sums.elapsed_s),
        kv_share=_ratio(sums.kv_share, sums.moments),
        running=_ratio(sums.running, sums.moments),
        waiting=_ratio(sums.waiting, sums.moments),
        load=sample.load,
        since_start=sample.steps,
    )


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole > 0 else 0.0
