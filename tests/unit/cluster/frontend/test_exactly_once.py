"""Whatever workers and clients do, and in whatever order: each token once, in order, and one end for each request."""

from __future__ import annotations

import asyncio
from contextlib import AbstractContextManager
from typing import cast

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from cluster.frontend.frontend import Frontend
from cluster.frontend.record import Reader
from cluster.frontend.validation import parse_request
from cluster.planning import make_plan
from octet.config import load_config
from octet.errors import OctetError, QueueFullError, RequestCancelledError
from octet.ids import RequestId, WorkerId
from octet.mailbox import AsyncMailbox
from octet.v1 import octet_pb2 as pb
from tests.unit.cluster.pools import Pools, PoolsMailbox, VirtualLoop, Worker, token_of

GRACE_S = 10.0
FRONTEND = WorkerId("frontend-0")
PLAN = make_plan(load_config(None, [f"frontend={{resume_grace_s: {GRACE_S}, max_attempts: 100000}}"]))


class Client:
    """Reads one request, perhaps not from its beginning."""

    def __init__(
        self, request: pb.GenerateRequest, opening: AbstractContextManager[Reader], offsets: list[int]
    ) -> None:
        self.request, self.offsets = request, offsets
        self.tokens: list[list[int]] = [[] for _ in offsets]
        self.ends = [0] * len(offsets)
        self.error: OctetError | None = None
        self.task = asyncio.get_running_loop().create_task(self._read(opening))

    async def _read(self, opening: AbstractContextManager[Reader]) -> None:
        try:
            with opening as reader:
                async for increment in reader.increments():
                    piece = increment.piece
                    assert piece.offset == self.offsets[piece.choice] + len(self.tokens[piece.choice])
                    self.tokens[piece.choice] += piece.token_ids
                    self.ends[piece.choice] += piece.finish_reason is not None
        except OctetError as error:
            self.error = error

    @property
    def places(self) -> list[int]:
        return [offset + len(tokens) for offset, tokens in zip(self.offsets, self.tokens, strict=True)]

    def check(self) -> None:
        """What was read is a part of the fault-free answer, at its place."""
        for choice, (offset, tokens) in enumerate(zip(self.offsets, self.tokens, strict=True)):
            right = [token_of(self.request.request_id, choice, offset + index) for index in range(len(tokens))]
            assert tokens == right
            assert self.ends[choice] <= 1
        if self.task.done() and not self.task.cancelled():
            self.task.result()

    def check_complete(self) -> None:
        length = self.request.stopping.max_new_tokens
        assert (self.places, self.ends) == ([length] * len(self.offsets), [1] * len(self.offsets))


class Machine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.loop, self.pools = VirtualLoop(), Pools()
        self.num_workers = self.num_requests = 0
        self.draining: set[WorkerId] = set()
        self.clients: list[Client] = []
        self.left: list[Client] = []
        self.loop.do(self.start())

    async def start(self) -> None:
        self.mailbox = PoolsMailbox(self.pools)
        self.frontend = Frontend(FRONTEND, PLAN, None, cast(AsyncMailbox, self.mailbox))
        self.frontend.serve({}, {})

    def pick(self, pool: dict[WorkerId, Worker], data: st.DataObject) -> Worker:
        return pool[data.draw(st.sampled_from(sorted(pool)))]

    # Workers.

    @rule(pool=st.sampled_from(["prefill", "decode"]))
    def join(self, pool: str) -> None:
        worker_id = WorkerId(f"{pool}-{self.num_workers}")
        self.num_workers += 1
        getattr(self.pools, pool)[worker_id] = Worker(worker_id)
        self.publish()

    @rule(data=st.data(), pool=st.sampled_from(["prefill", "decode"]), noticed=st.booleans())
    def kill(self, data: st.DataObject, pool: str, noticed: bool) -> None:
        workers = getattr(self.pools, pool)
        if workers:
            del workers[self.pick(workers, data).worker_id]
            if noticed:
                self.publish()

    @rule(data=st.data(), pool=st.sampled_from(["prefill", "decode"]))
    def drain(self, data: st.DataObject, pool: str) -> None:
        workers = getattr(self.pools, pool)
        if workers:
            self.draining ^= {self.pick(workers, data).worker_id}
            self.publish()

    @rule()
    def publish(self) -> None:
        async def act() -> None:
            prefill, decode = (dict.fromkeys(pool, "nowhere") for pool in (self.pools.prefill, self.pools.decode))
            self.frontend.set_workers(prefill, decode, self.draining)

        self.loop.do(act())

    @precondition(lambda self: self.pools.prefill)
    @rule(data=st.data())
    def compute_a_prompt(self, data: st.DataObject) -> None:
        self.pools.step_prefill(self.pick(self.pools.prefill, data))

    @precondition(lambda self: self.pools.decode)
    @rule(data=st.data())
    def decode(self, data: st.DataObject) -> None:
        self.pools.step_decode(self.pick(self.pools.decode, data))

    @precondition(lambda self: self.pools.decode)
    @rule(data=st.data())
    def evict(self, data: st.DataObject) -> None:
        self.pools.evict(self.pick(self.pools.decode, data))

    @precondition(lambda self: self.pools.decode)
    @rule(data=st.data())
    def migrate(self, data: st.DataObject) -> None:
        self.pools.migrate(self.pick(self.pools.decode, data), self.pick(self.pools.decode, data))

    @rule(data=st.data(), pool=st.sampled_from(["prefill", "decode"]))
    def fail(self, data: st.DataObject, pool: str) -> None:
        workers = getattr(self.pools, pool)
        if workers:
            self.pools.fail(self.pick(workers, data))

    @rule(data=st.data(), twice=st.booleans())
    def deliver(self, data: st.DataObject, twice: bool) -> None:
        """A worker's next report, also one of a worker that is gone."""
        waiting = sorted(worker_id for worker_id, reports in self.pools.reports.items() if reports)
        if waiting:
            self.loop.do(self._deliver(data.draw(st.sampled_from(waiting)), 1 + twice))

    async def _deliver(self, worker_id: WorkerId, times: int = 1) -> None:
        report = self.pools.reports[worker_id].popleft()
        for _ in range(times):
            self.mailbox.inbound.put_nowait(report)

    # Clients.

    @rule(n=st.integers(1, 3), length=st.integers(1, 6), resumable=st.booleans())
    def ask(self, n: int, length: int, resumable: bool) -> None:
        request = pb.GenerateRequest(
            request_id=f"r{self.num_requests}",
            token_ids=pb.TokenIds(ids=[1, 2, 3]),
            sampling=pb.Sampling(n=n),
            stopping=pb.Stopping(max_new_tokens=length, ignore_eos=True),
            resumable=resumable,
        )
        self.num_requests += 1
        self.loop.do(self._ask(request))

    async def _ask(self, request: pb.GenerateRequest) -> None:
        spec = parse_request(request, self.frontend.limits, None)
        self.clients.append(Client(request, self.frontend.generate(spec), [0] * request.sampling.n))

    @precondition(lambda self: self.clients)
    @rule(data=st.data())
    def ask_again(self, data: st.DataObject) -> None:
        """The same request, while it is live or finished."""
        client = data.draw(st.sampled_from(self.clients))
        if client.error is None:
            self.loop.do(self._ask(client.request))

    @precondition(lambda self: self.clients)
    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        client = data.draw(st.sampled_from(self.clients))
        self.clients.remove(client)
        self.left.append(client)

        async def act() -> None:
            client.task.cancel()

        self.loop.do(act())

    @precondition(lambda self: self.left)
    @rule(data=st.data())
    def come_back(self, data: st.DataObject) -> None:
        client = data.draw(st.sampled_from(self.left))
        self.left.remove(client)

        async def act() -> None:
            opening = self.frontend.resume(RequestId(client.request.request_id), client.places)
            self.clients.append(Client(client.request, opening, client.places))

        self.loop.do(act())

    @rule(seconds=st.sampled_from([0.2, 3.0, GRACE_S]))
    def wait(self, seconds: float) -> None:
        self.loop.now_s += seconds
        self.loop.do(asyncio.sleep(0))

    # What must hold.

    @invariant()
    def every_client_reads_the_fault_free_answer(self) -> None:
        for client in (*self.clients, *self.left):
            client.check()

    @invariant()
    def every_request_is_live_or_has_ended_once(self) -> None:
        totals = self.frontend.totals
        ended = totals.finished + totals.failed + totals.cancelled + totals.refused
        assert ended + self.frontend.num_live == self.num_requests

    def teardown(self) -> None:
        """With workers that work, everything ends, and nothing is left anywhere."""
        self.draining.clear()
        for pool in ("prefill", "decode"):
            self.join(pool)
        for _ in range(60):
            self.wait(2.5)
            for worker in list(self.pools.prefill.values()):
                for _ in range(10):
                    self.pools.step_prefill(worker)
            for worker in list(self.pools.decode.values()):
                self.pools.step_decode(worker)
            for worker_id, reports in list(self.pools.reports.items()):
                for _ in range(len(reports)):
                    self.loop.do(self._deliver(worker_id))
        assert self.frontend.num_live == 0
        assert self.frontend.totals.failed == 0
        for client in self.clients:
            client.check()
            assert client.task.done()
            if client.error is None:
                client.check_complete()
            else:
                # Who comes after few tokens in a long time is refused: it would take too long.
                assert isinstance(client.error, RequestCancelledError | QueueFullError)
        for worker in (*self.pools.prefill.values(), *self.pools.decode.values()):
            assert (worker.prompts, worker.sequences) == ([], [])
        self.loop.run_until_complete(self._close())
        self.loop.close()

    async def _close(self) -> None:
        self.frontend.close()
        await asyncio.sleep(0)


TestExactlyOnce = Machine.TestCase
TestExactlyOnce.settings = settings(max_examples=50, stateful_step_count=50, deadline=None)
TestExactlyOnce = pytest.mark.timeout(200)(TestExactlyOnce)
