"""What a frontend has given each worker and has not heard back yet: what the scheduler decides by."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping

from cluster.frontend.scheduler import Assignment, DecodeView, PrefillView
from octet.ids import WorkerId
from octet.messages import WorkerLoad


@dataclasses.dataclass(slots=True, kw_only=True)
class Stage:
    """Where one choice's live attempt is: in its prefill worker, or on to its decode worker."""

    attempt: int
    prefill: WorkerId
    decode: WorkerId
    queued_tokens: int
    """Of the prompt, until the first token comes."""
    pages: int
    """That the decode worker will need and does not count as taken yet."""
    decoding: bool = False
    """The decode worker has been heard of this attempt, so its KV has left the prefill worker."""

    def depends_on(self, worker_id: WorkerId) -> bool:
        """Whether the loss of a worker ends this attempt."""
        return worker_id == self.decode or (worker_id == self.prefill and not self.decoding)


@dataclasses.dataclass(slots=True)
class _Tally:
    queued_tokens: int = 0
    promised_pages: int = 0
    sequences: int = 0


class Workload:
    """Stages, added up by worker; belongs to the dispatcher."""

    def __init__(self, page_size: int, decode_pages: int) -> None:
        """
        Args:
            decode_pages: of each decode worker; one that has not reported yet has them all free.
        """
        self._page_size, self._decode_pages = page_size, decode_pages
        self._tallies: dict[WorkerId, _Tally] = {}
        self._prefill: tuple[WorkerId, ...] = ()
        self._decode: tuple[WorkerId, ...] = ()
        self._loads: dict[WorkerId, WorkerLoad] = {}

    def set_workers(
        self, prefill: Collection[WorkerId], decode: Collection[WorkerId], draining: Collection[WorkerId]
    ) -> None:
        """Those that are there from now on. Draining ones have no view: they are given nothing more."""
        known = {*prefill, *decode}
        self._tallies = {worker_id: self._tallies.get(worker_id, _Tally()) for worker_id in known}
        self._loads = {worker_id: load for worker_id, load in self._loads.items() if worker_id in known}
        self._prefill = tuple(sorted(set(prefill) - set(draining)))
        self._decode = tuple(sorted(set(decode) - set(draining)))

    @property
    def unanswered_prompt_tokens(self) -> int:
        """Sent to prefill workers, which have not answered with a first token: they wait, or are being computed."""
        return sum(tally.queued_tokens for tally in self._tallies.values())

    def knows(self, worker_id: WorkerId) -> bool:
        return worker_id in self._tallies

    def report(self, worker_id: WorkerId, load: WorkerLoad) -> None:
        self._loads[worker_id] = load

    def assign(
        self, choices: tuple[int, ...], attempt: int, num_tokens: int, num_cached: int, to: Assignment
    ) -> dict[int, Stage]:
        """Note where choices are computed. The first of them carries the prompt's share of work and pages."""
        pages = -(-num_tokens // self._page_size)
        stages = {
            choice: Stage(
                attempt=attempt,
                prefill=to.prefill,
                decode=to.decode,
                queued_tokens=num_tokens - num_cached if number == 0 else 0,
                pages=pages if number == 0 else 1,
            )
            for number, choice in enumerate(choices)
        }
        for stage in stages.values():
            self._add(stage, 1)
        return stages

    def note_token(self, stage: Stage, worker_id: WorkerId) -> None:
        """A token came from a worker: the prompt is computed, and once it is the decode worker's, its pages are taken.

        A token from another decode worker than the stage's tells that the sequence has been migrated there.
        """
        self._add(stage, -1)
        stage.queued_tokens = 0
        if worker_id != stage.prefill:
            stage.decode, stage.pages, stage.decoding = worker_id, 0, True
        self._add(stage, 1)

    def drop(self, stage: Stage) -> None:
        """The choice has ended, or its attempt has."""
        self._add(stage, -1)

    def prefill_views(self, cached_tokens: Mapping[WorkerId, int]) -> list[PrefillView]:
        """
        Args:
            cached_tokens: for every worker, what it probably has of the request at hand.
        """
        return [
            PrefillView(
                worker_id=worker_id,
                queued_tokens=self._tallies[worker_id].queued_tokens,
                cached_tokens=cached_tokens.get(worker_id, 0),
            )
            for worker_id in self._prefill
        ]

    def decode_views(self) -> list[DecodeView]:
        return [
            DecodeView(
                worker_id=worker_id,
                free_pages=self._loads[worker_id].kv_pages_free if worker_id in self._loads else self._decode_pages,
                promised_pages=self._tallies[worker_id].promised_pages,
                live_sequences=self._tallies[worker_id].sequences,
            )
            for worker_id in self._decode
        ]

    def free_places(self, num_tokens: int, max_batch: int) -> int:
        """In batches of so many sequences each, of the decode workers that have pages for so many tokens."""
        num_pages = -(-num_tokens // self._page_size)
        return sum(
            max(0, max_batch - view.live_sequences)
            for view in self.decode_views()
            if view.free_pages - view.promised_pages >= num_pages
        )

    def _add(self, stage: Stage, sign: int) -> None:
        """Workers that are gone have no tally any more."""
        if prefill := self._tallies.get(stage.prefill):
            prefill.queued_tokens += sign * stage.queued_tokens
        if decode := self._tallies.get(stage.decode):
            decode.promised_pages += sign * stage.pages
            decode.sequences += sign
