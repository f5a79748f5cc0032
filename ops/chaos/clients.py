"""Users who ask questions whose answers are known, one after the other, and write down all that they see."""

from __future__ import annotations

import asyncio
import dataclasses
import random
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from typing import Any

import grpc

from octet.client import AsyncClient, CallError, make_request
from octet.resumption import Resumption
from octet.v1 import octet_pb2 as pb
from ops.chaos.history import Delta, Question, Stream

_REFUSED_S = 0.2
"""Before somebody who was refused asks again."""
_LEAVERS = 0.25
"""What part of the streams is left by its user."""
_AWAY_S = (0.02, 0.5)
"""For so long, at least and at most."""


@dataclasses.dataclass(frozen=True, slots=True)
class Leave:
    """A user drops the connection after so many tokens, and is back as many seconds later."""

    after_tokens: int
    away_s: float


def draw_leave(draw: random.Random, question: Question) -> Leave | None:
    """None for those who stay to the end."""
    leaves = draw.random() < _LEAVERS
    leave = Leave(draw.randint(1, question.num_choices * question.max_new_tokens - 1), draw.uniform(*_AWAY_S))
    return leave if leaves else None


class _Noted(Resumption):
    """A request whose calls are written down."""

    def __init__(self, request: pb.GenerateRequest, timeout_s: float, stream: Stream) -> None:
        super().__init__(request, timeout_s, resume=True)
        self._stream = stream

    def next_request(self) -> pb.GenerateRequest:
        self._stream.calls_s.append(time.time())
        return super().next_request()

    def next_resume(self) -> pb.GenerationResumeRequest:
        """The rest of a request that the server knows."""
        self._stream.calls_s.append(time.time())
        offsets = [len(choice.ids) for choice in self._request.received]
        return pb.GenerationResumeRequest(request_id=self.request_id, offsets=offsets)

    def note_metadata(self, metadata: Any) -> None:
        super().note_metadata(metadata)
        self._stream.accepted = self._accepted


class RecordingClient(AsyncClient):
    """The client that everybody uses, with one stream at a time, which is written down."""

    _stream: Stream | None = None

    async def record(self, stream: Stream, leave: Leave | None = None) -> None:
        """Ask, and note all that comes; then ask for the whole answer, which the cluster has kept."""
        question, self._stream = stream.question, stream
        options = {**options_of(question), "request_id": stream.request_id}
        try:
            asked = self.stream(list(question.prompt), timeout_s=stream.timeout_s, **options)
            async for chunk in asked if leave is None else self._with_a_break(stream, leave, options):
                stream.deltas.append(_delta(chunk))
            stream.endings.append((time.time(), "OK"))
        except CallError as error:
            stream.endings.append((time.time(), error.code.name))
            return
        finally:
            self._stream = None
        until_s = time.monotonic() + stream.timeout_s
        while stream.final is None:
            try:
                answer = await self.generate(list(question.prompt), timeout_s=stream.timeout_s, **options)
            except CallError as error:
                if error.code is grpc.StatusCode.UNAVAILABLE and time.monotonic() < until_s:
                    # There may be no frontend for a while, and this is not accepted yet.
                    await asyncio.sleep(_REFUSED_S)
                    continue
                # The stream had ended well, so that this is an end too many.
                stream.endings.append((time.time(), f"{error.code.name} when asked again"))
                return
            stream.final = tuple(tuple(choice.token_ids) for choice in answer.choices)

    async def _with_a_break(
        self, stream: Stream, leave: Leave, options: dict[str, Any]
    ) -> AsyncIterator[pb.GenerateChunk]:
        """As `stream`, but that its user leaves, and then asks for the rest as a client without our library would."""
        asked = self._noted(stream, options)
        try:
            async for chunk in self._calls(stream, leave, asked):
                yield chunk
        finally:
            await self._leave(asked)

    async def _calls(self, stream: Stream, leave: Leave, asked: _Noted) -> AsyncIterator[pb.GenerateChunk]:
        num_tokens, by_offsets = 0, False
        while True:
            if by_offsets:
                call = self._generation.GenerationResume(asked.next_resume(), timeout=asked.time_left_s)
            else:
                call = self._generation.GenerateStream(asked.next_request(), timeout=asked.time_left_s)
            try:
                asked.note_metadata(await call.initial_metadata())
                async for chunk in call:
                    try:
                        news = asked.take(chunk)
                    except CallError:
                        # So that the record has the gap, too.
                        yield chunk
                        raise
                    if news:
                        yield chunk
                    num_tokens += len(chunk.token_ids)
                    if num_tokens >= leave.after_tokens and asked.runs_on and not stream.away_s:
                        break
                else:
                    asked.note_end()
                    return
            except grpc.RpcError as error:
                if asked.complete:
                    return
                if by_offsets and error.code() is grpc.StatusCode.NOT_FOUND:
                    # Another frontend has taken its place meanwhile; it goes on from the tokens themselves.
                    by_offsets = False
                    continue
                await self._wait(asked, error)
                continue
            finally:
                call.cancel()
            left_s, by_offsets = time.time(), True
            await asyncio.sleep(leave.away_s)
            stream.away_s.append((left_s, time.time()))

    def _ask(self, prompt: Any, timeout_s: float | None, options: dict[str, Any]) -> Resumption:
        if self._stream is None:
            return super()._ask(prompt, timeout_s, options)
        return self._noted(self._stream, options)

    def _noted(self, stream: Stream, options: dict[str, Any]) -> _Noted:
        asked = _Noted(make_request(list(stream.question.prompt), **options), stream.timeout_s, stream)
        # What is not there is not aborted when it is left.
        self._under_way.add(asked)
        return asked


def options_of(question: Question) -> dict[str, Any]:
    """Of the request."""
    return {
        "max_new_tokens": question.max_new_tokens,
        "ignore_eos": True,
        "temperature": question.temperature,
        # Greedy tokens do not depend on it; the client would draw another one for each request.
        "seed": question.seed or 0,
        "n": question.num_choices,
    }


def _delta(chunk: pb.GenerateChunk) -> Delta:
    usage = (chunk.usage.prompt_tokens, chunk.usage.completion_tokens) if chunk.HasField("usage") else None
    reason = pb.FinishReason.Name(chunk.finish_reason) if chunk.finish_reason else ""
    return Delta(
        at_s=time.time(),
        choice=chunk.index,
        offset=chunk.offset,
        token_ids=tuple(chunk.token_ids),
        finish_reason=reason,
        usage=usage,
    )


class Users:
    """So many, each with a connection of its own, as long as the context is open; who has asked is answered first."""

    def __init__(self, address: str, questions: Sequence[Question], count: int, timeout_s: float, seed: int) -> None:
        """
        Args:
            seed: of who asks what, and who leaves when.
        """
        self._address, self._questions, self._timeout_s = address, questions, timeout_s
        self._draws = [random.Random(f"{seed}/{number}") for number in range(count)]
        self._leaves = [random.Random(f"{seed}/{number}/leaves") for number in range(count)]
        self._stopping = False
        self._tasks: list[asyncio.Task[None]] = []
        self.streams: list[Stream] = []

    async def __aenter__(self) -> Users:
        self._tasks = [asyncio.create_task(self._use(*draws)) for draws in zip(self._draws, self._leaves, strict=True)]
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        self._stopping = True
        await asyncio.gather(*self._tasks)

    async def _use(self, draw: random.Random, leaves: random.Random) -> None:
        client = RecordingClient(self._address)
        async with client:
            while not self._stopping:
                stream = Stream(
                    request_id=uuid.uuid4().hex[:16],
                    question=draw.choice(list(self._questions)),
                    sent_s=time.time(),
                    timeout_s=self._timeout_s,
                )
                self.streams.append(stream)
                await client.record(stream, draw_leave(leaves, stream.question))
                if stream.endings[-1][1] != "OK":
                    await asyncio.sleep(_REFUSED_S)
