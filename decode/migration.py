"""Running sequences on their way to another decode worker, by the same hand-off as from a prefill worker."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence

from decode.batch import RunningSequence
from octet.ids import LeaseId, WorkerId
from octet.messages import Abort, KvAck, KvOffer, KvPull, KvRenew, pack_ids
from router.kv_sender import KvSender
from router.leases import LeaseTable


class Migration:
    """Offers sequences to other workers, and keeps their pages until those have them. Belongs to one thread."""

    def __init__(self, worker_id: WorkerId, leases: LeaseTable, sender: KvSender) -> None:
        self._worker_id, self._leases, self._sender = worker_id, leases, sender
        self._numbers = itertools.count()

    def __len__(self) -> int:
        """Sequences that are offered and not taken over yet."""
        return len(self._leases)

    def offer(self, sequence: RunningSequence, to: Sequence[WorkerId], now_s: float) -> tuple[WorkerId, KvOffer]:
        """Give a sequence, which runs here no more, and its pages away. Several workers take turns."""
        number = next(self._numbers)
        target = to[number % len(to)]
        lease_id = LeaseId(f"{self._worker_id}/moved/{number}")
        # The last token has no KV yet: it is to the other worker what a first token is.
        *computed, last = sequence.token_ids
        request = dataclasses.replace(
            sequence.request, choices=(sequence.choice,), token_ids=pack_ids(computed), decode_worker=target
        )
        self._leases.grant(lease_id, request.request_id, request.attempt, request.choices, sequence.pages, now_s)
        offer = KvOffer(
            lease_id=lease_id,
            source=self._worker_id,
            request=request,
            next_tokens=(last,),
            lease_s=self._leases.lease_s,
        )
        return target, offer

    def handle(self, message: KvPull | KvRenew | KvAck) -> None:
        match message:
            case KvPull():
                self._sender.answer(message)
            case KvRenew(lease_id=lease_id):
                self._leases.renew(lease_id)
            case KvAck(lease_id=lease_id):
                self._leases.acknowledge(lease_id)

    def abort(self, abort: Abort) -> None:
        self._leases.abort(abort.request_id, abort.choice, abort.attempt)

    def reclaim(self, now_s: float) -> list[int]:
        """Pages that are this worker's again."""
        return self._leases.reclaim(now_s)
