"""The gRPC service over a real connection, with workers played by the tests."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import gc
import time
import weakref
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from cluster.api.chunks import to_chunk
from cluster.api.cluster_service import ClusterService
from cluster.api.generation_service import GenerationService, _Patience
from cluster.api.grpc_service import GrpcServer
from cluster.api.pace import Pace
from cluster.frontend.answer import Piece
from cluster.frontend.record import Increment, Usage
from cluster.planning import make_plan
from octet.client import AsyncClient, CallError, Client
from octet.config import load_config
from octet.ids import RequestId
from octet.messages import PrefillRequest, TokenEvent, TokenLogprob
from octet.v1 import octet_pb2 as pb
from octet.v1 import octet_pb2_grpc as rpc
from tests.unit.cluster.operations import NoOperations
from tests.unit.cluster.played import PATIENT_S, PROMPT, Cluster, abort, failed, playing, soon, token
from tests.unit.cluster.pools import VirtualLoop
from tests.unit.cluster.proxy import Proxy, proxy

SETTINGS = "{port: 0, max_requests: 2, resume_grace_s: 20, max_stall_s: 0.3, max_unread_tokens: 100}"
PLAN = make_plan(load_config(None, [f"frontend={SETTINGS}"]))


@contextlib.asynccontextmanager
async def serving(cluster: Cluster) -> AsyncIterator[Proxy]:
    config = PLAN.config.frontend
    generation = GenerationService(cluster.frontend, "model", 0, config.max_stall_s)
    server = GrpcServer(config, generation, ClusterService(NoOperations()))
    async with proxy(await server.start()) as between:
        yield between
        await server.stop(grace_s=0)


@pytest.fixture
async def cluster() -> AsyncIterator[Cluster]:
    async with playing(PLAN) as cluster:
        yield cluster


@pytest.fixture
async def connection(cluster: Cluster) -> AsyncIterator[Proxy]:
    async with serving(cluster) as between:
        yield between


@pytest.fixture
async def client(connection: Proxy) -> AsyncIterator[AsyncClient]:
    async with AsyncClient(f"127.0.0.1:{connection.port}", timeout_s=PATIENT_S) as client:
        yield client


@pytest.fixture
async def stub(connection: Proxy) -> AsyncIterator[Any]:
    async with grpc.aio.insecure_channel(f"127.0.0.1:{connection.port}") as channel:
        yield rpc.GenerationStub(channel)


def asked(**fields: Any) -> pb.GenerateRequest:
    return pb.GenerateRequest(token_ids=pb.TokenIds(ids=PROMPT), stopping=pb.Stopping(max_new_tokens=500), **fields)


def tell(cluster: Cluster, request: PrefillRequest, first: int, last: int, *, end: bool = False) -> None:
    """Tokens 100 + index."""
    for index in range(first, last):
        cluster.decode.tell(token(request, index, 100 + index, "length" if end and index == last - 1 else None))


# What a call says.


async def test_a_call_tells_at_once_that_its_request_is_accepted(cluster: Cluster, stub: Any) -> None:
    call = stub.GenerateStream(asked(request_id="r"))
    metadata = dict(await soon(call.initial_metadata()))
    assert metadata["octet-request-id"] == "r"
    call.cancel()


async def test_a_stream_is_resumed_by_its_offsets(cluster: Cluster, stub: Any) -> None:
    call = stub.GenerateStream(asked(request_id="r", resumable=True))
    request = await cluster.prefill.next_request()
    tell(cluster, request, 0, 2)
    await soon(anext(call.__aiter__()))
    call.cancel()
    resumed = stub.GenerationResume(pb.GenerationResumeRequest(request_id="r", offsets=[1]))
    tell(cluster, request, 2, 4, end=True)
    chunks = [chunk async for chunk in resumed]
    assert [token_id for chunk in chunks for token_id in chunk.token_ids] == [101, 102, 103]
    assert (chunks[0].offset, chunks[-1].finish_reason) == (1, pb.LENGTH)


async def test_resuming_an_unknown_request_is_not_found(stub: Any) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        await anext(stub.GenerationResume(pb.GenerationResumeRequest(request_id="r")).__aiter__())
    assert caught.value.code() == grpc.StatusCode.NOT_FOUND


async def test_a_client_that_takes_nothing_is_cut_off(cluster: Cluster, stub: Any) -> None:
    """The connection's own buffers take some megabytes first."""
    call = stub.GenerateStream(asked(request_id="r", output=pb.Output(logprobs=0)))
    request = await cluster.prefill.next_request()
    index = 0
    async with asyncio.timeout(PATIENT_S):
        while cluster.frontend.num_live:
            cluster.decode.tell(wide_token(request, index))
            index += 1
            await asyncio.sleep(0.005)
    assert await cluster.decode.next() == abort(request)
    with pytest.raises(grpc.RpcError) as caught:
        async for _ in call:
            pass
    assert caught.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED


async def test_a_stream_that_waits_for_tokens_is_not_cut_off(cluster: Cluster, stub: Any) -> None:
    """For longer than a client may take nothing, and again behind the first time that this was looked at."""
    call = stub.GenerateStream(asked(request_id="r"))
    request = await cluster.prefill.next_request()
    chunks = call.__aiter__()
    for index in range(3):
        tell(cluster, request, index, index + 1, end=index == 2)
        assert list((await soon(anext(chunks))).token_ids) == [100 + index]
        await asyncio.sleep(1.2 * PLAN.config.frontend.max_stall_s)
    assert [chunk async for chunk in chunks] == []


async def test_a_stream_is_told_by_the_interval_that_it_asks_for(cluster: Cluster, client: AsyncClient) -> None:
    chunks = asyncio.create_task(collect(client.stream(PROMPT, max_new_tokens=500, stream_interval=30)))
    request = await cluster.prefill.next_request()
    tell(cluster, request, 0, 100, end=True)
    sizes = [len(chunk.token_ids) for chunk in await soon(chunks)]
    assert sum(sizes) == 100
    # More may have come before a chunk is made.
    assert all(size >= 30 for size in sizes[1:-1])
    assert len(sizes) <= 1 + 3 + 1


async def test_what_comes_while_a_stream_rests_is_told_in_one_chunk(
    cluster: Cluster, client: AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    rest_s, num_tokens = 0.2, 60
    monkeypatch.setattr(Pace, "note", lambda pace, *_: setattr(pace, "rest_s", rest_s))
    chunks = asyncio.create_task(collect(client.stream(PROMPT, max_new_tokens=500)))
    request = await cluster.prefill.next_request()
    begun_s = time.monotonic()
    for index in range(num_tokens):
        tell(cluster, request, index, index + 1, end=index == num_tokens - 1)
        for _ in range(10_000):
            if cluster.frontend.totals.tokens > index:
                break
            await asyncio.sleep(0.001)
    told = [list(chunk.token_ids) for chunk in await soon(chunks)]
    assert [token_id for token_ids in told for token_id in token_ids] == [100 + index for index in range(num_tokens)]
    assert len(told) <= 2 + (time.monotonic() - begun_s) / rest_s


async def test_a_whole_answer_may_be_longer_than_what_may_wait_for_a_stream(
    cluster: Cluster, client: AsyncClient
) -> None:
    answer = asyncio.create_task(client.generate(PROMPT, max_new_tokens=500))
    request = await cluster.prefill.next_request()
    tell(cluster, request, 0, 3 * PLAN.config.frontend.max_unread_tokens, end=True)
    (choice,) = (await soon(answer)).choices
    assert list(choice.token_ids) == [100 + index for index in range(300)]
    assert choice.finish_reason == pb.LENGTH


def wide_token(request: PrefillRequest, index: int) -> TokenEvent:
    top = tuple((number, -1.0) for number in range(10_000))
    logprob = TokenLogprob(token_id=100, logprob=-1.0, top=top)
    return dataclasses.replace(token(request, index, 100), logprob=logprob)


async def test_a_refusal_tells_when_to_try_again(cluster: Cluster, client: AsyncClient, stub: Any) -> None:
    calls = [stub.GenerateStream(asked()) for _ in range(2)]
    for call in calls:
        await soon(call.initial_metadata())
    with pytest.raises(grpc.RpcError) as caught:
        await stub.Generate(asked())
    error: Any = caught.value
    retry = error_details_pb2.RetryInfo()
    assert rpc_status.from_call(error).details[0].Unpack(retry)
    assert dict(error.trailing_metadata())["grpc-retry-pushback-ms"] == str(retry.retry_delay.ToMilliseconds())
    with pytest.raises(CallError, match=r"RESOURCE_EXHAUSTED: 2 requests are live.*try again in 1\.0 s") as refused:
        await client.generate(PROMPT)
    assert refused.value.retry_after_s == 1.0
    assert cluster.frontend.totals.refused == 2
    for call in calls:
        call.cancel()


async def test_a_prompt_is_not_read_before_it_is_refused(cluster: Cluster, stub: Any) -> None:
    """It is wrong, and only once there is room does anybody say so."""
    calls = [stub.GenerateStream(asked()) for _ in range(2)]
    for call in calls:
        await soon(call.initial_metadata())
    with pytest.raises(grpc.RpcError, match="RESOURCE_EXHAUSTED"):
        await stub.Generate(pb.GenerateRequest(text=""))
    for call in calls:
        call.cancel()
    for _ in calls:
        assert await cluster.prefill.next_request()
    for _ in calls:
        await cluster.prefill.next()
    with pytest.raises(grpc.RpcError, match="INVALID_ARGUMENT"):
        await stub.Generate(pb.GenerateRequest(text=""))


async def test_a_long_prompt_is_tokenized_beside_the_streams(cluster: Cluster, stub: Any) -> None:
    with pytest.raises(grpc.RpcError, match=r"INVALID_ARGUMENT(.|\n)*fewer than the context"):
        await stub.Generate(pb.GenerateRequest(text="x " * 10**5))


# Clients that go on by themselves.


async def test_a_stream_goes_on_over_a_lost_connection(
    cluster: Cluster, connection: Proxy, client: AsyncClient
) -> None:
    stream = client.stream(PROMPT, max_new_tokens=500)
    reading = asyncio.create_task(collect(stream))
    request = await cluster.prefill.next_request()
    for round_ in range(5):
        tell(cluster, request, 10 * round_, 10 * round_ + 10, end=round_ == 4)
        await asyncio.sleep(0.05)
        if round_ < 4:
            connection.cut()
    chunks = await soon(reading)
    assert [token_id for chunk in chunks for token_id in chunk.token_ids] == list(range(100, 150))
    assert cluster.outcomes() == (1, 0, 0)


async def test_a_whole_answer_survives_a_lost_connection(
    cluster: Cluster, connection: Proxy, client: AsyncClient
) -> None:
    answer = asyncio.create_task(client.generate(PROMPT, max_new_tokens=500))
    request = await cluster.prefill.next_request()
    await asyncio.sleep(0.05)
    connection.cut()
    tell(cluster, request, 0, 10, end=True)
    assert list((await soon(answer)).choices[0].token_ids) == list(range(100, 110))


@pytest.mark.parametrize("whole", [True, False])
async def test_a_blocking_client_goes_on_as_well(cluster: Cluster, connection: Proxy, whole: bool) -> None:
    def ask() -> list[int]:
        with Client(f"127.0.0.1:{connection.port}", timeout_s=PATIENT_S) as client:
            if whole:
                return list(client.generate(PROMPT, max_new_tokens=500).choices[0].token_ids)
            return [token_id for chunk in client.stream(PROMPT, max_new_tokens=500) for token_id in chunk.token_ids]

    answer = asyncio.create_task(asyncio.to_thread(ask))
    request = await cluster.prefill.next_request()
    tell(cluster, request, 0, 10)
    await asyncio.sleep(0.05)
    connection.cut()
    tell(cluster, request, 10, 20, end=True)
    assert await soon(answer) == list(range(100, 120))


async def test_a_client_goes_on_at_a_server_that_knows_nothing_of_it() -> None:
    """The frontend is lost with its journal: the client's own tokens are what the next one goes on from."""
    async with playing(PLAN) as second, playing(PLAN) as first, serving(first) as between:
        client = AsyncClient(f"127.0.0.1:{between.port}", timeout_s=PATIENT_S)
        reading = asyncio.create_task(collect(client.stream(PROMPT, max_new_tokens=500)))
        tell(first, await first.prefill.next_request(), 0, 3)
        await asyncio.sleep(0.1)
        async with serving(second) as there:
            between.to_port = there.to_port
            between.cut()
            request = await second.prefill.next_request()
            assert request.num_tokens == len(PROMPT) + 3
            tell(second, request, 3, 6, end=True)
            chunks = await soon(reading)
            await client.close()
    assert [token_id for chunk in chunks for token_id in chunk.token_ids] == list(range(100, 106))


async def test_a_request_that_failed_for_good_is_not_asked_for_again(cluster: Cluster, client: AsyncClient) -> None:
    reading = asyncio.create_task(collect(client.stream(PROMPT, max_new_tokens=500)))
    request = await cluster.prefill.next_request()
    cluster.prefill.tell(failed(request, "broken"))
    with pytest.raises(CallError, match="UNAVAILABLE: broken"):
        await soon(reading)


async def test_a_server_that_was_never_reached_is_an_error_at_once() -> None:
    async with AsyncClient("127.0.0.1:1", timeout_s=PATIENT_S) as client:
        with pytest.raises(CallError, match="UNAVAILABLE"):
            await asyncio.wait_for(client.generate(PROMPT), PATIENT_S / 2)


async def test_leaving_a_stream_ends_its_request(cluster: Cluster, client: AsyncClient) -> None:
    stream = client.stream(PROMPT, max_new_tokens=500)
    reading = asyncio.create_task(collect(stream))
    request = await cluster.prefill.next_request()
    tell(cluster, request, 0, 1)
    await asyncio.sleep(0.05)
    reading.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reading
    await stream.aclose()
    assert await cluster.prefill.next() == abort(request)
    assert cluster.outcomes() == (0, 0, 1)


async def test_without_resuming_the_first_lost_connection_is_the_last(cluster: Cluster, connection: Proxy) -> None:
    async with AsyncClient(f"127.0.0.1:{connection.port}", timeout_s=PATIENT_S, resume=False) as client:
        reading = asyncio.create_task(collect(client.stream(PROMPT, max_new_tokens=500)))
        request = await cluster.prefill.next_request()
        connection.cut()
        with pytest.raises(CallError, match="UNAVAILABLE"):
            await soon(reading)
        assert await cluster.prefill.next() == abort(request)


async def collect(stream: Any) -> list[pb.GenerateChunk]:
    return [chunk async for chunk in stream]


class Cut(SimpleNamespace):
    """A reader that is only cut off."""


async def nothing() -> None:
    return


def test_a_client_that_takes_nothing_after_a_while_of_nothing_to_take_is_cut_off() -> None:
    loop, errors = VirtualLoop(), list[Exception]()
    reader: Any = Cut(cut=errors.append)
    patience = _Patience(reader, 30.0)

    async def enter() -> None:
        patience.__enter__()

    loop.do(enter())
    for _ in range(3):
        loop.now_s += 31.0
        loop.do(nothing())
    assert errors == []
    patience.since_s = loop.now_s
    for _ in range(29):
        loop.now_s += 1.0
        loop.do(nothing())
    assert errors == []
    for _ in range(2):
        loop.now_s += 1.0
        loop.do(nothing())
    assert len(errors) == 1
    loop.close()


def test_a_stream_that_has_ended_is_held_by_no_timer() -> None:
    loop = VirtualLoop()
    reader: Any = Cut(cut=print)
    left = weakref.ref(reader)

    async def stream(reader: Any) -> None:
        with _Patience(reader, 30.0):
            pass

    loop.do(stream(reader))
    del reader
    gc.collect()
    assert left() is None
    loop.close()


def test_usage_is_told_as_it_was_counted() -> None:
    counted = {"prompt_tokens": 30, "completion_tokens": 7, "cached_tokens": 16}
    piece = Piece(choice=0, offset=0, token_ids=(), text="", logprobs=())
    chunk = to_chunk(RequestId("r"), Increment(piece=piece, usage=Usage(**counted)))
    assert {name: getattr(chunk.usage, name) for name in counted} == counted
