"""Clients against servers that are played: connections that are lost, streams that are left, clients that close."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import threading
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc
import pytest

from octet.client import AsyncClient, CallError, Client, make_request
from octet.errors import RequestError
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


class Endless(rpc.GenerationServicer):
    """Answers go on until they are left; with `tells` off, nobody hears that a request is accepted."""

    def __init__(self) -> None:
        self.tells = True
        self.accepted: asyncio.Queue[str] = asyncio.Queue()
        self.aborted: asyncio.Queue[str] = asyncio.Queue()

    async def GenerateStream(self, request: pb.GenerateRequest, context: Any) -> None:
        await self._accept(request, context)
        for index in range(10_000):
            await context.write(pb.GenerateChunk(index=0, offset=index, token_ids=[index]))
            await asyncio.sleep(0.01)

    async def Generate(self, request: pb.GenerateRequest, context: Any) -> pb.GenerateResponse:
        await self._accept(request, context)
        await asyncio.sleep(100)
        return pb.GenerateResponse()

    async def Abort(self, request: pb.AbortRequest, context: Any) -> pb.AbortResponse:
        self.aborted.put_nowait(request.request_id)
        return pb.AbortResponse()

    async def _accept(self, request: pb.GenerateRequest, context: Any) -> None:
        self.accepted.put_nowait(request.request_id)
        if self.tells:
            await context.send_initial_metadata(((REQUEST_ID, request.request_id),))


@contextlib.asynccontextmanager
async def served(servicer: rpc.GenerationServicer) -> AsyncIterator[str]:
    server = grpc.aio.server()
    rpc.add_GenerationServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        await server.stop(None)


async def soon(queue: asyncio.Queue[str]) -> str:
    return await asyncio.wait_for(queue.get(), 20)


async def test_a_stream_that_is_left_with_its_client_is_aborted() -> None:
    """The iteration is closed when nobody refers to it any more, and by then the channel is, too."""
    endless = Endless()
    async with served(endless) as address:
        async with AsyncClient(address, timeout_s=20) as client:
            async for _ in client.stream("hi"):
                break
        assert await soon(endless.aborted) == await soon(endless.accepted)
        gc.collect()
        await asyncio.sleep(0.05)

        def leave() -> Any:
            with Client(address, timeout_s=20) as client:
                stream = client.stream("hi")
                next(stream)
                return stream

        stream = await asyncio.to_thread(leave)
        assert await soon(endless.aborted) == await soon(endless.accepted)
        await asyncio.to_thread(stream.close)
        assert endless.aborted.empty(), "once"


@pytest.mark.parametrize("whole", [False, True])
async def test_whoever_reads_while_another_task_closes_the_client_hears_so(whole: bool) -> None:
    endless = Endless()
    async with served(endless) as address:
        client = AsyncClient(address, timeout_s=20)

        async def read() -> None:
            if whole:
                await client.generate("hi")
            async for _ in client.stream("hi"):
                pass

        reading = asyncio.create_task(read())
        request_id = await soon(endless.accepted)
        await asyncio.sleep(0.05)
        await client.close()
        with pytest.raises(CallError, match="CANCELLED"):
            await asyncio.wait_for(reading, 20)
        assert await soon(endless.aborted) == request_id
        with pytest.raises(CallError, match="this client was closed"):
            await client.generate("hi")
        with pytest.raises(CallError, match="this client was closed"):
            await client.tokenize("hi")
        await client.close()


@pytest.mark.parametrize("whole", [False, True])
async def test_whoever_reads_while_another_thread_closes_the_client_hears_so(whole: bool) -> None:
    endless = Endless()
    async with served(endless) as address:
        client, heard = Client(address, timeout_s=20), list[CallError]()

        def read() -> None:
            try:
                if whole:
                    client.generate("hi")
                list(client.stream("hi"))
            except CallError as error:
                heard.append(error)

        reading = threading.Thread(target=read)
        reading.start()
        request_id = await soon(endless.accepted)
        await asyncio.sleep(0.05)
        await asyncio.to_thread(client.close)
        await asyncio.to_thread(reading.join, 20)
        assert [error.code for error in heard] == [grpc.StatusCode.CANCELLED]
        assert await soon(endless.aborted) == request_id
        with pytest.raises(CallError, match="this client was closed"):
            await asyncio.to_thread(client.tokenize, "hi")
        await asyncio.to_thread(client.close)


async def test_a_call_that_is_interrupted_before_its_acceptance_is_heard_of_is_aborted() -> None:
    endless = Endless()
    endless.tells = False
    async with served(endless) as address, AsyncClient(address, timeout_s=20) as client:
        asking = asyncio.create_task(client.generate("hi"))
        request_id = await soon(endless.accepted)
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking
        assert await soon(endless.aborted) == request_id


@pytest.mark.parametrize(
    ("prompt", "options", "field"),
    [
        ([-1], {}, "prompt"),
        ([2**40], {}, "prompt"),
        ([1.5], {}, "prompt"),
        ([["user", "hi"]], {}, "prompt"),
        ("\udcff", {}, "prompt"),
        ([("user", 7)], {}, "prompt"),
        ("hi", {"priority": 2**40}, "priority"),
        ("hi", {"temperature": "warm"}, "sampling"),
    ],
)
def test_what_the_protocol_cannot_carry_is_named(prompt: Any, options: dict[str, Any], field: str) -> None:
    with pytest.raises(RequestError, match=field):
        make_request(prompt, **options)


def test_a_conversation_is_pairs_or_mappings() -> None:
    pairs = make_request([("system", "be brief"), ("user", "hi")])
    mappings = make_request([{"role": "system", "content": "be brief"}, {"content": "hi", "role": "user"}])
    assert pairs == mappings
    assert [message.role for message in mappings.chat.messages] == ["system", "user"]


def test_a_wrong_option_is_told_the_nearest() -> None:
    with pytest.raises(RequestError, match="did you mean 'max_new_tokens'"):
        make_request("hi", max_tokens=3)


@pytest.mark.parametrize("timeout_s", [0, -1.0, float("inf"), float("nan")])
async def test_a_timeout_that_is_none_is_refused_and_no_call_is_made(timeout_s: float) -> None:
    with pytest.raises(RequestError, match="'timeout_s'"):
        Client("127.0.0.1:1", timeout_s)
    with Client("127.0.0.1:1") as client:
        for call in (client.generate, client.tokenize):
            with pytest.raises(RequestError, match="'timeout_s'"):
                call("hi", timeout_s=timeout_s)
    async with AsyncClient("127.0.0.1:1") as asking:
        with pytest.raises(RequestError, match="'timeout_s'"):
            await asking.generate("hi", timeout_s=timeout_s)


def test_sizes_that_are_no_numbers_of_members_are_refused() -> None:
    with Client("127.0.0.1:1") as client, pytest.raises(RequestError, match="sizes"):
        client.scale(experts=2**40)


async def test_whoever_is_cancelled_while_the_client_is_closed_is_cancelled() -> None:
    """A task group or a timeout that has cancelled it waits for just that."""
    endless = Endless()
    async with served(endless) as address:
        client = AsyncClient(address, timeout_s=20)
        reading = asyncio.create_task(client.generate("hi"))
        await soon(endless.accepted)
        closing = asyncio.create_task(client.close())
        reading.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asyncio.wait_for(asyncio.shield(reading), 20)
        assert reading.cancelled()
        await closing
