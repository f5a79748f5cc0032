"""Pages that wait to be taken over by a decode worker."""

from __future__ import annotations

import dataclasses
import threading

from octet.ids import LeaseId, RequestId


@dataclasses.dataclass(slots=True, kw_only=True)
class _Lease:
    request_id: RequestId
    attempt: int
    choices: tuple[int, ...]
    pages: list[int]
    deadline_s: float
    sending: bool = False
    renewed: bool = False
    over: bool = False


class LeaseTable:
    """Holds pages under leases. A lease ends by acknowledgement, abort or deadline, whichever is first.

    The deadline is for a decode worker that is lost: one that has no room yet renews its leases.

    The engine's thread grants and reclaims, the sender's thread begins and ends transfers. Pages of a lease that ends
    while they are being sent come back when the transfer is over, so that nobody ever receives another request's KV.
    """

    def __init__(self, lease_s: float) -> None:
        self._lease_s = lease_s
        self._leases: dict[LeaseId, _Lease] = {}
        self._lock = threading.Lock()

    @property
    def lease_s(self) -> float:
        return self._lease_s

    def __len__(self) -> int:
        return len(self._leases)

    def grant(
        self,
        lease_id: LeaseId,
        request_id: RequestId,
        attempt: int,
        choices: tuple[int, ...],
        pages: list[int],
        now_s: float,
    ) -> None:
        with self._lock:
            self._leases[lease_id] = _Lease(
                request_id=request_id, attempt=attempt, choices=choices, pages=pages, deadline_s=now_s + self._lease_s
            )

    def begin_sending(self, lease_id: LeaseId) -> list[int] | None:
        """The pages to send, or None if the lease is over."""
        with self._lock:
            lease = self._leases.get(lease_id)
            if lease is None or lease.over:
                return None
            lease.sending = True
            return lease.pages

    def end_sending(self, lease_id: LeaseId) -> None:
        with self._lock:
            self._leases[lease_id].sending = False

    def acknowledge(self, lease_id: LeaseId) -> None:
        """Idempotent; an unknown lease has ended already."""
        with self._lock:
            if lease_id in self._leases:
                self._leases[lease_id].over = True

    def renew(self, lease_id: LeaseId) -> None:
        """Let a lease's time count anew from the next `reclaim` on, unless it is over."""
        with self._lock:
            if lease_id in self._leases:
                self._leases[lease_id].renewed = True

    def abort(self, request_id: RequestId, choice: int | None = None, attempt: int | None = None) -> None:
        with self._lock:
            for lease in self._leases.values():
                if (
                    lease.request_id == request_id
                    and (choice is None or lease.choices == (choice,))
                    and attempt in (None, lease.attempt)
                ):
                    lease.over = True

    def reclaim(self, now_s: float) -> list[int]:
        """The pages of leases that are over, which are the caller's again."""
        pages: list[int] = []
        with self._lock:
            for lease_id, lease in list(self._leases.items()):
                if lease.renewed:
                    lease.renewed, lease.deadline_s = False, now_s + self._lease_s
                if (lease.over or now_s >= lease.deadline_s) and not lease.sending:
                    pages += lease.pages
                    del self._leases[lease_id]
        return pages
