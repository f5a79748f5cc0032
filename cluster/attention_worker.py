"""A prefill or decode worker as a process: mailbox, model, lane, channels, and the thread that steps the engine.

Plain classes; `cluster.actors` puts them on Ray.
"""

from __future__ import annotations

import contextlib
import logging
import os
import pathlib
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Protocol

import torch

from cluster.lanes import open_exchange, serving_dtype
from cluster.members import Endpoint, MemberStatus, Role
from cluster.plan import ServingPlan
from cluster.process import resident_bytes
from decode.engine import DecodeEngine
from decode.handoff import KvReceiver
from decode.speculation import MtpDrafter, Speculator
from model.checkpoint import Checkpoint, LoadProgress, LoadSnapshot
from model.kv_cache import KvCache
from model.mtp import MtpHead
from model.norm import warm_up
from model.pages import PagePool
from model.runner import ModelRunner
from model.transformer import Transformer
from model.weights import AttentionWeights, MtpWeights, gates_of, load_attention_weights, load_mtp_weights
from octet.counters import StepCounters
from octet.errors import LaneError, UnavailableError
from octet.ids import WorkerId
from octet.mailbox import Mailbox
from octet.messages import KvPull, Message, WorkerLoad
from prefill.engine import PrefillEngine
from prefill.handoff import KvSender
from prefill.leases import LeaseTable
from router.channel import GroupChannel, KvChannel
from router.exchange import Exchange
from router.group import Group, GroupStore
from router.routed_experts import RoutedExperts
from router.telemetry_samples import WorkerSample

_log = logging.getLogger(__name__)

_IDLE_WAIT_S = 0.2
"""How long an idle loop sleeps at most; a message wakes it at once."""


class Engine(Protocol):
    """What the loop drives: `PrefillEngine` or `DecodeEngine`."""

    @property
    def busy(self) -> bool: ...
    def handle(self, message: Message) -> None: ...
    def step(self, now_s: float) -> list[tuple[WorkerId, Message]]: ...
    def fail_all(self, reason: str, retryable: bool = False) -> None: ...
    def flush(self) -> list[tuple[WorkerId, Message]]: ...
    def load(self) -> WorkerLoad: ...


class AttentionWorker:
    """Called in this order: `endpoint`, `load`, `connect`, `start`; `status`, `telemetry` and `progress` at any time;
    `stop`."""

    def __init__(self, worker_id: WorkerId, role: Role, plan: ServingPlan, host: str, node_id: str) -> None:
        torch.set_num_threads(plan.threads[role])
        self._worker_id, self._role, self._plan, self._host, self._node_id = worker_id, role, plan, host, node_id
        self._device = torch.device(plan.device)
        self._dtype = serving_dtype(plan)
        self._mailbox = Mailbox(host)
        self._store = GroupStore.host(host, plan.config.ray.start_timeout_s)
        self._progress = LoadProgress(time.monotonic())
        self._state, self._reason = "STARTING", ""
        self._stopping = threading.Event()
        self._closing: list[
            contextlib.closing[Exchange] | contextlib.closing[KvSender] | contextlib.closing[KvReceiver]
        ]
        self._closing = []
        self._weights: AttentionWeights | None = None
        self._mtp_weights: MtpWeights | None = None
        self._engine: Engine | None = None
        self._exchange: Exchange | None = None
        self._routed: RoutedExperts | None = None
        self._thread: threading.Thread | None = None
        self._incarnation, self._serving_since_s = time.time_ns(), 0.0
        self._num_steps, self._step_s = 0, 0.0

    def endpoint(self) -> Endpoint:
        return Endpoint(worker_id=self._worker_id, mailbox=self._mailbox.address, store=self._store.address)

    def progress(self) -> LoadSnapshot:
        return self._progress.snapshot(time.monotonic())

    def load(self) -> None:
        """Read this worker's tensors. Raises: CheckpointError."""
        self._state = "LOADING"
        checkpoint = Checkpoint.open(pathlib.Path(self._plan.model_dir))
        self._weights = load_attention_weights(checkpoint, self._dtype, self._device, self._progress)
        if self._plan.config.speculation.num_draft_layers:
            self._mtp_weights = load_mtp_weights(checkpoint, self._dtype, self._device, self._progress)
        warm_up(self._device)

    def connect(self, peers: Mapping[WorkerId, str], channels: Sequence[Endpoint]) -> None:
        """Form this worker's lane and its KV channels; every other member does so at the same time.

        Args:
            peers: mailbox addresses.
            channels: the members of the other attention pool, in the order that every member uses.

        Raises: LaneTimeoutError.
        """
        self._mailbox.connect(dict(peers))
        self._exchange = open_exchange(self._worker_id, self._role, self._plan, self._store, self._host)
        kv_channels = {peer.worker_id: self._channel(peer) for peer in channels}
        self._engine = self._build_engine(self._exchange, kv_channels)

    def start(self) -> None:
        self._serving_since_s = time.perf_counter()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()
        self._state = "READY"

    def status(self) -> MemberStatus:
        return MemberStatus(
            worker_id=self._worker_id,
            node_id=self._node_id,
            pid=os.getpid(),
            resident_bytes=resident_bytes(),
            state=self._state,
            load=self._engine.load() if self._engine is not None else None,
            reason=self._reason,
        )

    def telemetry(self) -> WorkerSample | None:
        """What was counted so far; None before it serves."""
        if self._state != "READY" or self._engine is None or self._routed is None:
            return None
        load = self._engine.load()
        return WorkerSample(
            worker_id=self._worker_id,
            incarnation=self._incarnation,
            uptime_s=time.perf_counter() - self._serving_since_s,
            role=self._role,
            steps=StepCounters(
                steps=self._num_steps, step_s=self._step_s, combine_s=self._routed.combine_s, tokens=load.tokens
            ),
            load=load,
        )

    def stop(self, timeout_s: float = 5.0) -> None:
        """End the loop and close every connection. Idempotent."""
        self._stopping.set()
        if self._thread is not None:
            self._mailbox.wake()
            self._thread.join(timeout_s)
        for part in self._closing:
            part.__exit__(None, None, None)
        self._closing.clear()

    def _channel(self, peer: Endpoint) -> KvChannel:
        """The prefill worker of a pair hosts the store and is rank 0."""
        plan, timeout_s = self._plan, self._plan.config.ray.start_timeout_s
        prefill, decode = (
            (self._worker_id, peer.worker_id) if self._role == "prefill" else (peer.worker_id, self._worker_id)
        )
        store = self._store if self._role == "prefill" else GroupStore.join(peer.store, timeout_s)
        rank = 0 if self._role == "prefill" else 1
        name = f"kv/{prefill}/{decode}/{plan.epoch}"
        transfer_s = plan.config.handoff.timeout_s
        return GroupChannel(Group(store, name, rank, 2, self._host, timeout_s, transfer_s), plan.epoch, transfer_s)

    def _build_engine(self, exchange: Exchange, channels: Mapping[WorkerId, KvChannel]) -> Engine:
        assert self._weights is not None, "load comes before connect"
        plan, weights, mtp = self._plan, self._weights, self._mtp_weights
        speculation, page_size = plan.config.speculation, plan.config.kv.page_size
        num_pages = plan.prefill_pages if self._role == "prefill" else plan.decode_pages
        cache = KvCache(plan.model, num_pages, page_size, self._dtype, self._device, speculation.num_draft_layers)
        transformer = Transformer(plan.model, weights, cache, plan.max_model_len)
        self._routed = RoutedExperts(plan.model, gates_of(weights, mtp), plan.placement, exchange, self._device)
        runner = ModelRunner(
            transformer,
            self._routed,
            PagePool(num_pages, page_size),
            cache,
            self._device,
            plan.config.lane.ping_pong_rows,
            MtpHead(transformer, mtp, plan.model.num_hidden_layers) if mtp is not None else None,
        )
        self._closing.append(contextlib.closing(exchange))
        if self._role == "prefill":
            leases = LeaseTable(plan.config.handoff.lease_s)
            sender = KvSender(cache, leases, channels)
            self._closing.append(contextlib.closing(sender))
            return PrefillEngine(self._worker_id, plan.epoch, runner, leases, sender, plan.config.prefill)
        receiver = KvReceiver(self._worker_id, cache, channels, self._ask, self._mailbox.wake)
        self._closing.append(contextlib.closing(receiver))
        speculator = Speculator(MtpDrafter(runner), speculation) if mtp is not None else None
        return DecodeEngine(self._worker_id, plan.epoch, runner, receiver, plan.config.decode, speculator)

    def _ask(self, to: WorkerId, pull: KvPull) -> None:
        self._mailbox.send(to, pull)

    def _run(self) -> None:
        """Receive, step, send, until stopped. A broken lane ends every request here, and the loop."""
        assert self._engine is not None
        engine, last_step_s = self._engine, time.monotonic()
        try:
            while not self._stopping.is_set():
                for message in self._mailbox.receive(0.0 if engine.busy else _IDLE_WAIT_S):
                    engine.handle(message)
                last_step_s = self._keep_lane(engine, last_step_s)
                self._send(self._step(engine))
        except Exception as error:
            expected = isinstance(error, LaneError)
            _log.log(
                logging.WARNING if expected else logging.ERROR,
                "%s ends: %s",
                self._worker_id,
                error,
                exc_info=not expected,
            )
            self._state, self._reason = "FAILED", f"{type(error).__name__}: {error}"
            engine.fail_all(f"{self._worker_id} failed: {self._reason}", retryable=True)
            self._send(engine.flush())
            self._refuse_until_stopped(engine)

    def _step(self, engine: Engine) -> list[tuple[WorkerId, Message]]:
        """One step, timed if there is anything to compute."""
        if not engine.busy:
            return engine.step(time.monotonic())
        begun_s = time.perf_counter()
        outgoing = engine.step(time.monotonic())
        self._step_s += time.perf_counter() - begun_s
        self._num_steps += 1
        return outgoing

    def _keep_lane(self, engine: Engine, last_step_s: float) -> float:
        """A lane that carries no step carries heartbeats."""
        now_s = time.monotonic()
        if engine.busy:
            return now_s
        if now_s - last_step_s >= self._plan.config.lane.heartbeat_s:
            assert self._exchange is not None
            self._exchange.heartbeat()
            return now_s
        return last_step_s

    def _refuse_until_stopped(self, engine: Engine) -> None:
        """A failed worker answers what still comes, so that nobody waits for it."""
        while not self._stopping.is_set():
            for message in self._mailbox.receive(_IDLE_WAIT_S):
                engine.handle(message)
            engine.fail_all(f"{self._worker_id} failed: {self._reason}", retryable=True)
            self._send(engine.flush())

    def _send(self, outgoing: Sequence[tuple[WorkerId, Message]]) -> None:
        for to, message in outgoing:
            try:
                self._mailbox.send(to, message)
            except UnavailableError as error:
                _log.warning("a %s is lost: %s", type(message).__name__, error)
