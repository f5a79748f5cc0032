"""Users who leave a stream and come back: what they write down, and what of it the checker catches."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest

from octet.metadata import REQUEST_ID
from octet.v1 import octet_pb2 as pb
from octet.v1 import octet_pb2_grpc as rpc
from ops.chaos.checker import check
from ops.chaos.clients import Leave, RecordingClient, draw_leave
from ops.chaos.figures import Resumed, resumed
from ops.chaos.history import Stream
from tests.unit.ops.chaos.histories import EXPECTED, history, question

LEAVE = Leave(after_tokens=2, away_s=0.05)


class Told(rpc.GenerationServicer):
    """A frontend that tells one answer, token by token."""

    def __init__(self, off_by: int = 0, forgets: bool = False) -> None:
        """
        Args:
            off_by: from which token on it goes on for who resumes, beside the one that is asked for.
            forgets: it knows no request that was asked for by another call.
        """
        self.off_by, self.forgets, self.calls = off_by, forgets, list[str]()

    async def GenerateStream(self, request: pb.GenerateRequest, context: Any) -> AsyncIterator[pb.GenerateChunk]:
        self.calls.append("ask")
        async for chunk in self._tell(len(request.received[0].ids) if request.received else 0, context):
            yield chunk

    async def GenerationResume(
        self, request: pb.GenerationResumeRequest, context: Any
    ) -> AsyncIterator[pb.GenerateChunk]:
        self.calls.append(f"resume at {request.offsets[0]}")
        if self.forgets:
            await context.abort(grpc.StatusCode.NOT_FOUND, "it is not known")
        async for chunk in self._tell(request.offsets[0] + self.off_by, context):
            yield chunk

    async def Generate(self, request: pb.GenerateRequest, context: Any) -> pb.GenerateResponse:
        await context.send_initial_metadata(((REQUEST_ID, request.request_id),))
        return pb.GenerateResponse(choices=[pb.Choice(token_ids=EXPECTED)])

    async def Abort(self, request: pb.AbortRequest, context: Any) -> pb.AbortResponse:
        self.calls.append("abort")
        return pb.AbortResponse()

    async def _tell(self, offset: int, context: Any) -> AsyncIterator[pb.GenerateChunk]:
        await context.send_initial_metadata(((REQUEST_ID, "r0"),))
        for at in range(offset, len(EXPECTED)):
            yield pb.GenerateChunk(index=0, offset=at, token_ids=[EXPECTED[at]])
        usage = pb.Usage(prompt_tokens=3, completion_tokens=len(EXPECTED))
        yield pb.GenerateChunk(index=0, offset=len(EXPECTED), finish_reason=pb.LENGTH, usage=usage)


async def recorded(told: Told, leave: Leave | None = LEAVE) -> Stream:
    server = grpc.aio.server()
    rpc.add_GenerationServicer_to_server(told, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    stream = Stream(request_id="r0", question=question(), sent_s=0.0, timeout_s=20.0)
    try:
        client = RecordingClient(f"127.0.0.1:{port}")
        async with client:
            await client.record(stream, leave)
    finally:
        await server.stop(None)
    stream.sent_s = stream.calls_s[0]
    return stream


async def test_a_user_who_left_asks_for_the_rest_by_its_offset() -> None:
    told = Told()
    stream = await recorded(told)
    assert told.calls == ["ask", "resume at 2"]
    assert check(history(stream)) == []
    ((left_s, back_s),) = stream.away_s
    assert back_s - left_s >= LEAVE.away_s
    assert resumed([stream, await recorded(Told(), leave=None)]) == Resumed(streams=1, left=1)


async def test_a_frontend_that_knows_nothing_of_it_is_told_what_has_come() -> None:
    told = Told(forgets=True)
    stream = await recorded(told)
    assert told.calls == ["ask", "resume at 2", "ask"]
    assert check(history(stream)) == []


@pytest.mark.parametrize("off_by", [1, -1], ids=["gap", "repeat"])
async def test_a_gap_or_a_repeat_after_coming_back_is_caught(off_by: int) -> None:
    told = Told(off_by=off_by)
    found = {violation.kind for violation in check(history(await recorded(told)))}
    assert {"gap in a stream", "not finished"} <= found
    assert told.calls[-1] == "abort"


def test_the_same_seed_lets_the_same_users_leave() -> None:
    def drawn(seed: str) -> list[Leave | None]:
        draw = random.Random(seed)
        return [draw_leave(draw, question(max_new_tokens=48)) for _ in range(400)]

    assert drawn("0/1") == drawn("0/1") != drawn("0/2")
    leaves = [leave for leave in drawn("0/1") if leave is not None]
    assert 60 < len(leaves) < 140
    assert {leave.after_tokens for leave in leaves} <= set(range(1, 48))
