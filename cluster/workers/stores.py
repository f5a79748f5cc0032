"""Connections to the stores that peers host."""

from __future__ import annotations

import threading
from collections.abc import Collection

from cluster.members import Endpoint
from octet.ids import WorkerId
from octet.secret import ClusterSecret
from router.group_store import GroupStore


class Stores:
    """Joins each store once, since connecting takes seconds now and then, and keeps it until its host is gone."""

    def __init__(self, connect_s: float, secret: ClusterSecret) -> None:
        self._connect_s, self._secret = connect_s, secret
        self._joined: dict[WorkerId, GroupStore] = {}
        self._lock = threading.Lock()

    def of(self, peer: Endpoint, timeout_s: float | None = None) -> GroupStore:
        """Any thread may call it. Raises: LaneTimeoutError."""
        with self._lock:
            joined = self._joined.get(peer.worker_id)
        if joined is not None:
            return joined
        # Without the lock: a peer that does not answer holds up nobody who waits for another.
        joined = GroupStore.join(peer.store, timeout_s or self._connect_s, self._secret)
        with self._lock:
            return self._joined.setdefault(peer.worker_id, joined)

    def forget(self, peers: Collection[WorkerId]) -> None:
        """These are gone: close what leads to them. Idempotent."""
        with self._lock:
            for peer in peers:
                self._joined.pop(peer, None)
