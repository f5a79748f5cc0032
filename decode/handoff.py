"""The receiving side of the KV hand-off: pulls pages in threads of its own, so that no step waits for a transfer."""

from __future__ import annotations

import dataclasses
import logging
import queue
import threading
from collections.abc import Callable, Mapping

import torch

from octet.errors import OctetError
from octet.ids import LeaseId, WorkerId
from octet.messages import KvOffer, KvPull
from router.channel import KvChannel

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, slots=True)
class Arrival:
    """The outcome of a pull: the pages' bytes, or why there are none."""

    lease_id: LeaseId
    pages: torch.Tensor | None
    reason: str = ""


class KvReceiver:
    """One thread per prefill worker: a peer that fell silent delays nobody else's pages."""

    def __init__(
        self,
        worker_id: WorkerId,
        channels: Mapping[WorkerId, KvChannel],
        ask: Callable[[WorkerId, KvPull], None],
        wake: Callable[[], None],
    ) -> None:
        """
        Args:
            ask: sends a pull to a prefill worker; any thread may call it.
            wake: called when an arrival waits; any thread may call it.
        """
        self._worker_id, self._channels, self._ask, self._wake = worker_id, channels, ask, wake
        self._arrivals: queue.SimpleQueue[Arrival] = queue.SimpleQueue()
        self._offers: dict[WorkerId, queue.SimpleQueue[tuple[KvOffer, int] | None]] = {
            prefill: queue.SimpleQueue() for prefill in channels
        }
        self._threads = [
            threading.Thread(target=self._pull_all, args=(prefill,), name=f"kv-from-{prefill}", daemon=True)
            for prefill in channels
        ]
        for thread in self._threads:
            thread.start()

    def pull(self, offer: KvOffer, payload_bytes: int) -> None:
        """Ask for the pages of an offer; an `Arrival` follows, whatever happens."""
        if offer.prefill_worker in self._offers:
            self._offers[offer.prefill_worker].put((offer, payload_bytes))
        else:
            self._arrivals.put(Arrival(offer.lease_id, None, f"no channel to {offer.prefill_worker}"))

    def arrived(self) -> list[Arrival]:
        arrivals = []
        while not self._arrivals.empty():
            arrivals.append(self._arrivals.get())
        return arrivals

    def close(self, timeout_s: float = 5.0) -> None:
        for offers in self._offers.values():
            offers.put(None)
        for channel in self._channels.values():
            channel.close()
        for thread in self._threads:
            thread.join(timeout_s)

    def _pull_all(self, prefill: WorkerId) -> None:
        broken = ""
        while (item := self._offers[prefill].get()) is not None:
            offer, payload_bytes = item
            pages, reason = None, broken
            if not broken:
                try:
                    self._ask(prefill, KvPull(lease_id=offer.lease_id, decode_worker=self._worker_id))
                    pages = self._channels[prefill].receive(payload_bytes)
                    reason = "" if pages is not None else "its lease was over before the pages were taken"
                except OctetError as error:
                    _log.warning("the channel from %s is given up: %s", prefill, error)
                    broken = reason = f"the channel from {prefill} broke: {error}"
            self._arrivals.put(Arrival(offer.lease_id, pages, reason))
            self._wake()
