"""The accepted requests that have not ended."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence

from cluster.frontend.admission import Demand
from cluster.frontend.answer import Answer, Piece
from cluster.frontend.journal import Journal
from cluster.frontend.record import Record
from cluster.frontend.validation import GenerateSpec
from cluster.frontend.workload import Stage
from model.tokenizer import Tokenizer
from octet.errors import RequestError
from octet.ids import RequestId, WorkerId
from octet.messages import PrefillRequest, TokenEvent


class LiveRequest:
    """One request: what is committed of it, what its clients may read, and where it is computed."""

    def __init__(
        self,
        spec: GenerateSpec,
        request: PrefillRequest,
        demand: Demand,
        tokenizer: Tokenizer | None,
        most_choices: Callable[[int], int],
    ) -> None:
        """
        Args:
            request: `spec.request` with its first attempt.
            demand: what it was admitted with.
            most_choices: see `Journal`.

        Raises: RequestError if its client claims to have received what this request cannot answer.
        """
        self.journal = Journal(request, most_choices)
        self.record = Record(
            request.request_id, spec.digest, request.choices, request.num_prompt_tokens, spec.stream_interval
        )
        self.resumable, self.keep, self.demand = spec.resumable, spec.keep, demand
        self.prefilled = False
        self.first_token_s: float | None = None
        self._early: dict[int, dict[int, tuple[TokenEvent, WorkerId]]] = {}
        self.last_token_s: dict[int, float] = {}
        self._answers = {
            choice: Answer(choice, tokenizer, request.stopping, spec.stop_strings) for choice in request.choices
        }
        self.deadline_s = 0.0
        self.timers: dict[str, asyncio.TimerHandle] = {}
        self.stages: dict[int, Stage] = {}
        """Of the choices that some worker computes; the dispatcher's."""
        self.failed_on: dict[int, set[WorkerId]] = {}
        """Workers that could not go on with a choice; the dispatcher's."""
        self.num_restarts: dict[int, int] = {}
        """The dispatcher's."""
        for choice, token_ids in zip(request.choices, spec.received, strict=False):
            self._adopt(choice, token_ids)
        self._num_received = self.record.usage.completion_tokens

    @property
    def request_id(self) -> RequestId:
        return self.record.request_id

    @property
    def num_generated(self) -> int:
        """Tokens that were committed since it was accepted."""
        return self.record.usage.completion_tokens - self._num_received

    def first_requests(self) -> list[PrefillRequest]:
        """What is to be computed: everything, or what comes after the tokens that its client has."""
        if self.record.usage.completion_tokens == 0:
            return [self.journal.request]
        return self.journal.compute_again(self.journal.live_choices())

    def in_order(self, event: TokenEvent, worker_id: WorkerId) -> Iterator[tuple[TokenEvent, WorkerId]]:
        """Tokens of the live attempt whose turn it is, with their workers.

        A decode worker's second token may overtake its prefill worker's first: it is held until that has come.
        """
        early = self._early.setdefault(event.choice, {})
        if event.index > self.journal.num_tokens(event.choice):
            if event.index < self.journal.request.stopping.max_new_tokens:
                early[event.index] = event, worker_id
            return
        yield event, worker_id
        while (held := early.pop(self.journal.num_tokens(event.choice), None)) is not None:
            yield held

    def commit(self, event: TokenEvent) -> bool:
        """Take a token if it is the next one of its choice's live attempt, and end the choice if it is its last."""
        if not self.journal.commit(event):
            return False
        if event.index == 0 and self.journal.num_completion_tokens == 1:
            # Later computations find what the first has put there, and committed tokens beside the prompt.
            self.record.cached_tokens = min(event.cached_tokens, self.journal.request.num_prompt_tokens)
        self.record.prompt_logprobs = self.record.prompt_logprobs or event.prompt_logprobs
        self._say(self._answers[event.choice].push(event))
        return True

    def abort(self) -> None:
        """End every choice that has not ended, with what is committed."""
        for choice in self.journal.live_choices():
            self._say(self._answers[choice].abort())

    def set_timer(self, name: str, timer: asyncio.TimerHandle | None) -> None:
        """Replace a timer, or only stop it."""
        if name in self.timers:
            self.timers.pop(name).cancel()
        if timer is not None:
            self.timers[name] = timer

    def _adopt(self, choice: int, token_ids: Sequence[int]) -> None:
        request = self.journal.request
        for index, token_id in enumerate(token_ids):
            event = TokenEvent(
                request_id=request.request_id,
                choice=choice,
                attempt=request.attempt,
                index=index,
                token_id=token_id,
                finish_reason=request.stopping.finish_reason(token_id, index + 1),
            )
            if not self.commit(event):
                raise RequestError(
                    f"received[{choice}]", f"{len(token_ids)} tokens", f"at most {index}, where the answer ends"
                )

    def _say(self, piece: Piece) -> None:
        if piece.finish_reason is not None:
            self.journal.end(piece.choice)
        self.record.say(piece)


class LiveRequests:
    """By id."""

    def __init__(self) -> None:
        self._requests: dict[RequestId, LiveRequest] = {}

    def __len__(self) -> int:
        return len(self._requests)

    def all(self) -> list[LiveRequest]:
        return list(self._requests.values())

    def get(self, request_id: RequestId) -> LiveRequest | None:
        return self._requests.get(request_id)

    def add(self, live: LiveRequest) -> None:
        self._requests[live.request_id] = live

    def remove(self, live: LiveRequest) -> None:
        del self._requests[live.request_id]
