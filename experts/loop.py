"""The shard's worker loop: every lane is received on its own, all are computed one after another.

Decode frames go first: a waiting prefill frame can delay them by one frame at most.
"""

from __future__ import annotations

import itertools
import logging
import queue
import threading
from typing import Any, Protocol

import torch

from experts.shard import ExpertShard, Rows
from octet.errors import LaneError

_log = logging.getLogger(__name__)

DECODE_FIRST, PREFILL_AFTER = 0, 1
_STOP = 2


class LaneCall(Protocol):
    """See `router.exchange.Call`."""

    @property
    def layer(self) -> int: ...
    @property
    def rows(self) -> Rows: ...


class LaneEnd(Protocol):
    """See `router.exchange.Port`. Calls go back to the end that they came from, hence `Any`."""

    def receive(self) -> LaneCall | None: ...
    def reply(self, call: Any, y_UH: torch.Tensor) -> None: ...
    def refuse(self, call: Any, error: Exception) -> None: ...
    def close(self) -> None: ...


class ShardLoop:
    """One thread computes; one thread per lane waits for its frames."""

    def __init__(self, shard: ExpertShard) -> None:
        self._shard = shard
        # (priority, order of arrival, lane, call): order breaks ties, so lanes and calls are never compared.
        self._frames: queue.PriorityQueue[tuple[int, int, LaneEnd | None, LaneCall | None]]
        self._frames = queue.PriorityQueue()
        self._order = itertools.count()
        self._lanes: dict[str, LaneEnd] = {}
        self._threads: dict[str, threading.Thread] = {}
        self._worker = threading.Thread(target=self._work, name="shard-worker", daemon=True)
        self._worker.start()

    @property
    def lanes(self) -> list[str]:
        """Names of the lanes that are open."""
        return sorted(self._lanes)

    def add(self, name: str, lane: LaneEnd, priority: int) -> None:
        """Serve a lane from now on, until it closes or fails."""
        self._lanes[name] = lane
        thread = threading.Thread(target=self._receive, args=(name, lane, priority), name=f"lane-{name}", daemon=True)
        self._threads[name] = thread
        thread.start()

    def close(self, timeout_s: float = 5.0) -> None:
        for lane in list(self._lanes.values()):
            lane.close()
        self._frames.put((_STOP, next(self._order), None, None))
        self._worker.join(timeout_s)
        for thread in list(self._threads.values()):
            thread.join(timeout_s)

    def _receive(self, name: str, lane: LaneEnd, priority: int) -> None:
        try:
            while (call := lane.receive()) is not None:
                self._frames.put((priority, next(self._order), lane, call))
        except Exception as error:
            expected = isinstance(error, LaneError)
            _log.log(
                logging.WARNING if expected else logging.ERROR,
                "lane %s is given up: %s",
                name,
                error,
                exc_info=not expected,
            )
        finally:
            # The other end must notice at once, whatever the reason.
            lane.close()
            self._lanes.pop(name, None)

    def _work(self) -> None:
        while True:
            _, _, lane, call = self._frames.get()
            if lane is None or call is None:
                return
            try:
                self._answer(lane, call)
            except LaneError as error:
                # The lane's own thread sees the same break and retires it; other lanes go on.
                _log.warning("a reply found its lane broken: %s", error)

    def _answer(self, lane: LaneEnd, call: LaneCall) -> None:
        try:
            y_UH = self._shard.serve(call.layer, call.rows)
        except Exception as error:
            # The attention worker must hear of any fault, or its step would wait for the deadline.
            _log.exception("a call for layer %d failed", call.layer)
            lane.refuse(call, error)
        else:
            lane.reply(call, y_UH)
