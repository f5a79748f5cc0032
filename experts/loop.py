"""The shard's worker loop: every lane is received by a thread of its own, and they take turns at computing.

Decode frames go first. On a CPU a prefill frame lets them pass between experts, so that one delays them by a
millisecond or two, however long it is; one that gives way leaves them most of the cores, too. The thread that received
a frame computes it and replies: handing it to another thread would cost as much as a small frame takes.
"""

from __future__ import annotations

import heapq
import itertools
import logging
import math
import threading
import time
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

from experts.meter import FrameMeter
from experts.shard import ExpertShard, Rows
from octet.background import COMPUTING, step_back, wake_behind
from octet.counters import FrameCounters
from octet.errors import LaneError
from octet.faults import reach

_log = logging.getLogger(__name__)

DECODE_FIRST, PREFILL_AFTER = 0, 1

_REST = 16
"""Times as long as it has computed a frame that gives way rests, while decode frames come. Beyond this, gaps between
tokens beside a long prompt grow no shorter (`octet bench interference`)."""
_LONGEST_REST_S = 0.05
"""However long a piece took, as one does whose thread was stopped in its midst."""
_SHORT_ROWS = 256
"""A frame of no more rows does not rest: a short prompt is over before it would be noticed."""
_RECENT_S = 0.03
"""Decode frames come as long as the last one came no longer ago: a step's layers are milliseconds apart."""


class LaneCall(Protocol):
    """See `router.exchange.Call`."""

    @property
    def layer(self) -> int: ...
    @property
    def rows(self) -> Rows: ...
    @property
    def room_UH(self) -> torch.Tensor | None: ...
    @property
    def gives_way(self) -> bool: ...


class LaneEnd(Protocol):
    """See `router.exchange.Port`. Calls go back to the end that they came from, hence `Any`."""

    def receive(self) -> LaneCall | None: ...
    def reply(self, call: Any, y_UH: torch.Tensor) -> None: ...
    def refuse(self, call: Any, error: Exception) -> None: ...
    def close(self) -> None: ...


class ShardLoop:
    """Serves lanes until they close. One frame is computed at a time, but for those that let others pass."""

    def __init__(self, shard: ExpertShard) -> None:
        self._shard = shard
        self._turns = _Turns()
        self._decoded_s = -math.inf
        """When the last decode frame came."""
        self._changing = threading.Lock()
        """While lanes come and go: one may end just when another of its name takes its place."""
        self._lanes: dict[str, LaneEnd] = {}
        self._threads: set[threading.Thread] = set()
        self._total = FrameMeter()
        self._meters: dict[str, FrameMeter] = {}

    @property
    def lanes(self) -> list[str]:
        """Names of the lanes that are open."""
        return sorted(self._lanes)

    @property
    def num_waiting(self) -> int:
        """Frames that are received and wait for their turn."""
        return self._turns.num_waiting

    def counters(self) -> tuple[FrameCounters, dict[str, FrameCounters]]:
        """What was served on all lanes since the start, and on each lane that is open, since it opened."""
        return self._total.read(), {name: meter.read() for name, meter in list(self._meters.items())}

    def add(self, name: str, lane: LaneEnd, priority: int) -> None:
        """Serve a lane from now on, until it closes or fails. It takes the place of one of the same name."""
        meter = FrameMeter()
        thread = threading.Thread(
            target=self._serve, args=(name, lane, priority, meter), name=f"lane-{name}", daemon=True
        )
        with self._changing:
            before = self._lanes.get(name)
            self._lanes[name], self._meters[name] = lane, meter
            self._threads.add(thread)
            thread.start()
        if before is not None:
            before.close()

    def close(self, timeout_s: float = 5.0) -> None:
        for lane in list(self._lanes.values()):
            lane.close()
        for thread in list(self._threads):
            thread.join(timeout_s)

    def _serve(self, name: str, lane: LaneEnd, priority: int, meter: FrameMeter) -> None:
        # A worker that has sent a frame has others to send yet, and its shared expert to compute.
        step_back(COMPUTING)
        wake_behind()
        try:
            while (call := lane.receive()) is not None:
                received_s = time.perf_counter()
                self._turns.take(priority)
                try:
                    begun_s = time.perf_counter()
                    aside_s = self._answer(lane, call, priority)
                    took_s = time.perf_counter() - begun_s
                    noted = (call.rows.x_UH.shape[0], begun_s - received_s + aside_s, took_s - aside_s)
                    self._total.note(*noted)
                    meter.note(*noted)
                finally:
                    self._turns.give()
        except Exception as error:
            expected = isinstance(error, LaneError)
            level = logging.WARNING if expected else logging.ERROR
            _log.log(level, "lane %s is given up: %s", name, error, exc_info=not expected)
        finally:
            # The other end must notice at once, whatever the reason.
            lane.close()
            with self._changing:
                if self._lanes.get(name) is lane:
                    del self._lanes[name], self._meters[name]
                self._threads.discard(threading.current_thread())

    def _answer(self, lane: LaneEnd, call: LaneCall, priority: int) -> float:
        """Returns: seconds for which others were let pass."""
        pause = None
        if priority == DECODE_FIRST:
            # Nobody passes it.
            self._decoded_s = time.perf_counter()
        else:
            pause = _Pause(self, call, priority)
        try:
            reach("serve")
            y_UH = self._shard.serve(call.layer, call.rows, call.room_UH, pause)
        except Exception as error:
            # The attention worker must hear of any fault, or its step would wait for the deadline.
            _log.exception("a call for layer %d failed", call.layer)
            lane.refuse(call, error)
        else:
            lane.reply(call, y_UH)
        return pause.aside_s if pause is not None else 0.0


class _Pause:
    """Within a prefill frame. See `experts.shard.Pause`."""

    def __init__(self, loop: ShardLoop, call: LaneCall, priority: int) -> None:
        self._loop, self._priority = loop, priority
        self._gives_way = call.gives_way and call.rows.x_UH.shape[0] > _SHORT_ROWS
        self.aside_s = 0.0
        """Seconds for which others were let pass."""
        self._go_on()

    @property
    def due(self) -> npt.NDArray[np.int64]:
        return self._loop._turns.due

    def __call__(self) -> None:
        computed_s = time.perf_counter() - self._resumed_s
        if self._rests:
            self.aside_s += self._loop._turns.rest(self._priority, min(_REST * computed_s, _LONGEST_REST_S))
        else:
            self.aside_s += self._loop._turns.step_aside(self._priority)
        self._go_on()

    @property
    def _rests(self) -> bool:
        """Whether it rests behind every piece, for the sake of decode frames to come."""
        return self._gives_way and time.perf_counter() - self._loop._decoded_s < _RECENT_S

    def _go_on(self) -> None:
        self._loop._turns.look_out(self._priority, always=self._rests)
        self._resumed_s = time.perf_counter()


class _Turns:
    """A lock that is handed to the waiter of the lowest priority number, and among equals to the first."""

    def __init__(self) -> None:
        self._guard = threading.Lock()
        self._waiting: list[tuple[int, int, threading.Lock]] = []
        self._order = itertools.count(1)
        self._taken = False
        self.due = np.zeros(1, np.int64)
        """Whether whoever has the turn shall see who waits; compiled code looks at it."""

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    def take(self, priority: int) -> None:
        with self._guard:
            if not self._taken:
                self._taken = True
                return
            turn = threading.Lock()
            turn.acquire()
            heapq.heappush(self._waiting, (priority, next(self._order), turn))
            if priority == DECODE_FIRST:
                self.due[0] = 1
        # Whoever holds the turn computes one frame, which is bounded by the lane's largest.
        turn.acquire()

    def look_out(self, priority: int, *, always: bool) -> None:
        """Let a pause be due, to whoever has the turn, if one waits who may pass, or in any case."""
        with self._guard:
            self.due[0] = always or (bool(self._waiting) and self._waiting[0][0] < priority)

    def step_aside(self, priority: int) -> float:
        """Let those of lower numbers pass who wait; to be called by whoever has the turn.

        Returns: seconds for which it was away.
        """
        with self._guard:
            if not self._waiting or self._waiting[0][0] >= priority:
                return 0.0
            turn = threading.Lock()
            turn.acquire()
            # Before its equals: they wait for the turn that it has begun.
            heapq.heappush(self._waiting, (priority, 0, turn))
            heapq.heappop(self._waiting)[2].release()
        left_s = time.perf_counter()
        turn.acquire()
        return time.perf_counter() - left_s

    def rest(self, priority: int, seconds: float) -> float:
        """Leave the turn, and the core, to whoever comes within so many seconds, and take it again.

        Returns: seconds for which it was away.
        """
        left_s = time.perf_counter()
        self.give()
        time.sleep(seconds)
        self.take(priority)
        return time.perf_counter() - left_s

    def give(self) -> None:
        with self._guard:
            if self._waiting:
                heapq.heappop(self._waiting)[2].release()
            else:
                self._taken = False
