"""Calls of the generation service in any order and of any content, one process, played workers and virtual time.

Whatever is asked, resumed, aborted and left: a call ends in a valid stream or in a status that the API names, a
request id never mixes the answers of two bodies, and nothing is left. `--hypothesis-profile=long` tries many more.
"""

from __future__ import annotations

import asyncio
from typing import Any, cast

import grpc
import pytest
from grpc.aio import AbortError
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from cluster.api.generation_service import GenerationService
from cluster.frontend.frontend import Frontend
from cluster.planning import EMBEDDED_MODEL, make_plan
from model.tokenizer import Tokenizer
from octet.config import load_config
from octet.ids import WorkerId
from octet.mailbox import AsyncMailbox
from octet.metadata import REQUEST_ID
from octet.v1 import octet_pb2 as pb
from tests.unit.cluster.any_message import any_message
from tests.unit.cluster.pools import Pools, PoolsMailbox, VirtualLoop, Worker, token_of

GRACE_S, STALL_S, KEEP_S, TIMEOUT_S = 5.0, 2.0, 20.0, 30.0
FRONTEND, PREFILL, DECODE = WorkerId("frontend-0"), WorkerId("prefill-0"), WorkerId("decode-0")
SETTINGS = (
    f"{{max_requests: 5, resume_grace_s: {GRACE_S}, max_stall_s: {STALL_S}, max_unread_tokens: 6, "
    f"max_attempts: 100000, keep_results_s: {KEEP_S}, max_kept_results: 3, default_timeout_s: {TIMEOUT_S}}}"
)
PLAN = make_plan(load_config(None, [f"frontend={SETTINGS}", "model.max_model_len=64"]))
TOKENIZER = Tokenizer.open(EMBEDDED_MODEL)
REFUSALS = {"INVALID_ARGUMENT", "ALREADY_EXISTS", "RESOURCE_EXHAUSTED", "UNAVAILABLE"}
ENDS = {"RESOURCE_EXHAUSTED", "DEADLINE_EXCEEDED", "CANCELLED", "UNAVAILABLE"}
REQUEST_IDS = st.sampled_from(["a", "b", "c", ""])

BODIES = st.builds(
    lambda n, length, seed, stop, resumable, priority: pb.GenerateRequest(
        token_ids=pb.TokenIds(ids=[1, 2, 3]),
        sampling=pb.Sampling(n=n, seed=seed),
        stopping=pb.Stopping(max_new_tokens=length, ignore_eos=True, stop=stop),
        resumable=resumable,
        priority=priority,
    ),
    n=st.integers(1, 3),
    length=st.integers(1, 8),
    seed=st.integers(1, 4),
    stop=st.just([]) | st.lists(st.sampled_from(["e", "th", "\n", "zq"]), max_size=2),
    resumable=st.booleans(),
    priority=st.integers(-1, 1),
)


class Context:
    """A call as gRPC makes it: what the handler says in it is what the client sees."""

    def __init__(self, timeout_s: float | None) -> None:
        loop = asyncio.get_running_loop()
        self.deadline_s = None if timeout_s is None else loop.time() + timeout_s
        self.metadata: dict[str, str] = {}
        self.chunks: list[pb.GenerateChunk] = []
        self.status = ""
        self.reads = asyncio.Event()
        """Clear while the client takes nothing."""
        self.reads.set()

    def time_remaining(self) -> float | None:
        now_s = asyncio.get_running_loop().time()
        return None if self.deadline_s is None else max(0.0, self.deadline_s - now_s)

    async def send_initial_metadata(self, metadata: Any) -> None:
        assert not self.metadata, "it is accepted twice"
        assert not self.status
        self.metadata = dict(metadata)

    async def write(self, chunk: pb.GenerateChunk) -> None:
        await self.reads.wait()
        assert not self.status
        self.chunks.append(chunk)

    async def abort(self, code: grpc.StatusCode, details: str = "", trailing_metadata: Any = ()) -> None:
        assert not self.status, "it is ended twice"
        assert details
        self.status = code.name
        raise AbortError


class Call:
    """One call of a client."""

    def __init__(self, kind: str, request: Any, handler: Any, timeout_s: float | None) -> None:
        self.kind, self.request, self.context = kind, request, Context(timeout_s)
        self.left = False
        self.seed: int | None = None
        """By which its answer can be foretold."""
        self.length = 0
        self.offsets: list[int] = []
        self.task = asyncio.get_running_loop().create_task(handler(request, self.context))

    @property
    def request_id(self) -> str:
        return self.context.metadata.get(REQUEST_ID, "")

    def leave(self) -> None:
        self.left = True
        self.task.cancel()

    def check(self) -> None:
        """What has come so far, and how it ended."""
        if self.task.done():
            self._check_end()
        elif self.kind == "Generate":
            return
        self._check_choices({}, self.context.chunks)

    def _check_end(self) -> None:
        if self.task.cancelled():
            assert self.left, "a handler was cancelled, and not by its client"
            return
        error = self.task.exception()
        if error is not None:
            assert isinstance(error, AbortError), repr(error)
            accepted = bool(self.context.metadata)
            expected = ENDS if accepted else REFUSALS | ENDS
            if self.kind == "GenerationResume":
                expected = expected | {"NOT_FOUND"}
            assert self.context.status in expected, (self.kind, self.context.status)
            return
        assert not self.context.status
        assert self.context.metadata, "it ended well and was never accepted"
        if self.kind == "Generate":
            response = self.task.result()
            assert response.request_id == self.request_id
            chunks = [
                pb.GenerateChunk(
                    index=choice.index, token_ids=choice.token_ids, text=choice.text, finish_reason=choice.finish_reason
                )
                for choice in response.choices
            ]
            ends = self._check_choices({}, chunks)
            total = sum(len(chunk.token_ids) for chunk in chunks)
            assert response.usage.completion_tokens == total + sum(self.offsets)
        else:
            ends = self._check_choices({}, self.context.chunks)
            last = self.context.chunks[-1]
            assert last.HasField("usage")
            assert sum(chunk.HasField("usage") for chunk in self.context.chunks) == 1
        assert ends
        assert set(ends) == set(range(len(ends))), "a choice is missing"
        assert all(ends.values())

    def _check_choices(self, ends: dict[int, int], chunks: list[pb.GenerateChunk]) -> dict[int, int]:
        """Returns: the finish reason of each choice."""
        places: dict[int, int] = {}
        for chunk in chunks:
            # A whole answer, too, begins after the tokens that its client has.
            place = places.setdefault(chunk.index, self.offsets[chunk.index] if chunk.index < len(self.offsets) else 0)
            if self.kind != "Generate":
                assert chunk.request_id == self.request_id
                assert chunk.offset == place, "a gap, or a repeat"
            assert not ends.get(chunk.index), "something comes after a choice's end"
            for index, token_id in enumerate(chunk.token_ids, place):
                if self.seed is not None:
                    assert token_id == token_of(self.seed, chunk.index, index)
            places[chunk.index] = place + len(chunk.token_ids)
            ends[chunk.index] = chunk.finish_reason
            if chunk.finish_reason == pb.LENGTH and self.length:
                assert places[chunk.index] == self.length
        return ends


class Machine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.loop, self.pools = VirtualLoop(), Pools(seeded=True)
        self.calls: list[Call] = []
        self.bodies: dict[str, pb.GenerateRequest] = {}
        """By id: the body that was accepted last."""
        self.misled: set[str] = set()
        """Ids of requests whose clients say that they have other tokens than those of the answer."""
        self.loop.do(self.start())

    async def start(self) -> None:
        self.mailbox = PoolsMailbox(self.pools)
        self.frontend = Frontend(FRONTEND, PLAN, TOKENIZER, cast(AsyncMailbox, self.mailbox))
        self.service = GenerationService(self.frontend, "model", 0, STALL_S)
        self.frontend.serve({}, {})
        self.publish(True)

    def publish(self, there: bool) -> None:
        """Whether the cluster has workers. Those that come again are the same processes."""
        self.pools.prefill = {PREFILL: Worker(PREFILL)} if there else {}
        self.pools.decode = {DECODE: Worker(DECODE)} if there else {}
        self.frontend.set_workers(
            dict.fromkeys(self.pools.prefill, "nowhere"), dict.fromkeys(self.pools.decode, "nowhere")
        )

    # Clients.

    @rule(
        request_id=REQUEST_IDS,
        body=BODIES,
        method=st.sampled_from(["Generate", "GenerateStream"]),
        timeout_s=st.sampled_from([None, 0.5, 10.0]),
        received=st.none() | st.lists(st.integers(0, 3), max_size=3),
    )
    def ask(
        self,
        request_id: str,
        body: pb.GenerateRequest,
        method: str,
        timeout_s: float | None,
        received: list[int] | None,
    ) -> None:
        """Perhaps with the first tokens of the right answer, as a client has them that lost its frontend."""
        request = pb.GenerateRequest()
        request.CopyFrom(body)
        request.request_id = request_id
        for choice, number in enumerate(received or []):
            ids = [token_of(body.sampling.seed, choice, index) for index in range(number)]
            request.received.add(ids=ids)
        self.send(method, request, timeout_s)

    @precondition(lambda self: self.bodies)
    @rule(data=st.data(), method=st.sampled_from(["Generate", "GenerateStream"]))
    def ask_the_same_again(self, data: st.DataObject, method: str) -> None:
        self.send(method, self.bodies[data.draw(st.sampled_from(list(self.bodies)))], None)

    @rule(
        request_id=REQUEST_IDS,
        request=any_message(pb.GenerateRequest),
        with_input=st.booleans(),
        method=st.sampled_from(["Generate", "GenerateStream"]),
    )
    def ask_anything(self, request_id: str, request: pb.GenerateRequest, with_input: bool, method: str) -> None:
        request.request_id = request_id
        if not request.sampling.HasField("seed"):
            # The frontend would draw one, and this run could not be done again.
            request.sampling.seed = 5
        if with_input:
            request.token_ids.ids[:] = [1, 2, 3]
        self.send(method, request, None)

    def send(self, method: str, request: pb.GenerateRequest, timeout_s: float | None) -> None:
        async def act() -> None:
            call = Call(method, request, getattr(self.service, method), timeout_s)
            call.offsets = [len(received.ids) for received in request.received]
            call.seed = request.sampling.seed
            call.length = request.stopping.max_new_tokens
            self.calls.append(call)

        self.loop.do(act())
        accepted = self.calls[-1].request_id
        if accepted:
            assert accepted == (request.request_id or accepted)
            self.bodies[accepted] = request
            if any(
                token_id != token_of(request.sampling.seed, choice, index)
                for choice, received in enumerate(request.received)
                for index, token_id in enumerate(received.ids)
            ):
                self.misled.add(accepted)
            if accepted in self.misled:
                self.calls[-1].seed = None

    @rule(data=st.data(), offsets=st.lists(st.integers(0, 4), max_size=4), known=st.booleans(), request_id=REQUEST_IDS)
    def resume(self, data: st.DataObject, offsets: list[int], known: bool, request_id: str) -> None:
        if known and self.bodies:
            request_id = data.draw(st.sampled_from(list(self.bodies)))
        body = self.bodies.get(request_id)

        async def act() -> None:
            request = pb.GenerationResumeRequest(request_id=request_id, offsets=offsets)
            call = Call("GenerationResume", request, self.service.GenerationResume, None)
            call.offsets = offsets
            if body is not None:
                call.length = body.stopping.max_new_tokens
                call.seed = None if request_id in self.misled else body.sampling.seed
            self.calls.append(call)

        self.loop.do(act())

    @rule(data=st.data(), known=st.booleans(), request_id=REQUEST_IDS)
    def abort(self, data: st.DataObject, known: bool, request_id: str) -> None:
        if known and self.bodies:
            request_id = data.draw(st.sampled_from(list(self.bodies)))

        async def act() -> None:
            context = Context(None)
            response = await self.service.Abort(pb.AbortRequest(request_id=request_id), cast(Any, context))
            assert response == pb.AbortResponse()

        self.loop.do(act())

    @precondition(lambda self: self.calls)
    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        call = data.draw(st.sampled_from(self.calls))

        async def act() -> None:
            call.leave()

        self.loop.do(act())

    @precondition(lambda self: self.calls)
    @rule(data=st.data())
    def read_or_not(self, data: st.DataObject) -> None:
        reads = data.draw(st.sampled_from(self.calls)).context.reads

        async def act() -> None:
            if reads.is_set():
                reads.clear()
            else:
                reads.set()

        self.loop.do(act())

    # Workers and time.

    @rule(there=st.booleans())
    def workers_come_or_go(self, there: bool) -> None:
        async def act() -> None:
            self.publish(there)

        self.loop.do(act())

    @rule(steps=st.integers(1, 4))
    def work(self, steps: int) -> None:
        for _ in range(steps):
            for prefill in self.pools.prefill.values():
                self.pools.step_prefill(prefill)
            for decode in self.pools.decode.values():
                self.pools.step_decode(decode)
            self.loop.do(self._deliver())

    @rule()
    def fail(self) -> None:
        for worker in (*self.pools.prefill.values(), *self.pools.decode.values()):
            self.pools.fail(worker)
        self.loop.do(self._deliver())

    async def _deliver(self) -> None:
        for reports in self.pools.reports.values():
            while reports:
                self.mailbox.inbound.put_nowait(reports.popleft())

    @rule(seconds=st.sampled_from([0.2, STALL_S + 0.1, GRACE_S + 0.1, KEEP_S]))
    def wait(self, seconds: float) -> None:
        """gRPC itself cancels a handler whose call is past its deadline."""
        self.loop.now_s += seconds
        self.loop.do(asyncio.sleep(0))

        async def act() -> None:
            for call in self.calls:
                deadline_s = call.context.deadline_s
                if deadline_s is not None and deadline_s <= self.loop.now_s and not call.task.done():
                    call.leave()

        self.loop.do(act())

    # What must hold.

    @invariant()
    def every_call_is_right_so_far(self) -> None:
        for call in self.calls:
            call.check()

    @invariant()
    def only_a_resumable_request_goes_on_without_a_client(self) -> None:
        read = {call.request_id for call in self.calls if call.request_id and not call.task.done()}
        resumable = {request_id for request_id, body in self.bodies.items() if body.resumable}
        assert self.frontend.num_live <= len(read | resumable)

    @invariant()
    def what_has_ended_is_not_looked_at_again(self) -> None:
        self.calls = [call for call in self.calls if not call.task.done()]

    def teardown(self) -> None:
        """Everything ends, and nothing is left anywhere."""

        async def read() -> None:
            self.publish(True)
            for call in self.calls:
                call.context.reads.set()

        self.loop.do(read())
        for _ in range(80):
            self.work(1)
            self.wait(1.0)
        self.every_call_is_right_so_far()
        assert [call for call in self.calls if not call.task.done()] == [], "it hangs"
        assert self.frontend.num_live == 0
        for worker in (*self.pools.prefill.values(), *self.pools.decode.values()):
            assert (worker.prompts, worker.sequences) == ([], [])
        self.loop.run_until_complete(self._nothing_runs())
        self.loop.close()

    async def _nothing_runs(self) -> None:
        load = self.frontend.request_load()
        assert (load.queued_prompt_tokens, load.waiting) == (0, 0)
        self.frontend.close()
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert asyncio.all_tasks() == {asyncio.current_task()}


TestAnyCalls = Machine.TestCase
TestAnyCalls.settings = settings(stateful_step_count=30, deadline=None)
TestAnyCalls = pytest.mark.timeout(460)(TestAnyCalls)
