"""The whole data path in one process: the same engines, shards and router, without Ray and sockets.

It is the reference that numerics tests use beside `transformers`, and the engine that benchmarks compare the cluster
with.
"""

from __future__ import annotations

import itertools
import pathlib
import threading
import time
from collections.abc import Sequence

import torch

from cluster.frontend.journal import Journal
from decode.engine import DecodeEngine
from decode.handoff import KvReceiver
from decode.speculation import MtpDrafter, Speculator
from decode.step_graphs import step_graphs
from experts.shard import ExpertShard
from experts.slots import ExpertSlots
from model.checkpoint import Checkpoint
from model.kv_cache import KvCache
from model.mtp import MtpHead
from model.pages import PagePool
from model.runner import ModelRunner
from model.transformer import Transformer
from model.weights import AttentionWeights, MtpWeights, gates_of, load_attention_weights, load_mtp_weights
from octet.config import DecodeConfig, PrefillConfig, SpeculationConfig
from octet.ids import Epoch, RequestId, WorkerId
from octet.messages import (
    Evicted,
    Failed,
    KvPull,
    Message,
    PrefillRequest,
    StepReport,
    TokenEvent,
    WorkerLoad,
    pack_ids,
)
from octet.request import Output, Sampling, Stopping
from prefill.engine import PrefillEngine
from router.channel import LocalChannel
from router.exchange import LocalExchange
from router.kv_sender import KvSender
from router.leases import LeaseTable
from router.placement import Placement, place_evenly
from router.plan import Planner
from router.routed_experts import RoutedExperts

PREFILL, DECODE, CALLER = WorkerId("prefill-0"), WorkerId("decode-0"), WorkerId("frontend-0")
_EPOCH = Epoch(1)
_TRANSFER_S = 30.0
_numbers = itertools.count()


class LocalEngine:
    """One prefill engine, one decode engine, `num_shards` shards. Belongs to one thread."""

    def __init__(
        self,
        model_dir: pathlib.Path,
        *,
        num_shards: int = 1,
        num_pages: int = 512,
        page_size: int = 16,
        decode_pages: int | None = None,
        max_model_len: int | None = None,
        prefill: PrefillConfig | None = None,
        decode: DecodeConfig | None = None,
        speculation: SpeculationConfig | None = None,
        ping_pong_rows: int | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | None = None,
    ) -> None:
        device = device or torch.device("cpu")
        speculation = speculation or SpeculationConfig()
        self._num_draft_layers = speculation.num_draft_layers
        self.checkpoint = checkpoint = Checkpoint.open(model_dir)
        self.config = checkpoint.config
        self._max_model_len = max_model_len or min(self.config.max_position_embeddings, num_pages * page_size)
        self._build = (dtype, device, page_size, ping_pong_rows)
        weights = load_attention_weights(checkpoint, dtype, device)
        mtp = load_mtp_weights(checkpoint, dtype, device) if self._num_draft_layers else None
        placement = place_evenly(
            self.config.expert_layers(self._num_draft_layers), self.config.n_routed_experts, num_shards
        )
        self.shards = [ExpertShard(load_slots(checkpoint, placement, s, dtype, device)) for s in range(num_shards)]
        exchange = LocalExchange([shard.serve for shard in self.shards])
        self._routed = RoutedExperts(self.config, gates_of(weights, mtp))
        self._routed.adopt(Planner(placement, device), exchange)
        self.runner = self._runner(weights, mtp, num_pages, None)
        channel = LocalChannel(_TRANSFER_S)
        leases = LeaseTable(lease_s=60.0)
        self._sender = KvSender(self.runner.cache, leases, {DECODE: channel})
        self._prefill = PrefillEngine(PREFILL, _EPOCH, self.runner, leases, self._sender, prefill or PrefillConfig())
        self._landed = threading.Event()
        decode = decode or DecodeConfig()
        decode_runner = self._runner(weights, mtp, decode_pages or num_pages, (decode, speculation))
        self._receiver = KvReceiver(DECODE, decode_runner.cache, {PREFILL: channel}, self._ask, self._landed.set)
        speculator = Speculator(MtpDrafter(decode_runner), speculation) if mtp is not None else None
        self._decode = DecodeEngine(DECODE, _EPOCH, decode_runner, self._receiver, decode, speculator)
        self._journals: dict[RequestId, Journal] = {}
        self._failures: dict[RequestId, str] = {}

    def generate(self, requests: Sequence[PrefillRequest], timeout_s: float = 300.0) -> list[list[list[int]]]:
        """The token ids of every choice of every request.

        Raises: RuntimeError if a request failed, TimeoutError.
        """
        journals = [self.submit(request) for request in requests]
        deadline_s = time.monotonic() + timeout_s
        while not all(journal.ended for journal in journals):
            if time.monotonic() > deadline_s:
                raise TimeoutError(f"requests were not done within {timeout_s} s")
            self.step()
            for request in requests:
                if request.request_id in self._failures:
                    raise RuntimeError(self._failures.pop(request.request_id))
        return [
            [journal.token_ids(c) for c in request.choices] for journal, request in zip(journals, requests, strict=True)
        ]

    def submit(self, request: PrefillRequest) -> Journal:
        journal = Journal(request)
        self._journals[request.request_id] = journal
        self._prefill.handle(request)
        return journal

    def step(self) -> list[TokenEvent]:
        """One step of both engines; the tokens that were committed. Waits for pages if there is nothing else to do."""
        if not self._prefill.busy and not self._decode.busy:
            self._landed.wait(timeout=0.01)
        self._landed.clear()
        committed: list[TokenEvent] = []
        for engine in (self._prefill, self._decode):
            for to, message in engine.step(time.monotonic()):
                self._deliver(to, message, committed)
        return committed

    def load(self) -> dict[WorkerId, WorkerLoad]:
        """The load of both engines: pages, queues, preemptions."""
        return {PREFILL: self._prefill.load(), DECODE: self._decode.load()}

    def close(self) -> None:
        self._receiver.close()
        self._sender.close()

    def _runner(
        self,
        weights: AttentionWeights,
        mtp: MtpWeights | None,
        num_pages: int,
        decode: tuple[DecodeConfig, SpeculationConfig] | None,
    ) -> ModelRunner:
        dtype, device, page_size, ping_pong_rows = self._build
        cache = KvCache(self.config, num_pages, page_size, dtype, device, self._num_draft_layers)
        transformer = Transformer(self.config, weights, cache, self._max_model_len)
        head = MtpHead(transformer, mtp, self.config.num_hidden_layers) if mtp is not None else None
        pool = PagePool(num_pages, page_size)
        graphs = None
        if decode is not None:
            graphs = step_graphs(transformer, self._routed, pool, cache, *decode, self._max_model_len)
        return ModelRunner(transformer, self._routed, pool, cache, device, ping_pong_rows, head, graphs)

    def _ask(self, to: WorkerId, pull: KvPull) -> None:
        assert to == PREFILL
        self._sender.answer(pull)

    def _deliver(self, to: WorkerId, message: Message, committed: list[TokenEvent]) -> None:
        if to == PREFILL:
            self._prefill.handle(message)
        elif to == DECODE:
            self._decode.handle(message)
        else:
            assert isinstance(message, StepReport)
            for event in message.events:
                self._commit(event, committed)

    def _commit(self, event: TokenEvent | Evicted | Failed, committed: list[TokenEvent]) -> None:
        journal = self._journals[event.request_id]
        match event:
            case TokenEvent():
                if journal.commit(event):
                    committed.append(event)
                    if event.finish_reason is not None:
                        journal.end(event.choice)
            case Evicted():
                again = journal.restart(event)
                if again is not None:
                    self._prefill.handle(again)
            case Failed(reason=reason):
                self._failures[event.request_id] = reason


def make_request(
    prompt: Sequence[int],
    *,
    max_new_tokens: int,
    choices: tuple[int, ...] = (0,),
    sampling: Sampling | None = None,
    stop_token_ids: tuple[int, ...] = (),
) -> PrefillRequest:
    """A request to a `LocalEngine`, later than all before it."""
    number = next(_numbers)
    return PrefillRequest(
        request_id=RequestId(f"request-{number}"),
        attempt=0,
        choices=choices,
        token_ids=pack_ids(prompt),
        num_prompt_tokens=len(prompt),
        sampling=sampling or Sampling(),
        stopping=Stopping(max_new_tokens=max_new_tokens, stop_token_ids=stop_token_ids),
        output=Output(),
        priority=0,
        arrival_s=float(number),
        decode_worker=DECODE,
        frontend=CALLER,
    )


def load_slots(
    checkpoint: Checkpoint, placement: Placement, shard: int, dtype: torch.dtype, device: torch.device
) -> ExpertSlots:
    """The slots that a placement gives to one shard."""
    held = {layer: row.tolist() for layer, row in zip(placement.layers, placement.held_by(shard), strict=True)}
    return ExpertSlots(checkpoint, held, dtype, device)
