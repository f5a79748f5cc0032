"""What a request has answered so far, and the clients that read it, each at its own pace."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import dataclasses
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from typing import Literal

from cluster.frontend.answer import Piece
from cluster.frontend.transcript import Transcript, logprob_bytes
from octet.errors import OctetError, RequestError, SlowReaderError
from octet.ids import RequestId
from octet.messages import TokenLogprob


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


class Record:
    """Belongs to the frontend's event loop. It may outlive the request, for clients that come late."""

    def __init__(
        self,
        request_id: RequestId,
        digest: bytes,
        choices: Sequence[int],
        num_prompt_tokens: int,
        stream_interval: int = 1,
    ) -> None:
        """
        Args:
            digest: of the request's body: whoever asks the same with the same id is answered from here.
            stream_interval: tokens of a choice that its readers are told together, after the first.
        """
        self.request_id, self.digest, self.stream_interval = request_id, digest, stream_interval
        self.transcripts = {choice: Transcript(choice) for choice in choices}
        self.outcome: Outcome | None = None
        self.prompt_logprobs: tuple[TokenLogprob, ...] = ()
        self.cached_tokens = 0
        self.readers: set[Reader] = set()
        self._num_prompt_tokens = num_prompt_tokens

    @property
    def usage(self) -> Usage:
        return Usage(
            prompt_tokens=self._num_prompt_tokens,
            completion_tokens=sum(transcript.num_tokens for transcript in self.transcripts.values()),
            cached_tokens=self.cached_tokens,
        )

    @property
    def num_bytes(self) -> int:
        """Roughly what it occupies."""
        answers = sum(transcript.num_bytes for transcript in self.transcripts.values())
        return answers + logprob_bytes(self.prompt_logprobs)

    def say(self, piece: Piece) -> None:
        """The next piece of a choice."""
        self.transcripts[piece.choice].add(piece)
        for reader in self.readers:
            reader.hear()

    def end(self, outcome: Outcome) -> None:
        self.outcome = outcome
        for reader in self.readers:
            reader.hear()

    def check_received(self, received: Sequence[Sequence[int]]) -> None:
        """Whether this is what a client has read. Raises: RequestError."""
        for choice, (transcript, token_ids) in enumerate(zip(self.transcripts.values(), received, strict=False)):
            if transcript.token_ids(len(token_ids)) != list(token_ids):
                raise RequestError(
                    f"received[{choice}]", f"{len(token_ids)} tokens", "the first tokens of this request's answer"
                )


class Reader:
    """One client's place in a record."""

    def __init__(self, record: Record, offsets: Sequence[int], max_unread_tokens: int, *, whole: bool = False) -> None:
        """
        Args:
            offsets: by choice, tokens that are not to be read again; absent ones are 0.
            max_unread_tokens: the reader is cut off when more wait for it that were said since it came; not one that
                waits for the whole.
            whole: whether it is told nothing before the request has ended, and everything then.

        Raises: RequestError.
        """
        if len(offsets) > len(record.transcripts):
            raise RequestError("offsets", f"{len(offsets)} choices", f"at most {len(record.transcripts)}")
        self._record, self._max_unread_tokens, self._whole = record, max_unread_tokens, whole
        self._read = dict.fromkeys(record.transcripts, 0)
        for choice, offset in zip(record.transcripts, offsets, strict=False):
            most = record.transcripts[choice].num_tokens
            if offset > most:
                raise RequestError(f"offsets[{choice}]", offset, f"at most the {most} tokens that there are")
            self._read[choice] = offset
        self._old = {choice: transcript.num_tokens for choice, transcript in record.transcripts.items()}
        """Said before it came: who was away for long is no slow reader."""
        self._ended: set[int] = set()
        self._changed = asyncio.Event()
        self._too_slow: SlowReaderError | None = None
        self._interrupt: Callable[[], object] = lambda: None

    @property
    def request_id(self) -> RequestId:
        return self._record.request_id

    @contextlib.contextmanager
    def interruptible(self) -> Iterator[None]:
        """Around handing increments on in this task: where that is stuck, it is cut short by `cut`.

        Raises: SlowReaderError.
        """
        task = asyncio.current_task()
        assert task is not None
        self._interrupt = task.cancel
        try:
            yield
        except asyncio.CancelledError:
            if self._too_slow is None or task.uncancel() > 0:
                raise
            raise self._too_slow from None
        finally:
            self._interrupt = lambda: None

    async def increments(self) -> AsyncIterator[Increment]:
        """Everything from the reader's place on, up to the request's end.

        Raises: the error of the request's outcome; SlowReaderError.
        """
        while True:
            self._changed.clear()
            for increment in self._unread():
                yield increment
            if self._too_slow is not None:
                raise self._too_slow
            if self._record.outcome is not None and not self._changed.is_set():
                break
            await self._changed.wait()
        if self._record.outcome.error is not None:
            # One of its own for each reader: an error keeps the frames that it passed through, and this one is kept.
            raise copy.copy(self._record.outcome.error)

    def hear(self) -> None:
        """Something was said, or the request has ended."""
        transcripts = self._record.transcripts
        if self._record.outcome is not None or any(self._is_due(*one) for one in transcripts.items()):
            self._changed.set()
        unread = sum(one.num_tokens - max(self._read[choice], self._old[choice]) for choice, one in transcripts.items())
        if unread > self._max_unread_tokens and not self._whole:
            most = self._max_unread_tokens
            self.cut(
                SlowReaderError(f"{unread} tokens wait to be read, the limit (frontend.max_unread_tokens) is {most}")
            )

    def cut(self, error: SlowReaderError) -> None:
        """Let this be how the reading ends; the first one counts."""
        if self._too_slow is None:
            self._too_slow = error
            self._interrupt()

    def _unread(self) -> Iterator[Increment]:
        """What is due of what was said since the last call: one increment per choice, however much it is."""
        record = self._record
        news = [choice for choice, transcript in record.transcripts.items() if self._is_due(choice, transcript)]
        for number, choice in enumerate(news):
            transcript, first = record.transcripts[choice], self._read[choice]
            piece = transcript.read(first)
            self._read[choice] = len(transcript)
            if piece.finish_reason is not None:
                self._ended.add(choice)
            opening = first == 0 and choice == min(record.transcripts)
            last = number == len(news) - 1 and self._ended == record.transcripts.keys()
            yield Increment(
                piece=piece,
                prompt_logprobs=record.prompt_logprobs if opening else (),
                usage=record.usage if last else None,
            )

    def _is_due(self, choice: int, transcript: Transcript) -> bool:
        """A choice's end is told in every stream of it, also where no token is left to tell."""
        read, record = self._read[choice], self._record
        ended = transcript.finish_reason is not None and choice not in self._ended
        if record.outcome is not None:
            return ended or len(transcript) > read
        if self._whole:
            return False
        return ended or len(transcript) - read >= (record.stream_interval if read else 1)
