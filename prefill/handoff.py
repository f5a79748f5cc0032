"""The sending side of the KV hand-off: a thread that answers pulls, so that no step waits for a transfer."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Mapping

from model.kv_cache import KvCache
from octet.errors import LaneError
from octet.ids import LeaseId, WorkerId
from octet.messages import KvPull
from prefill.leases import LeaseTable
from router.channel import KvChannel

_log = logging.getLogger(__name__)


class KvSender:
    """Answers pulls, each decode worker's in a thread of its own: one that does not read holds up no other."""

    def __init__(self, cache: KvCache, leases: LeaseTable, channels: Mapping[WorkerId, KvChannel]) -> None:
        self._cache, self._leases, self._channels = cache, leases, channels
        self._pulls: dict[WorkerId, queue.SimpleQueue[LeaseId | None]] = {
            worker_id: queue.SimpleQueue() for worker_id in channels
        }
        self._threads = [
            threading.Thread(target=self._answer, args=(worker_id,), name=f"kv-to-{worker_id}", daemon=True)
            for worker_id in channels
        ]
        for thread in self._threads:
            thread.start()

    def answer(self, pull: KvPull) -> None:
        if pull.decode_worker in self._pulls:
            self._pulls[pull.decode_worker].put(pull.lease_id)
        else:
            _log.warning("a pull from %s, to which there is no channel", pull.decode_worker)

    def close(self, timeout_s: float = 5.0) -> None:
        for pulls in self._pulls.values():
            pulls.put(None)
        for channel in self._channels.values():
            channel.close()
        for thread in self._threads:
            thread.join(timeout_s)

    def _answer(self, worker_id: WorkerId) -> None:
        channel = self._channels[worker_id]
        while (lease_id := self._pulls[worker_id].get()) is not None:
            pages = self._leases.begin_sending(lease_id)
            try:
                if pages is None:
                    channel.send(None)
                else:
                    for part in self._cache.parts(pages):
                        channel.send(self._cache.export_pages(part))
            except LaneError as error:
                _log.warning("the channel to %s is given up: %s", worker_id, error)
                return
            finally:
                if pages is not None:
                    self._leases.end_sending(lease_id)
