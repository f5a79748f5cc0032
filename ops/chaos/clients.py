"""Users who ask questions whose answers are known, one after the other, and write down all that they see."""

from __future__ import annotations

import asyncio
import random
import time
import uuid
from collections.abc import Sequence
from typing import Any

import grpc

from octet.client import AsyncClient, CallError, make_request
from octet.resumption import Resumption
from octet.v1 import octet_pb2 as pb
from ops.chaos.history import Delta, Question, Stream

_REFUSED_S = 0.2
"""Before somebody who was refused asks again."""


class _Noted(Resumption):
    """A request whose calls are written down."""

    def __init__(self, request: pb.GenerateRequest, timeout_s: float, stream: Stream) -> None:
        super().__init__(request, timeout_s, resume=True)
        self._stream = stream

    def next_request(self) -> pb.GenerateRequest:
        self._stream.calls_s.append(time.time())
        return super().next_request()

    def note_metadata(self, metadata: Any) -> None:
        super().note_metadata(metadata)
        self._stream.accepted = self._accepted


class RecordingClient(AsyncClient):
    """The client that everybody uses, with one stream at a time, which is written down."""

    _stream: Stream | None = None

    async def record(self, stream: Stream) -> None:
        """Ask, and note all that comes; then ask for the whole answer, which the cluster has kept."""
        question, self._stream = stream.question, stream
        options = {**options_of(question), "request_id": stream.request_id}
        try:
            async for chunk in self.stream(list(question.prompt), timeout_s=stream.timeout_s, **options):
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

    def _ask(self, prompt: Any, timeout_s: float | None, options: dict[str, Any]) -> Resumption:
        if self._stream is None:
            return super()._ask(prompt, timeout_s, options)
        return _Noted(make_request(prompt, **options), self._stream.timeout_s, self._stream)


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
            seed: of who asks what.
        """
        self._address, self._questions, self._timeout_s = address, questions, timeout_s
        self._draws = [random.Random(f"{seed}/{number}") for number in range(count)]
        self._stopping = False
        self._tasks: list[asyncio.Task[None]] = []
        self.streams: list[Stream] = []

    async def __aenter__(self) -> Users:
        self._tasks = [asyncio.create_task(self._use(draw)) for draw in self._draws]
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        self._stopping = True
        await asyncio.gather(*self._tasks)

    async def _use(self, draw: random.Random) -> None:
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
                await client.record(stream)
                if stream.endings[-1][1] != "OK":
                    await asyncio.sleep(_REFUSED_S)
