"""A prefill or decode worker as a process: mailbox, model, lanes, KV channels, and the loop that steps the engine.

Plain classes; `cluster.workers.pool_actors` puts them on Ray.
"""

from __future__ import annotations

import dataclasses
import os
import pathlib
import time
from collections.abc import Callable, Mapping, Sequence

import torch

from cluster.members import Endpoint, MemberStatus, Role
from cluster.plan import ServingPlan
from cluster.workers.engine_loop import Engine, EngineLoop
from cluster.workers.lanes import lane_builder, serving_dtype
from cluster.workers.process import resident_bytes
from cluster.workers.stores import Stores
from decode.engine import DecodeEngine
from decode.handoff import KvReceiver
from decode.migration import Migration
from decode.speculation import MtpDrafter, Speculator
from decode.step_graphs import step_graphs
from model.checkpoint import Checkpoint
from model.host_memory import keep_freed_memory
from model.kv_cache import KvCache
from model.linear import packs
from model.load_progress import LoadProgress, LoadSnapshot
from model.mtp import MtpHead
from model.norm import warm_up
from model.pages import PagePool
from model.runner import ModelRunner
from model.threads import set_num_threads
from model.transformer import Transformer
from model.weights import AttentionWeights, MtpWeights, gates_of, load_attention_weights, load_mtp_weights
from octet.counters import StepCounters
from octet.faults import reach
from octet.ids import Epoch, WorkerId
from octet.mailbox import Mailbox
from octet.messages import KvPull
from octet.pulse import Pulse
from prefill.engine import PrefillEngine
from router.channel import KvChannel, WireChannel
from router.group_store import GroupStore
from router.handshake import GUEST_SIDE, HOST_SIDE
from router.kv_sender import KvSender
from router.leases import LeaseTable
from router.plan import Planner
from router.routed_experts import RoutedExperts
from router.routing import Routing
from router.telemetry_samples import WorkerSample
from router.wire import Wire


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _Parts:
    """What there is once the weights are loaded."""

    engine: Engine
    routed: RoutedExperts
    loop: EngineLoop
    sender: KvSender
    receiver: KvReceiver | None


class AttentionWorker:
    """Called in this order: `endpoint`, `load`, `link` (and `send_to`, `receive_from`), `start`; `stop` at the end.

    While it serves, `link` and `adopt` take it from one state of the expert pool to the next, and peers come and go.
    """

    def __init__(
        self, worker_id: WorkerId, role: Role, plan: ServingPlan, host: str, node_id: str, report: Callable[[str], None]
    ) -> None:
        """
        Args:
            report: told when the lane has broken, and why; returns at once.
        """
        self._worker_id, self._role, self._plan, self._host, self._node_id = worker_id, role, plan, host, node_id
        self._report = report
        self._device = torch.device(plan.device)
        self._dtype = serving_dtype(plan)
        keep_freed_memory()
        set_num_threads(plan.threads[role], own=packs(self._dtype, self._device))
        self._mailbox = Mailbox(host, plan.secret)
        self._hosts: dict[WorkerId, str] = {}
        self._pulse = Pulse(host)
        self._store = GroupStore.host(host, plan.config.lane.connect_s, plan.secret)
        self._lanes = lane_builder(worker_id, role, plan, self._store, host)
        self._peer_stores = Stores(plan.config.lane.connect_s, plan.secret)
        self._progress = LoadProgress(time.monotonic())
        self._state = "STARTING"
        self._parts: _Parts | None = None
        self._incarnation, self._serving_since_s = time.time_ns(), 0.0

    def endpoint(self) -> Endpoint:
        return Endpoint(
            worker_id=self._worker_id,
            mailbox=self._mailbox.address,
            store=self._store.address,
            node_id=self._node_id,
            pid=os.getpid(),
            pulse=self._pulse.address,
        )

    def progress(self) -> LoadSnapshot:
        return self._progress.snapshot(time.monotonic())

    def load(self) -> None:
        """Read this worker's tensors. Raises: CheckpointError."""
        self._state = "LOADING"
        checkpoint = Checkpoint.open(pathlib.Path(self._plan.model_dir))
        weights = load_attention_weights(checkpoint, self._dtype, self._device, self._progress)
        mtp = None
        if self._plan.config.speculation.num_draft_layers:
            mtp = load_mtp_weights(checkpoint, self._dtype, self._device, self._progress)
        warm_up(self._device)
        # Compiles, if nobody has before, for longer than `start` and `adopt`, which build planners, may take.
        Planner(self._plan.routing.placement, self._device)
        self._parts = self._build(weights, mtp)

    def meet(self, peers: Mapping[WorkerId, str]) -> None:
        """Be able to write to these mailboxes."""
        self._hosts.update((peer, _host(address)) for peer, address in peers.items())
        self._mailbox.connect(dict(peers))

    def link(self, shards: Sequence[WorkerId], epoch: Epoch) -> None:
        """Connect to shards, each of which joins at the same time. The lane in use is not touched.

        Raises: LaneTimeoutError.
        """
        reach("link")
        self._lanes.link(shards, epoch)

    def send_to(self, peer: WorkerId, attempt: int) -> None:
        """Open a channel on which KV pages go to a decode worker, which calls `receive_from` at the same time.

        It takes the place of an earlier one.

        Args:
            attempt: the same at both ends, and another one each time.

        Raises: LaneTimeoutError.
        """
        sender = self._built.sender
        channel = self._channel(self._store, self._worker_id, peer, attempt, HOST_SIDE)
        sender.connect(peer, channel, attempt)

    def receive_from(self, peer: Endpoint, attempt: int) -> None:
        """The other end of `send_to`. Raises: LaneTimeoutError."""
        receiver = self._built.receiver
        assert receiver is not None
        store = self._peer_stores.of(peer)
        channel = self._channel(store, peer.worker_id, self._worker_id, attempt, GUEST_SIDE)
        receiver.connect(peer.worker_id, channel, attempt)

    def forget(self, peers: Sequence[WorkerId]) -> None:
        """These workers are gone: close what joins us. Idempotent."""
        for peer in peers:
            self._built.sender.disconnect(peer)
            if self._built.receiver is not None:
                self._built.receiver.disconnect(peer)
            self._hosts.pop(peer, None)
        self._mailbox.disconnect(peers)
        self._peer_stores.forget(peers)

    def give_up(self, shards: Sequence[WorkerId]) -> None:
        """These shards are lost, and nobody may have heard of it: break what leads to them, so that no step waits."""
        self._lanes.give_up(shards)

    def hand_over_to(self, heirs: Sequence[WorkerId]) -> None:
        """Of a decode worker: give every sequence to one of these, to all of which there is a channel."""
        engine = self._built.engine
        assert isinstance(engine, DecodeEngine)
        engine.hand_over_to(heirs)
        self._mailbox.wake()

    def start(self, routing: Routing) -> None:
        """Serve by this routing, all of whose shards are linked, from now on."""
        planner = Planner(routing.asked, self._device)
        self._serving_since_s = time.perf_counter()
        self._built.loop.start(planner, self._lanes.exchange(routing.shards))

    def adopt(self, routing: Routing) -> None:
        """Route by this from the next step on; returns when it is so. All its shards are linked.

        Raises: LaneTimeoutError if the step under way does not end in time.
        """
        reach("adopt")
        planner = Planner(routing.asked, self._device)
        self._built.loop.adopt(planner, self._lanes.exchange(routing.shards))
        self._lanes.unlink(others_than=routing.shards)

    def status(self) -> MemberStatus:
        parts = self._parts
        return MemberStatus(
            worker_id=self._worker_id,
            node_id=self._node_id,
            pid=os.getpid(),
            resident_bytes=resident_bytes(),
            state=parts.loop.state if parts is not None else self._state,
            load=parts.engine.load() if parts is not None else None,
            reason=parts.loop.reason if parts is not None else "",
            severed=self._severed(parts) if parts is not None else (),
            refused=self._mailbox.num_refused + self._store.num_refused,
            dropped=self._mailbox.drops.num,
        )

    def telemetry(self) -> WorkerSample | None:
        """What was counted so far; None before it serves."""
        parts = self._parts
        if parts is None or parts.loop.state == "CONNECTING":
            return None
        load = parts.engine.load()
        return WorkerSample(
            worker_id=self._worker_id,
            incarnation=self._incarnation,
            uptime_s=time.perf_counter() - self._serving_since_s,
            role=self._role,
            steps=StepCounters(
                steps=parts.loop.num_steps,
                step_s=parts.loop.step_s,
                combine_s=parts.routed.combine_s,
                tokens=load.tokens,
            ),
            load=load,
        )

    def stop(self, timeout_s: float = 5.0) -> None:
        """End the loop and close every connection. Idempotent."""
        self._pulse.close()
        if (parts := self._parts) is None:
            return
        self._parts, self._state = None, "STOPPED"
        parts.loop.stop(timeout_s)
        self._lanes.unlink(others_than=())
        parts.sender.close()
        if parts.receiver is not None:
            parts.receiver.close()

    @property
    def _built(self) -> _Parts:
        assert self._parts is not None, "load comes first"
        return self._parts

    @staticmethod
    def _severed(parts: _Parts) -> tuple[WorkerId, ...]:
        return (*parts.sender.severed, *(parts.receiver.severed if parts.receiver is not None else ()))

    def _channel(self, store: GroupStore, source: WorkerId, target: WorkerId, attempt: int, rank: int) -> KvChannel:
        """The source hosts the store."""
        config, epoch = self._plan.config, self._plan.routing.epoch
        name, transfer_s = f"kv/{source}/{target}/{attempt}", config.handoff.timeout_s
        return WireChannel(Wire.join(store, name, rank, self._host, config.lane.connect_s, transfer_s), epoch)

    def _build(self, weights: AttentionWeights, mtp: MtpWeights | None) -> _Parts:
        plan = self._plan
        speculation, page_size = plan.config.speculation, plan.config.kv.page_size
        num_pages = plan.prefill_pages if self._role == "prefill" else plan.decode_pages
        cache = KvCache(plan.model, num_pages, page_size, self._dtype, self._device, speculation.num_draft_layers)
        transformer = Transformer(plan.model, weights, cache, plan.max_model_len)
        routed = RoutedExperts(plan.model, gates_of(weights, mtp), self._competes)
        pages, graphs = PagePool(num_pages, page_size), None
        if self._role == "decode":
            graphs = step_graphs(transformer, routed, pages, cache, plan.config.decode, speculation, plan.max_model_len)
        runner = ModelRunner(
            transformer,
            routed,
            pages,
            cache,
            self._device,
            plan.config.lane.ping_pong_rows,
            MtpHead(transformer, mtp, plan.model.num_hidden_layers) if mtp is not None else None,
            graphs,
            takes_turns=lambda: not routed.crowded,
        )
        pool = plan.config.pools.prefill
        leases, receiver = LeaseTable(plan.config.handoff.lease_s), None
        sender = KvSender(cache, leases, {})
        engine: Engine
        if self._role == "prefill":
            engine = PrefillEngine(
                self._worker_id,
                plan.routing.epoch,
                runner,
                leases,
                sender,
                plan.config.prefill,
                self._is_beside,
                few_requests=pool.few_prompts if pool.niceness else 0,
            )
        else:
            receiver = KvReceiver(self._worker_id, cache, {}, self._ask, self._mailbox.wake)
            speculator = Speculator(MtpDrafter(runner), speculation) if mtp is not None else None
            engine = DecodeEngine(
                self._worker_id,
                plan.routing.epoch,
                runner,
                receiver,
                plan.config.decode,
                speculator,
                Migration(self._worker_id, leases, sender),
            )
        loop = EngineLoop(
            self._worker_id,
            engine,
            routed,
            self._mailbox,
            plan.config.lane,
            self._report,
            niceness=pool.niceness if self._role == "prefill" else 0,
            gather_s=plan.config.prefill.gather_s if self._role == "prefill" else 0.0,
        )
        if self._role == "prefill":
            runner.between_layers = loop.hear
        return _Parts(engine=engine, routed=routed, loop=loop, sender=sender, receiver=receiver)

    def _is_beside(self, peer: WorkerId) -> bool:
        return self._device.type == "cpu" and self._hosts.get(peer) == _host(self._mailbox.address)

    def _competes(self) -> bool:
        """Whether several decode workers compute on these cores: they would take those that a prefill worker leaves,
        and a prompt beside them waits for cores thrice as long if only one of its frames is ever under way."""
        return self._parts is not None and sum(map(self._is_beside, self._parts.sender.peers)) > 1

    def _ask(self, to: WorkerId, pull: KvPull) -> None:
        self._mailbox.send(to, pull)


def _host(address: str) -> str:
    """Of a mailbox."""
    return address.rpartition(":")[0]
