"""The receiving side of the KV hand-off: pulls pages in threads of its own, so that no step waits for a transfer."""

from __future__ import annotations

import dataclasses
import logging
import queue
import threading
from collections.abc import Callable, Mapping, Sequence

from model.kv_cache import KvCache
from octet.background import COMPUTING, step_back
from octet.errors import OctetError
from octet.faults import reach
from octet.ids import LeaseId, WorkerId
from octet.messages import KvOffer, KvPull
from router.channel import KvChannel

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, slots=True)
class Arrival:
    """The outcome of a pull: the KV is in the pages reserved for it, or there is a reason why not."""

    lease_id: LeaseId
    reason: str = ""


class _Peer:
    """A worker's channel, and the offers that were asked for and are to come over it, each with its pages."""

    def __init__(self, channel: KvChannel, number: int) -> None:
        self.channel, self.number = channel, number
        self.offers: queue.SimpleQueue[tuple[KvOffer, Sequence[int]] | None] = queue.SimpleQueue()
        self.broken = ""
        self.thread: threading.Thread


class KvReceiver:
    """One thread per worker that pages come from: a peer that fell silent delays nobody else's pages."""

    def __init__(
        self,
        worker_id: WorkerId,
        cache: KvCache,
        channels: Mapping[WorkerId, KvChannel],
        ask: Callable[[WorkerId, KvPull], None],
        wake: Callable[[], None],
    ) -> None:
        """
        Args:
            ask: sends a pull to the worker that has the pages.
            wake: called when an arrival waits; any thread may call it.
        """
        self._worker_id, self._cache, self._ask, self._wake = worker_id, cache, ask, wake
        self._arrivals: queue.SimpleQueue[Arrival] = queue.SimpleQueue()
        self._peers: dict[WorkerId, _Peer] = {}
        self._lock = threading.Lock()
        for prefill, channel in channels.items():
            self.connect(prefill, channel)

    def connect(self, source: WorkerId, channel: KvChannel, number: int = 0) -> None:
        """Take pages from one more worker, or over another channel than before.

        Args:
            number: of the channel, the same at its other end.
        """
        self.disconnect(source)
        peer = _Peer(channel, number)
        peer.thread = threading.Thread(
            target=self._pull_all, args=(source, peer), name=f"kv-from-{source}", daemon=True
        )
        self._peers[source] = peer
        peer.thread.start()

    @property
    def severed(self) -> list[WorkerId]:
        """Workers whose channels have broken."""
        return [worker_id for worker_id, peer in list(self._peers.items()) if peer.broken]

    def disconnect(self, source: WorkerId, timeout_s: float = 5.0) -> None:
        """Break the channel from a worker that is gone; pulls that wait for it arrive with a reason. Idempotent."""
        with self._lock:
            # Behind it, no offer is put that nobody would answer.
            if (peer := self._peers.pop(source, None)) is not None:
                peer.offers.put(None)
        if peer is not None:
            peer.channel.close()
            peer.thread.join(timeout_s)

    def pull(self, offer: KvOffer, pages: Sequence[int]) -> None:
        """Ask for the KV of an offer, to be put into `pages`; an `Arrival` follows, whatever happens.

        Asked for at once and not when those before it have come: a worker that computes a prompt hears of pulls between
        two layers, and all that wait shall wait for one layer together. Nobody else may use the pages before they have
        arrived.
        """
        with self._lock:
            # Asked for in the order in which they are received.
            if (peer := self._peers.get(offer.source)) is not None:
                self._ask_for(offer, peer)
                peer.offers.put((offer, pages))
        if peer is None:
            self._arrivals.put(Arrival(offer.lease_id, f"no channel to {offer.source}"))

    def arrived(self) -> list[Arrival]:
        arrivals = []
        while not self._arrivals.empty():
            arrivals.append(self._arrivals.get())
        return arrivals

    def close(self, timeout_s: float = 5.0) -> None:
        for source in list(self._peers):
            self.disconnect(source, timeout_s)

    def _ask_for(self, offer: KvOffer, peer: _Peer) -> None:
        if peer.broken:
            return
        pull = KvPull(lease_id=offer.lease_id, decode_worker=self._worker_id, channel=peer.number)
        try:
            self._ask(offer.source, pull)
        except OctetError as error:
            self._give_up(offer.source, peer, error)

    @staticmethod
    def _give_up(source: WorkerId, peer: _Peer, error: OctetError) -> None:
        _log.warning("the channel from %s is given up: %s", source, error)
        peer.broken = f"the channel from {source} broke: {error}"

    def _pull_all(self, source: WorkerId, peer: _Peer) -> None:
        # Sequences run meanwhile; who awaits the pages has its first token.
        step_back(COMPUTING)
        while (item := peer.offers.get()) is not None:
            offer, pages = item
            reason = peer.broken
            if not reason:
                try:
                    reason = self._receive(peer.channel, pages)
                except OctetError as error:
                    self._give_up(source, peer, error)
                    reason = peer.broken
            self._arrivals.put(Arrival(offer.lease_id, reason))
            self._wake()

    def _receive(self, channel: KvChannel, pages: Sequence[int]) -> str:
        for part in self._cache.parts(pages):
            reach("handoff.receive")
            received = channel.receive(len(part) * self._cache.page_bytes())
            if received is None:
                return "its lease was over before the pages were taken"
            self._cache.import_pages(part, received)
        return ""
