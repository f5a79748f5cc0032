"""Streams that outlive their connections, and requests that are asked twice, on a real cluster."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import grpc
import pytest

from cluster.launch import RunningCluster
from octet.client import AsyncClient, CallError, Client
from octet.v1 import octet_pb2 as pb
from octet.v1 import octet_pb2_grpc as rpc
from tests.clusters import GRACE_S, at_baseline, wait_until
from tests.unit.cluster.proxy import proxy

NUM_TOKENS = 120


@pytest.fixture(autouse=True)
def _nothing_is_left_behind(client: Client) -> Iterator[None]:
    yield
    wait_until(lambda: at_baseline(client.status()), 10, "pages back to baseline")


@pytest.fixture
def stub(embedded: RunningCluster) -> Iterator[Any]:
    with grpc.insecure_channel(embedded.address) as channel:
        yield rpc.GenerationStub(channel)


def asked(request_id: str, **fields: Any) -> pb.GenerateRequest:
    return pb.GenerateRequest(
        request_id=request_id,
        text="It was raining",
        sampling=pb.Sampling(temperature=1.0, seed=5),
        stopping=pb.Stopping(max_new_tokens=NUM_TOKENS, ignore_eos=True),
        **fields,
    )


def token_ids(chunks: list[pb.GenerateChunk]) -> list[int]:
    return [token_id for chunk in chunks for token_id in chunk.token_ids]


@pytest.fixture
def fault_free(stub: Any) -> pb.Choice:
    choice: pb.Choice = stub.Generate(asked("")).choices[0]
    return choice


def test_a_stream_is_resumed_without_a_gap_or_a_repeat(stub: Any, fault_free: pb.Choice) -> None:
    call = stub.GenerateStream(asked("resumed", resumable=True))
    seen = [next(call)]
    while len(token_ids(seen)) < 10:
        seen.append(next(call))
    call.cancel()
    offset = len(token_ids(seen))
    rest = list(stub.GenerationResume(pb.GenerationResumeRequest(request_id="resumed", offsets=[offset])))
    assert token_ids(seen) + token_ids(rest) == list(fault_free.token_ids)
    assert "".join(chunk.text for chunk in (*seen, *rest)) == fault_free.text


def test_a_resumable_request_that_nobody_resumes_is_freed_after_its_grace(client: Client, stub: Any) -> None:
    before = client.status().requests_cancelled
    request = asked("left", resumable=True)
    request.stopping.max_new_tokens = 4000
    call = stub.GenerateStream(request)
    next(call)
    call.cancel()
    assert client.status().live_requests == 1
    wait_until(lambda: client.status().requests_cancelled == before + 1, GRACE_S + 5, "the grace period")


def test_an_answer_is_computed_once_however_often_it_is_asked_for(
    client: Client, stub: Any, fault_free: pb.Choice
) -> None:
    before = client.status()
    calls = [stub.Generate.future(asked("twice")) for _ in range(3)]
    answers = [call.result() for call in calls] + [stub.Generate(asked("twice"))]
    assert [answer.choices[0] for answer in answers] == [fault_free] * 4
    after = client.status()
    assert after.requests_finished == before.requests_finished + 1
    assert after.tokens_served == before.tokens_served + NUM_TOKENS


def test_a_client_that_asks_again_with_its_id_hears_the_same_answer(client: Client, embedded: RunningCluster) -> None:
    """Whoever has crashed meanwhile is another client, and gave no seed."""
    before = client.status().requests_finished
    first = client.generate("again", request_id="order-17", max_new_tokens=20, temperature=1.0)
    with Client(embedded.address, timeout_s=60) as another:
        again = another.generate("again", request_id="order-17", max_new_tokens=20, temperature=1.0)
    assert again.choices == first.choices
    assert client.status().requests_finished == before + 1, "it was computed once"


def test_a_kept_id_with_another_body_already_exists(client: Client, stub: Any) -> None:
    stub.Generate(asked("kept"))
    with pytest.raises(CallError, match=r"ALREADY_EXISTS.*kept"):
        client.generate("something else", request_id="kept")


def test_a_request_goes_on_after_the_tokens_that_its_client_has(stub: Any, fault_free: pb.Choice) -> None:
    """As at a frontend that has lost every journal."""
    received = list(fault_free.token_ids)[:50]
    chunks = list(stub.GenerateStream(asked("moved", received=[pb.TokenIds(ids=received)])))
    assert received + token_ids(chunks) == list(fault_free.token_ids)
    assert chunks[-1].usage.completion_tokens == NUM_TOKENS


def test_a_client_whose_connection_is_cut_again_and_again_reads_the_fault_free_answer(
    embedded: RunningCluster, fault_free: pb.Choice
) -> None:
    async def read() -> list[int]:
        port = int(embedded.address.rpartition(":")[2])
        async with proxy(port) as between, AsyncClient(f"127.0.0.1:{between.port}", timeout_s=60) as client:
            got: list[int] = []
            stream = client.stream(
                "It was raining", temperature=1.0, seed=5, max_new_tokens=NUM_TOKENS, ignore_eos=True
            )
            async for chunk in stream:
                got += chunk.token_ids
                if len(got) // 20 > (len(got) - len(chunk.token_ids)) // 20:
                    between.cut()
            return got

    assert asyncio.run(read()) == list(fault_free.token_ids)
