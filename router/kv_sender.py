"""The sending side of the KV hand-off: a thread that answers pulls, so that no step waits for a transfer."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Mapping

from model.kv_cache import KvCache
from octet.background import COMPUTING, step_back
from octet.errors import LaneError
from octet.faults import reach
from octet.ids import LeaseId, WorkerId
from octet.messages import KvPull
from router.channel import KvChannel
from router.leases import LeaseTable

_log = logging.getLogger(__name__)

_MOST_EARLY = 1024
"""Pulls that are kept for a channel that is not there yet: more than a decode worker has places for."""


class _Peer:
    """A decode worker's channel, and the pulls that wait for it."""

    def __init__(self, channel: KvChannel, number: int) -> None:
        self.channel, self.number = channel, number
        self.pulls: queue.SimpleQueue[LeaseId | None] = queue.SimpleQueue()
        self.broken = False
        self.thread: threading.Thread


class KvSender:
    """Answers pulls, each decode worker's in a thread of its own: one that does not read holds up no other."""

    def __init__(self, cache: KvCache, leases: LeaseTable, channels: Mapping[WorkerId, KvChannel]) -> None:
        self._cache, self._leases = cache, leases
        self._peers: dict[WorkerId, _Peer] = {}
        self._early: dict[WorkerId, tuple[int, list[LeaseId]]] = {}
        """Pulls for a channel whose other end was there first."""
        self._lock = threading.Lock()
        for worker_id, channel in channels.items():
            self.connect(worker_id, channel)

    def connect(self, worker_id: WorkerId, channel: KvChannel, number: int = 0) -> None:
        """Answer the pulls of one more decode worker, or over another channel than before.

        Args:
            number: of the channel, the same at its other end. Pulls that name another one are not answered on it.
        """
        self._cut(worker_id)
        peer = _Peer(channel, number)
        peer.thread = threading.Thread(
            target=self._answer, args=(worker_id, peer), name=f"kv-to-{worker_id}", daemon=True
        )
        with self._lock:
            self._peers[worker_id] = peer
            awaited, lease_ids = self._early.pop(worker_id, (number, []))
        for lease_id in lease_ids if awaited == number else ():
            peer.pulls.put(lease_id)
        peer.thread.start()

    @property
    def peers(self) -> list[WorkerId]:
        """Decode workers to which there is a channel. Any thread may ask."""
        return list(self._peers)

    @property
    def severed(self) -> list[WorkerId]:
        """Workers whose channels have broken."""
        return [worker_id for worker_id, peer in list(self._peers.items()) if peer.broken]

    def disconnect(self, worker_id: WorkerId, timeout_s: float = 5.0) -> None:
        """Break the channel to a decode worker that is gone, and forget what it has asked for. Idempotent."""
        self._cut(worker_id, timeout_s)
        with self._lock:
            self._early.pop(worker_id, None)

    def answer(self, pull: KvPull) -> None:
        """Send a lease's pages over the channel that the pull names, behind those asked for before. Does not wait."""
        with self._lock:
            peer = self._peers.get(pull.decode_worker)
            if peer is not None and peer.number == pull.channel:
                peer.pulls.put(pull.lease_id)
                return
            awaited, lease_ids = self._early.get(pull.decode_worker, (pull.channel, []))
            if awaited != pull.channel:
                lease_ids = []
            self._early[pull.decode_worker] = pull.channel, [*lease_ids, pull.lease_id][-_MOST_EARLY:]

    def close(self, timeout_s: float = 5.0) -> None:
        for worker_id in list(self._peers):
            self.disconnect(worker_id, timeout_s)

    def _cut(self, worker_id: WorkerId, timeout_s: float = 5.0) -> None:
        with self._lock:
            peer = self._peers.pop(worker_id, None)
        if peer is not None:
            peer.pulls.put(None)
            peer.channel.close()
            peer.thread.join(timeout_s)

    def _answer(self, worker_id: WorkerId, peer: _Peer) -> None:
        # What runs goes on meanwhile; who awaits the pages has its first token.
        step_back(COMPUTING)
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
