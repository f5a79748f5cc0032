"""The members of a cluster's three pools as plain processes, with recorders in them; this process is their frontend.

They are the classes that `cluster.workers.pool_actors` puts on Ray, connected by the same lanes, channels and
mailboxes. Without Ray, their processes can be instrumented.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import multiprocessing.connection
import time
from collections.abc import Callable, Sequence
from typing import Any

from cluster.members import Endpoint, Role
from cluster.plan import ServingPlan
from octet.errors import OctetError, StartupError
from octet.ids import RequestId, WorkerId
from octet.mailbox import Mailbox
from octet.messages import PrefillRequest, StepReport, TokenEvent
from ops.bench.breakdown.records import ShardCall, Step

HOST = "127.0.0.1"
FRONTEND = WorkerId("frontend-0")
_START_S, _ANSWER_S, _STOP_S = 120.0, 60.0, 5.0


class AttentionHost:
    """An attention worker and its recorder. Lives in a process of its own."""

    def __init__(self, worker_id: WorkerId, role: Role, plan: ServingPlan) -> None:
        from cluster.workers.attention_worker import AttentionWorker
        from ops.bench.breakdown.probes import StepRecorder

        self._recorder = StepRecorder()
        self._recorder.install()
        self._worker = worker = AttentionWorker(worker_id, role, plan, HOST, "local", report=lambda reason: None)
        self.endpoint, self.load, self.link, self.meet = worker.endpoint, worker.load, worker.link, worker.meet
        self.send_to, self.receive_from = worker.send_to, worker.receive_from
        self.start, self.stop = worker.start, worker.stop

    def probe(self, on: bool) -> None:
        self._recorder.probe(on)

    def take(self) -> list[Step]:
        return self._recorder.take()


class ShardHost:
    """An expert shard and its recorder. Lives in a process of its own."""

    def __init__(self, worker_id: WorkerId, plan: ServingPlan) -> None:
        from cluster.workers.shard_worker import ShardWorker
        from ops.bench.breakdown.probes import CallRecorder

        self._recorder = CallRecorder()
        self._recorder.install()
        self._worker = ShardWorker(worker_id, plan, HOST, "local")
        self.load, self.link, self.stop = self._worker.load, self._worker.link, self._worker.stop

    def take(self) -> list[ShardCall]:
        return self._recorder.take()


class Remote:
    """An object in a process of its own. A call is posted, and answered later."""

    def __init__(self, name: str, make: Callable[..., object], *args: object) -> None:
        context = multiprocessing.get_context("spawn")
        self._name = name
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_host, args=(theirs, make, args), name=name, daemon=True)
        self._process.start()
        theirs.close()

    def post(self, method: str, *args: object) -> None:
        """Raises: StartupError if the process is gone."""
        try:
            self._pipe.send((method, args))
        except ConnectionError:
            raise self._gone() from None

    def answer(self, timeout_s: float = _ANSWER_S) -> Any:
        """What the call that was posted returned. Raises: what it raised, StartupError if it does not answer."""
        try:
            if not self._pipe.poll(timeout_s):
                raise StartupError(f"{self._name} did not answer within {timeout_s} s")
            ok, value = self._pipe.recv()
        except (EOFError, ConnectionError):
            raise self._gone() from None
        if not ok:
            raise value
        return value

    def call(self, method: str, *args: object) -> Any:
        self.post(method, *args)
        return self.answer()

    def _gone(self) -> StartupError:
        return StartupError(f"{self._name}: its process is gone")

    def end(self) -> None:
        self._pipe.close()
        self._process.join(_STOP_S)
        if self._process.is_alive():
            self._process.kill()


def _host(pipe: multiprocessing.connection.Connection, make: Callable[..., object], args: Sequence[object]) -> None:
    """Make the object at the first call, and serve it until the other end closes."""
    made: object = None
    # The other end may also close while an answer is on its way, or be gone altogether.
    with contextlib.suppress(EOFError, ConnectionError):
        while True:
            method, call_args = pipe.recv()
            try:
                made = made if made is not None else make(*args)
                pipe.send((True, getattr(made, method)(*call_args)))
            except OctetError as error:
                pipe.send((False, error))
            except Exception as error:
                pipe.send((False, StartupError(f"{method}: {type(error).__name__}: {error}")))


class Pools:
    """One prefill worker, one decode worker and the plan's expert shards. Close it."""

    def __init__(self, plan: ServingPlan) -> None:
        """Start, load and connect every process. Raises: OctetError."""
        self._mailbox, self._routing = Mailbox(HOST, plan.secret), plan.routing
        self.prefill = Remote("prefill-0", AttentionHost, WorkerId("prefill-0"), "prefill", plan)
        self.decode = Remote("decode-0", AttentionHost, WorkerId("decode-0"), "decode", plan)
        self.shards = [Remote(shard, ShardHost, shard, plan) for shard in plan.routing.shards]
        try:
            self._connect()
        except BaseException:
            self.close()
            raise

    def _connect(self) -> None:
        workers, routing = [self.prefill, self.decode], self._routing
        for worker in workers:
            worker.post("load")
        for shard, worker_id in zip(self.shards, routing.shards, strict=True):
            shard.post("load", routing.held_by(worker_id))
        _answers([*workers, *self.shards])
        prefill, decode = (worker.call("endpoint") for worker in workers)
        peers = {endpoint.worker_id: endpoint.mailbox for endpoint in (prefill, decode)}
        self._mailbox.connect(peers)
        peers = peers | {FRONTEND: self._mailbox.address}
        # Both ends of a connection open it at the same time.
        lanes: list[tuple[Remote, Role, Endpoint]] = [
            (self.prefill, "prefill", prefill),
            (self.decode, "decode", decode),
        ]
        for worker, role, endpoint in lanes:
            worker.post("link", routing.shards, routing.epoch)
            for shard in self.shards:
                shard.post("link", endpoint, role, routing.shards, routing.epoch)
            _answers([worker, *self.shards])
        self.prefill.post("send_to", decode.worker_id, 0)
        self.decode.post("receive_from", prefill, 0)
        _answers(workers)
        for worker in workers:
            worker.call("meet", peers)
            worker.call("start", routing)

    def probe(self, on: bool) -> None:
        """See `StepRecorder.probe`: only while no request is live."""
        for worker in (self.prefill, self.decode):
            worker.call("probe", on)

    def generate(self, requests: Sequence[PrefillRequest], timeout_s: float) -> list[list[float]]:
        """Send requests and wait until the last token of each. Raises: StartupError.

        Returns: when each token of each request came, on the monotonic clock.
        """
        came_s: dict[RequestId, list[float]] = {request.request_id: [] for request in requests}
        for request in requests:
            self._mailbox.send(WorkerId("prefill-0"), request)
        live, deadline_s = len(requests), time.monotonic() + timeout_s
        while live:
            left_s = deadline_s - time.monotonic()
            if left_s <= 0:
                raise StartupError(f"{live} of {len(requests)} requests were not done within {timeout_s} s")
            for message in self._mailbox.receive(left_s):
                assert isinstance(message, StepReport)
                for event in message.events:
                    if not isinstance(event, TokenEvent):
                        raise StartupError(f"a request did not run through: {event.reason}")
                    came_s[event.request_id].append(time.monotonic())
                    live -= event.finish_reason is not None
        return list(came_s.values())

    def close(self) -> None:
        # Attention workers say goodbye on their lanes before the shards go.
        for member in (self.prefill, self.decode, *self.shards):
            with contextlib.suppress(OctetError, OSError):
                member.call("stop")
            member.end()
        self._mailbox.close()


def _answers(members: Sequence[Remote]) -> None:
    for member in members:
        member.answer(_START_S)
