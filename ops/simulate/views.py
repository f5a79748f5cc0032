"""What the frontend knows of the workers: the views that the scheduler decides by, kept up to date one by one."""

from __future__ import annotations

import collections
import dataclasses

from cluster.frontend.scheduler import Assignment, DecodeView, PrefillView, Wait, schedule
from octet.ids import WorkerId
from ops.simulate.decode_pool import DecodePool
from ops.simulate.load import BLOCK_TOKENS, Request
from ops.simulate.prefill_worker import PrefillWorker


class Views:
    """Of workers that take new requests."""

    def __init__(self, decode: DecodePool, prefix_cache: bool) -> None:
        self._pool, self._prefix_cache = decode, prefix_cache
        self._prefill: dict[int, PrefillView] = {}
        self._decode: dict[int, DecodeView] = {}
        self._promised: collections.Counter[int] = collections.Counter()
        self._sequences: collections.Counter[int] = collections.Counter()
        self._holders: dict[int, set[int]] = {}
        """By block of a prefix, the prefill workers that have it."""

    def add(self, pool: str, number: int) -> None:
        worker_id = WorkerId(f"{pool}-{number}")
        if pool == "prefill":
            self._prefill[number] = PrefillView(worker_id=worker_id, queued_tokens=0)
        else:
            self._decode[number] = DecodeView(
                worker_id=worker_id, free_pages=self._pool.pages, promised_pages=0, live_sequences=0
            )

    def remove(self, pool: str, number: int) -> None:
        """It gets no new requests."""
        del (self._prefill if pool == "prefill" else self._decode)[number]

    def schedule(self, request: Request) -> tuple[Assignment | Wait, int]:
        """The scheduler's decision, and the tokens that the chosen prefill worker has already."""
        cached = self._cached_tokens(request)
        prefill = [
            dataclasses.replace(view, cached_tokens=cached[number]) if number in cached else view
            for number, view in self._prefill.items()
        ]
        decision = schedule(prefill, list(self._decode.values()))
        known = cached.get(number_of(decision.prefill), 0) if isinstance(decision, Assignment) else 0
        return decision, min(known, request.prompt_tokens - 1)

    def promise(self, row: int, pages: int) -> None:
        """A request is on its way to this decode worker."""
        self._promised[row] += pages
        self._sequences[row] += 1
        self.look_at_decode(row)

    def arrived(self, row: int, pages: int) -> None:
        """Its pages count as in use now."""
        self._promised[row] -= pages
        self.look_at_decode(row)

    def ended(self, row: int) -> None:
        self._sequences[row] -= 1
        self.look_at_decode(row)

    def expects(self, row: int) -> bool:
        """Whether requests are here or on their way."""
        return self._sequences[row] > 0

    def look_at_decode(self, row: int) -> None:
        view = self._decode.get(row)
        if view is not None:
            self._decode[row] = DecodeView(
                worker_id=view.worker_id,
                free_pages=self._pool.pages - self._pool.held_pages(row),
                promised_pages=self._promised[row],
                live_sequences=self._sequences[row],
            )

    def look_at_prefill(self, worker: PrefillWorker) -> None:
        view = self._prefill.get(worker.number)
        if view is not None:
            self._prefill[worker.number] = PrefillView(worker_id=view.worker_id, queued_tokens=worker.queued_tokens)

    def learn(self, number: int, learned: list[int], lost: list[int]) -> None:
        """What a prefill worker's cache has gained and lost."""
        for block in learned:
            self._holders.setdefault(block, set()).add(number)
        for block in lost:
            holders = self._holders[block]
            holders.discard(number)
            if not holders:
                del self._holders[block]

    def _cached_tokens(self, request: Request) -> dict[int, int]:
        """By prefill worker, the tokens of the longest beginning that it has."""
        cached: dict[int, int] = {}
        if not self._prefix_cache:
            return cached
        alive: set[int] | None = None
        for depth, block in enumerate(request.blocks, start=1):
            holders = self._holders.get(block, set())
            alive = holders if alive is None else alive & holders
            if not alive:
                break
            for number in alive:
                cached[number] = depth * BLOCK_TOKENS
        return cached


def number_of(worker_id: WorkerId) -> int:
    return int(worker_id.rpartition("-")[2])
