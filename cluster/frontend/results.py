"""Requests that have ended, kept for clients that lost their connection or ask again."""

from __future__ import annotations

from collections import OrderedDict

from cluster.frontend.record import Record
from octet.config import FrontendConfig
from octet.ids import RequestId


class KeptResults:
    """Bounded by time, number and bytes; the oldest go first. Clocks are passed in."""

    def __init__(self, config: FrontendConfig) -> None:
        self._keep_s = config.keep_results_s
        self._max_results, self._max_bytes = config.max_kept_results, config.max_kept_mib * 2**20
        self._kept: OrderedDict[RequestId, tuple[Record, float]] = OrderedDict()
        self._num_bytes = 0

    def __len__(self) -> int:
        return len(self._kept)

    def keep(self, record: Record, now_s: float) -> None:
        """In place of an earlier one of the same id."""
        self.forget(record.request_id)
        self._kept[record.request_id] = record, now_s + self._keep_s
        self._num_bytes += record.num_bytes
        self._trim(now_s)

    def get(self, request_id: RequestId, now_s: float) -> Record | None:
        self._trim(now_s)
        found = self._kept.get(request_id)
        return found[0] if found else None

    def forget(self, request_id: RequestId) -> None:
        """Idempotent."""
        found = self._kept.pop(request_id, None)
        if found is not None:
            self._num_bytes -= found[0].num_bytes

    def _trim(self, now_s: float) -> None:
        while self._kept:
            request_id, (_, until_s) = next(iter(self._kept.items()))
            full = len(self._kept) > self._max_results or self._num_bytes > self._max_bytes
            if not full and now_s < until_s:
                return
            self.forget(request_id)
