"""The sending side of the KV hand-off: a thread that answers pulls, so that no step waits for a transfer."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Mapping

from model.kv_cache import KvCache
from octet.errors import LaneError
from octet.faults import reach
from octet.ids import LeaseId, WorkerId
from octet.messages import KvPull
from router.channel import KvChannel
from router.leases import LeaseTable

_log = logging.getLogger(__name__)


class _Peer:
    """A decode worker's channel, and the pulls that wait for it."""

    def __init__(self, channel: KvChannel) -> None:
        self.channel = channel
        self.pulls: queue.SimpleQueue[LeaseId | None] = queue.SimpleQueue()
        self.broken = False
        self.thread: threading.Thread


class KvSender:
    """Answers pulls, each decode worker's in a thread of its own: one that does not read holds up no other."""

    def __init__(self, cache: KvCache, leases: LeaseTable, channels: Mapping[WorkerId, KvChannel]) -> None:
        self._cache, self._leases = cache, leases
        self._peers: dict[WorkerId, _Peer] = {}
        for worker_id, channel in channels.items():
            self.connect(worker_id, channel)

    def connect(self, worker_id: WorkerId, channel: KvChannel) -> None:
        """Answer the pulls of one more decode worker, or over another channel than before."""
        self.disconnect(worker_id)
        peer = _Peer(channel)
        peer.thread = threading.Thread(
            target=self._answer, args=(worker_id, peer), name=f"kv-to-{worker_id}", daemon=True
        )
        self._peers[worker_id] = peer
        peer.thread.start()

    @property
    def severed(self) -> list[WorkerId]:
        """Workers whose channels have broken."""
        return [worker_id for worker_id, peer in list(self._peers.items()) if peer.broken]

    def disconnect(self, worker_id: WorkerId, timeout_s: float = 5.0) -> None:
        """Break the channel to a decode worker that is gone. Idempotent."""
        if (peer := self._peers.pop(worker_id, None)) is not None:
            peer.pulls.put(None)
            peer.channel.close()
            peer.thread.join(timeout_s)

    def answer(self, pull: KvPull) -> None:
        if (peer := self._peers.get(pull.decode_worker)) is not None:
            peer.pulls.put(pull.lease_id)
        else:
            _log.warning("a pull from %s, to which there is no channel", pull.decode_worker)

    def close(self, timeout_s: float = 5.0) -> None:
        for worker_id in list(self._peers):
            self.disconnect(worker_id, timeout_s)

    def _answer(self, worker_id: WorkerId, peer: _Peer) -> None:
        channel = peer.channel
        while (lease_id := peer.pulls.get()) is not None:
            pages = self._leases.begin_sending(lease_id)
            try:
                if pages is None:
                    channel.send(None)
                else:
                    for part in self._cache.parts(pages):
                        reach("handoff.send")
                        channel.send(self._cache.export_pages(part))
            except LaneError as error:
                _log.warning("the channel to %s is given up: %s", worker_id, error)
                peer.broken = True
                return
            finally:
                if pages is not None:
                    self._leases.end_sending(lease_id)
