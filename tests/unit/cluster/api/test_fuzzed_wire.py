"""Calls of any content, several at once, through gRPC itself; workers answer by themselves.

The client hears a valid stream or a status that the API names, within its time, and nothing is left in the frontend.
`--hypothesis-profile=long` tries many more of them.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
from collections.abc import Iterator
from typing import Any, cast

import grpc
import pytest
from google.protobuf.message import DecodeError
from hypothesis import given
from hypothesis import strategies as st

from cluster.api.cluster_service import ClusterService
from cluster.api.generation_service import GenerationService
from cluster.api.grpc_service import GrpcServer
from cluster.frontend.frontend import Frontend
from cluster.frontend.live_requests import LiveRequest
from cluster.frontend.record import Reader
from cluster.planning import EMBEDDED_MODEL, make_plan
from model.tokenizer import Tokenizer
from octet.config import load_config
from octet.ids import WorkerId
from octet.mailbox import AsyncMailbox
from octet.metadata import REQUEST_ID
from octet.v1 import octet_pb2 as pb
from tests.unit.cluster.any_message import any_message
from tests.unit.cluster.leaving_nothing import nothing_left_of
from tests.unit.cluster.operations import NoOperations
from tests.unit.cluster.pools import Pools, PoolsMailbox, Worker

PATIENT_S, TICK_S = 30.0, 0.001
FRONTEND, PREFILL, DECODE = WorkerId("frontend-0"), WorkerId("prefill-0"), WorkerId("decode-0")
SETTINGS = "{port: 0, max_requests: 4, resume_grace_s: 0.01, max_stall_s: 5, keep_results_s: 0.02, max_kept_results: 3}"
PLAN = make_plan(load_config(None, [f"frontend={SETTINGS}", "model.max_model_len=64"]))
TYPED = {
    "INVALID_ARGUMENT",
    "ALREADY_EXISTS",
    "NOT_FOUND",
    "RESOURCE_EXHAUSTED",
    "UNAVAILABLE",
    "DEADLINE_EXCEEDED",
    "CANCELLED",
}
METHODS: dict[str, tuple[type[Any], type[Any], bool]] = {
    "Generate": (pb.GenerateRequest, pb.GenerateResponse, False),
    "GenerateStream": (pb.GenerateRequest, pb.GenerateChunk, True),
    "GenerationResume": (pb.GenerationResumeRequest, pb.GenerateChunk, True),
    "Abort": (pb.AbortRequest, pb.AbortResponse, False),
    "Tokenize": (pb.TokenizeRequest, pb.TokenizeResponse, False),
    "Detokenize": (pb.DetokenizeRequest, pb.DetokenizeResponse, False),
    "GetModelInfo": (pb.GetModelInfoRequest, pb.GetModelInfoResponse, False),
}
"""By name: its request, its response, and whether that is a stream."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Asked:
    """One call, as bytes."""

    method: str
    data: bytes
    timeout_s: float
    leave_after_s: float | None
    """When its client cancels it, if it has not ended by then."""


@st.composite
def _asked(draw: st.DrawFn) -> Asked:
    method = draw(st.sampled_from(sorted(METHODS)))
    if draw(st.integers(0, 9)) == 0:
        data = draw(st.binary(max_size=60))
    else:
        message = draw(any_message(METHODS[method][0]))
        if "request_id" in message.DESCRIPTOR.fields_by_name:
            message.request_id = draw(st.sampled_from(["a", "b", "", message.request_id]))
        if METHODS[method][0] is pb.GenerateRequest and draw(st.booleans()):
            # Otherwise nearly all of them are wrong.
            message.token_ids.ids[:] = [1, 2, 3]
            message.ClearField("received")
            message.sampling.Clear()
            message.stopping.Clear()
            message.sampling.n = draw(st.integers(1, 3))
            message.stopping.max_new_tokens = draw(st.integers(1, 12))
        data = message.SerializeToString()
    return Asked(
        method=method,
        data=data,
        timeout_s=draw(st.sampled_from([0.001, 0.02, PATIENT_S])),
        leave_after_s=draw(st.none() | st.sampled_from([0.0, 0.002, 0.01])),
    )


class Server:
    """A gRPC server with workers that compute all that comes, on a loop of its own."""

    def __init__(self) -> None:
        self.runner = asyncio.Runner()
        self._stack = contextlib.AsyncExitStack()
        self.runner.run(self._start())

    async def _start(self) -> None:
        pools = Pools(seeded=True)
        pools.prefill[PREFILL], pools.decode[DECODE] = Worker(PREFILL), Worker(DECODE)
        mailbox = PoolsMailbox(pools)
        tokenizer = Tokenizer.open(EMBEDDED_MODEL)
        self.frontend = Frontend(FRONTEND, PLAN, tokenizer, cast(AsyncMailbox, mailbox))
        config = PLAN.config.frontend
        generation = GenerationService(self.frontend, "model", 0, config.max_stall_s)
        server = GrpcServer(config, generation, ClusterService(NoOperations()))
        self.frontend.serve({PREFILL: "nowhere"}, {DECODE: "nowhere"})
        self._channel = grpc.aio.insecure_channel(f"127.0.0.1:{await server.start()}")
        working = asyncio.create_task(_work(pools, mailbox))
        self._stack.push_async_callback(server.stop, 0)
        self._stack.push_async_callback(self._channel.close)
        self._stack.callback(self.frontend.close)
        self._stack.callback(working.cancel)

    def close(self) -> None:
        self.runner.run(self._stack.aclose())
        self.runner.close()

    async def ask(self, asked: Asked) -> tuple[str, list[Any], str]:
        """Returns: the status, what came, and the id under which it was accepted."""
        _, response, is_stream = METHODS[asked.method]
        kind = self._channel.unary_stream if is_stream else self._channel.unary_unary
        open_call: Any = kind(f"/octet.v1.Generation/{asked.method}", response_deserializer=response.FromString)
        call = open_call(asked.data, timeout=asked.timeout_s)
        leaving = None
        if asked.leave_after_s is not None:
            leaving = asyncio.get_running_loop().call_later(asked.leave_after_s, call.cancel)
        came: list[Any] = []
        try:
            if is_stream:
                async for chunk in call:
                    came.append(chunk)
            else:
                came.append(await call)
            status = "OK"
        except asyncio.CancelledError:
            status = "CANCELLED"
        except grpc.aio.AioRpcError as error:
            status = error.code().name
        finally:
            if leaving is not None:
                leaving.cancel()
        metadata = dict(await call.initial_metadata() or ()) if status == "OK" else {}
        return status, came, str(metadata.get(REQUEST_ID, ""))

    async def nothing_is_left(self, tasks: set[asyncio.Task[Any]]) -> None:
        for _ in range(int(PATIENT_S / TICK_S)):
            left = _tasks() - tasks
            if not left and not self.frontend.num_live:
                break
            await asyncio.sleep(TICK_S)
        else:
            pytest.fail(f"{self.frontend.num_live} requests and {left} are left")
        load = self.frontend.request_load()
        assert (load.queued_prompt_tokens, load.waiting) == (0, 0)


def _tasks() -> set[asyncio.Task[Any]]:
    """But for the current one, and gRPC's own, in which it waits for the next call."""
    others = asyncio.all_tasks() - {cast("asyncio.Task[Any]", asyncio.current_task())}
    return {task for task in others if "AioServer._request" not in repr(task)}


async def _work(pools: Pools, mailbox: PoolsMailbox) -> None:
    while True:
        await asyncio.sleep(TICK_S)
        for worker in pools.prefill.values():
            pools.step_prefill(worker)
        for worker in pools.decode.values():
            for _ in range(8):
                pools.step_decode(worker)
        for reports in pools.reports.values():
            while reports:
                mailbox.inbound.put_nowait(reports.popleft())


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    # The examples' requests and readers have to be gone with them.
    with nothing_left_of(LiveRequest, Reader):
        server = Server()
        # gRPC logs the traceback of an answer to a client that has left; pytest keeps it, and what it passed through.
        log = logging.getLogger("grpc._cython.cygrpc")
        log.disabled = True
        yield server
        server.close()
        log.disabled = False


def _check(asked: Asked, status: str, came: list[Any], request_id: str) -> None:
    request_type, _, is_stream = METHODS[asked.method]
    try:
        request = request_type.FromString(asked.data)
    except DecodeError:
        assert status in {"INVALID_ARGUMENT", "DEADLINE_EXCEEDED", "CANCELLED"}, status
        return
    if status != "OK":
        assert status in TYPED, (asked.method, status)
        return
    if is_stream:
        received = request.received if asked.method == "GenerateStream" else ()
        offsets = [len(ids.ids) for ids in received] if asked.method == "GenerateStream" else list(request.offsets)
        places: dict[int, int] = {}
        ends: dict[int, int] = {}
        for chunk in came:
            assert chunk.request_id == request_id
            first = offsets[chunk.index] if chunk.index < len(offsets) else 0
            assert chunk.offset == places.setdefault(chunk.index, first)
            assert not ends.get(chunk.index)
            places[chunk.index] += len(chunk.token_ids)
            ends[chunk.index] = chunk.finish_reason
        assert set(ends) == set(range(len(ends)))
        assert ends
        assert all(ends.values())
        assert came[-1].HasField("usage")
    elif asked.method == "Generate":
        (response,) = came
        assert response.request_id == request_id
        assert all(choice.finish_reason for choice in response.choices)
        assert len(response.choices) == (request.sampling.n if request.sampling.HasField("n") else 1)


@given(calls=st.lists(st.lists(_asked(), min_size=1, max_size=4), min_size=1, max_size=3))
@pytest.mark.timeout(460)
def test_any_calls_at_once_are_answered_as_the_api_says(server: Server, calls: list[list[Asked]]) -> None:
    async def play() -> None:
        tasks = _tasks()
        for together in calls:
            async with asyncio.timeout(2 * PATIENT_S):
                answers = await asyncio.gather(*(server.ask(asked) for asked in together))
            for asked, answer in zip(together, answers, strict=True):
                _check(asked, *answer)
        await server.nothing_is_left(tasks)

    server.runner.run(play())
