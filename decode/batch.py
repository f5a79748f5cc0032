"""Which sequences a decode worker holds, and which one gives way: pure bookkeeping over the page pool."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator, Sequence

import torch

from decode.admission import AnswerLengths, Demand, peak_pages
from model.pages import PagePool
from model.sampler import SampleRow
from octet.ids import RequestId
from octet.messages import KvOffer, PrefillRequest


@dataclasses.dataclass(slots=True, kw_only=True)
class RunningSequence:
    """One choice of a request. The last of `token_ids` has no KV yet: it is the next step's input."""

    request: PrefillRequest
    choice: int
    token_ids: list[int]
    pages: list[int]
    unseen: list[torch.Tensor] = dataclasses.field(default_factory=list)
    """With speculation: final hidden states `[·, H]` of the last positions, which the drafter has not seen yet."""
    ended: bool = False

    @property
    def num_new_tokens(self) -> int:
        return len(self.token_ids) - self.request.num_prompt_tokens

    @property
    def num_left(self) -> int:
        """Tokens that may still come."""
        return self.request.stopping.max_new_tokens - self.num_new_tokens

    def sample_row(self, drafted: Sequence[int] = ()) -> SampleRow:
        """The next token, or the one after these drafts."""
        request = self.request
        return SampleRow(
            sampling=request.sampling,
            stopping=request.stopping,
            output=request.output,
            choice=self.choice,
            token_ids=self.token_ids,
            num_prompt_tokens=request.num_prompt_tokens,
            drafted=drafted,
        )


@dataclasses.dataclass(slots=True, kw_only=True)
class Incoming:
    """An offer with pages reserved for it, while its KV is on the way."""

    offer: KvOffer
    token_ids: list[int]
    pages: list[int]
    """For the prompt; then one copy of its last page for every further choice, if that page is not full."""
    dropped: set[int] = dataclasses.field(default_factory=set)
    """Choices that were aborted meanwhile."""

    @property
    def wanted(self) -> list[tuple[int, int]]:
        """(choice, first token) of the choices that are still wanted."""
        pairs = zip(self.offer.request.choices, self.offer.next_tokens, strict=True)
        return [(choice, token_id) for choice, token_id in pairs if choice not in self.dropped]


class DecodeBatch:
    """Running sequences, oldest first."""

    def __init__(self, pool: PagePool, max_batch: int, lookahead: int = 0) -> None:
        """
        Args:
            lookahead: tokens after a position that its KV depends on, 1 with an MTP layer: the choices of a request do
                not share what depends on their own tokens.
        """
        self._pool, self._max_batch, self._lookahead = pool, max_batch, lookahead
        self._answers = AnswerLengths()
        self.running: list[RunningSequence] = []

    def pages_to_admit(self, num_tokens: int, num_choices: int) -> int:
        """Pages that an offer of `num_tokens` takes: whole pages are shared by its choices, a partial one is not."""
        num_pages = self._pool.pages_for(num_tokens)
        return num_pages + (num_choices - 1) * (num_pages - self._num_shared(num_tokens))

    def _num_shared(self, num_tokens: int) -> int:
        """All pages, or all but the last."""
        return (num_tokens - self._lookahead) // self._pool.page_size

    def reserve(self, offer: KvOffer, incoming: Collection[Incoming]) -> list[int] | None:
        """Pages for an offer, or None while it has to wait: for a place, or for pages that last until somebody ends.

        One that comes to an idle worker is always let in: no frontend asks for more than such a worker has.
        """
        request = offer.request
        num_incoming = sum(len(other.offer.request.choices) for other in incoming)
        if len(self.running) + num_incoming + len(request.choices) > self._max_batch:
            return None
        if self.running or incoming:
            requests = [request, *(other.offer.request for other in incoming)]
            if peak_pages([*self._demands(requests)], self._pool.page_size) > self._pool.num_pages:
                return None
        return self._pool.allocate(self.pages_to_admit(request.num_tokens, len(request.choices)))

    def admit(self, incoming: Incoming, unseen: Sequence[torch.Tensor] = ()) -> list[tuple[int, int]]:
        """Make the wanted choices running sequences.

        Args:
            unseen: see `RunningSequence`.

        Returns: (source, target) pages to be copied, for each choice a partial last page of its own.
        """
        request, num_tokens = incoming.offer.request, len(incoming.token_ids)
        num_shared = self._num_shared(num_tokens)
        shared, own = incoming.pages[:num_shared], incoming.pages[num_shared:]
        wanted = incoming.wanted
        copies: list[tuple[int, int]] = []
        for number, (choice, token_id) in enumerate(wanted):
            self._pool.share(shared)
            last = own[number : number + 1]
            if number > 0 and last:
                copies.append((own[0], last[0]))
            self.running.append(
                RunningSequence(
                    request=request,
                    choice=choice,
                    token_ids=[*incoming.token_ids, token_id],
                    pages=[*shared, *last],
                    unseen=list(unseen),
                )
            )
        self._pool.release(shared)
        self._pool.release(own[len(wanted) :])
        self.running.sort(key=_order)
        return copies

    def grow(self) -> list[RunningSequence]:
        """Give every running sequence a page for its next token; the youngest give way where there are none.

        Returns: the sequences that were evicted.
        """
        evicted: list[RunningSequence] = []
        index = 0
        while index < len(self.running):
            sequence = self.running[index]
            if len(sequence.token_ids) <= len(sequence.pages) * self._pool.page_size:
                index += 1
            elif (page := self._pool.allocate(1)) is not None:
                sequence.pages += page
            else:
                youngest = self.running[-1]
                self._release(youngest)
                evicted.append(youngest)
        return evicted

    def make_room(self, sequence: RunningSequence, count: int) -> int:
        """Give a sequence pages for up to `count` drafts after its next token, as far as there are free ones.

        Returns: for how many there is room.
        """
        missing = self._pool.pages_for(len(sequence.token_ids) + count) - len(sequence.pages)
        sequence.pages += self._pool.allocate(max(0, min(missing, self._pool.num_free))) or []
        return min(count, len(sequence.pages) * self._pool.page_size - len(sequence.token_ids))

    def trim(self) -> None:
        """Take back the pages behind every sequence's next token: what they hold was drafted and did not stand."""
        for sequence in self.running:
            kept = self._pool.pages_for(len(sequence.token_ids))
            self._pool.release(sequence.pages[kept:])
            del sequence.pages[kept:]

    def remove(self, sequence: RunningSequence) -> None:
        """Let go of a sequence that has ended, however."""
        self._answers.note(sequence.num_new_tokens, sequence.request.stopping.max_new_tokens)
        self._release(sequence)

    def detach(self, sequence: RunningSequence) -> None:
        """Let a sequence go, whose pages are somebody else's from now on: those that hold KV, and no more."""
        self.running.remove(sequence)
        kept = self._pool.pages_for(len(sequence.token_ids) - 1)
        self._pool.release(sequence.pages[kept:])
        del sequence.pages[kept:]

    def _release(self, sequence: RunningSequence) -> None:
        self.running.remove(sequence)
        self._pool.release(sequence.pages)

    def _demands(self, requests: Collection[PrefillRequest]) -> Iterator[Demand]:
        """Of the running sequences, and of requests on their way here."""
        for sequence in self.running:
            yield self._demand(sequence.request, len(sequence.token_ids) - 1)
        for request in requests:
            yield from [self._demand(request, request.num_tokens)] * len(request.choices)

    def _demand(self, request: PrefillRequest, num_tokens: int) -> Demand:
        num_new_tokens = num_tokens + 1 - request.num_prompt_tokens
        return Demand(
            num_tokens=num_tokens,
            remaining=self._answers.remaining(num_new_tokens, request.stopping.max_new_tokens),
            siblings=(request.request_id, request.choices),
            shared_pages=self._num_shared(request.num_tokens),
        )

    def of(self, request_id: RequestId, choice: int | None = None, attempt: int | None = None) -> list[RunningSequence]:
        return [
            sequence
            for sequence in self.running
            if sequence.request.request_id == request_id
            and choice in (None, sequence.choice)
            and attempt in (None, sequence.request.attempt)
        ]


def _order(sequence: RunningSequence) -> tuple[int, float, int]:
    return sequence.request.priority, sequence.request.arrival_s, sequence.choice
