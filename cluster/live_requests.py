"""The accepted requests that have not ended."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Iterator
from typing import Literal

from cluster.answer import Answer, Piece
from cluster.journal import Journal
from cluster.transcript import Transcript
from cluster.validation import GenerateSpec
from cluster.workload import Stage
from model.tokenizer import Tokenizer
from octet.errors import OctetError
from octet.ids import RequestId, WorkerId
from octet.messages import PrefillRequest, TokenEvent, TokenLogprob


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Increment:
    """What a request's client learns at once."""

    piece: Piece
    prompt_logprobs: tuple[TokenLogprob, ...] = ()
    usage: Usage | None = None
    """In the request's last increment."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How a request ended. Every accepted request has exactly one in the end."""

    kind: Literal["finished", "failed", "cancelled"]
    error: OctetError | None = None
    """What its clients hear after everything that was committed."""


class LiveRequest:
    """One request: what is committed of it, who reads it, and where it is computed."""

    def __init__(self, spec: GenerateSpec, request: PrefillRequest, tokenizer: Tokenizer | None) -> None:
        self.journal = Journal(request)
        self.transcripts = {choice: Transcript(choice) for choice in request.choices}
        self._answers = {
            choice: Answer(choice, tokenizer, request.stopping, spec.stop_strings) for choice in request.choices
        }
        self.outcome: Outcome | None = None
        self.prompt_logprobs: tuple[TokenLogprob, ...] = ()
        self._cached_tokens: int | None = None
        self.readers: set[Reader] = set()
        self.deadline: asyncio.TimerHandle | None = None
        self.stages: dict[int, Stage] = {}
        """Of the choices that some worker computes; the dispatcher's."""
        self.failed_on: dict[int, set[WorkerId]] = {}
        """Workers that could not go on with a choice; the dispatcher's."""
        self.num_restarts: dict[int, int] = {}
        """The dispatcher's."""

    @property
    def request_id(self) -> RequestId:
        return self.journal.request.request_id

    @property
    def usage(self) -> Usage:
        return Usage(
            prompt_tokens=self.journal.request.num_prompt_tokens,
            completion_tokens=self.journal.num_completion_tokens,
            cached_tokens=self._cached_tokens or 0,
        )

    def commit(self, event: TokenEvent) -> bool:
        """Take a token if it is the next one of its choice's live attempt, and end the choice if it is its last."""
        if not self.journal.commit(event):
            return False
        if self._cached_tokens is None:
            self._cached_tokens = event.cached_tokens
        self.prompt_logprobs = self.prompt_logprobs or event.prompt_logprobs
        self._say(self._answers[event.choice].push(event))
        return True

    def abort(self) -> None:
        """End every choice that has not ended, with what is committed."""
        for choice in self.journal.live_choices():
            self._say(self._answers[choice].abort())

    def end(self, outcome: Outcome) -> None:
        self.outcome = outcome
        if self.deadline is not None:
            self.deadline.cancel()
        self._wake_readers()

    def _say(self, piece: Piece) -> None:
        self.transcripts[piece.choice].add(piece)
        if piece.finish_reason is not None:
            self.journal.end(piece.choice)
        self._wake_readers()

    def _wake_readers(self) -> None:
        for reader in self.readers:
            reader.changed.set()


class Reader:
    """One client's place in a request's transcripts."""

    def __init__(self, live: LiveRequest) -> None:
        self._live = live
        self._read = dict.fromkeys(live.transcripts, 0)
        self._ended: set[int] = set()
        self.changed = asyncio.Event()

    def unread(self) -> Iterator[Increment]:
        """What was said since the last call: one increment per choice, however much it is."""
        news = [choice for choice, transcript in self._live.transcripts.items() if self._has_news(choice, transcript)]
        for number, choice in enumerate(news):
            transcript, first = self._live.transcripts[choice], self._read[choice]
            piece = transcript.read(first)
            self._read[choice] = len(transcript)
            if piece.finish_reason is not None:
                self._ended.add(choice)
            opening = first == 0 and choice == min(self._live.transcripts)
            last = number == len(news) - 1 and self._ended == self._live.transcripts.keys()
            yield Increment(
                piece=piece,
                prompt_logprobs=self._live.prompt_logprobs if opening else (),
                usage=self._live.usage if last else None,
            )

    def _has_news(self, choice: int, transcript: Transcript) -> bool:
        return len(transcript) > self._read[choice] or (
            transcript.finish_reason is not None and choice not in self._ended
        )


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
