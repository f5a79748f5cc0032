"""What a client makes of a connection that is lost behind the end of an answer: nothing."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import grpc
import pytest

from octet.client import AsyncClient, Client
from octet.metadata import REQUEST_ID
from octet.v1 import octet_pb2 as pb
from octet.v1 import octet_pb2_grpc as rpc


class Falling(rpc.GenerationServicer):
    """Tells a whole answer and is gone before it says that the call is over."""

    def __init__(self) -> None:
        self.num_calls = 0

    async def GenerateStream(self, request: pb.GenerateRequest, context: Any) -> None:
        self.num_calls += 1
        await context.send_initial_metadata(((REQUEST_ID, request.request_id),))
        await context.write(pb.GenerateChunk(index=0, offset=0, token_ids=[7, 8]))
        usage = pb.Usage(prompt_tokens=1, completion_tokens=3)
        await context.write(pb.GenerateChunk(index=0, offset=2, token_ids=[9], finish_reason=pb.LENGTH, usage=usage))
        await context.abort(grpc.StatusCode.UNAVAILABLE, "the connection is lost")


def ask(address: str) -> list[pb.GenerateChunk]:
    with Client(address, timeout_s=20) as client:
        return list(client.stream([1], max_new_tokens=3))


def ask_async(address: str) -> list[pb.GenerateChunk]:
    async def gather() -> list[pb.GenerateChunk]:
        async with AsyncClient(address, timeout_s=20) as client:
            return [chunk async for chunk in client.stream([1], max_new_tokens=3)]

    return asyncio.run(gather())


@pytest.mark.parametrize("answer", [ask, ask_async])
async def test_a_whole_answer_is_not_asked_for_again(answer: Callable[[str], list[pb.GenerateChunk]]) -> None:
    server, falling = grpc.aio.server(), Falling()
    rpc.add_GenerationServicer_to_server(falling, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        chunks = await asyncio.to_thread(answer, f"127.0.0.1:{port}")
    finally:
        await server.stop(None)
    assert [list(chunk.token_ids) for chunk in chunks] == [[7, 8], [9]]
    assert [chunk.HasField("usage") for chunk in chunks] == [False, True]
    assert falling.num_calls == 1
