"""Times an attention worker and a shard from outside: functions of the product are wrapped in place, in one process.

A probe costs about a microsecond, and a step of the benchmark model passes some hundreds; the bench measures steps
with and without them, and prints what they cost.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import pkgutil
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from model.batch import Span
from ops.bench.breakdown.records import Round, ShardCall, Step
from ops.bench.breakdown.stopwatch import Stopwatch
from router.exchange import Exchange, ExpertRows, Ticket
from router.plan import DispatchPlan, ShardPlan


@dataclasses.dataclass(frozen=True, slots=True)
class Probe:
    owner: str
    """A module, or `module:Class`."""
    attribute: str
    part: str


_ATTEND = ("model.compiled_layers:DecodePass", "attend", "attention_half")
_STAGE_PARTS = {"norm": "norm", "linear": "attention_linear", "cache": "attention", "attention": "attention"}
"""What a decode layer's first half is charged to, stage by stage: it is one compiled call."""

PROBES = (
    Probe("model.compiled_layers", "_by_rows", "attention_linear"),
    Probe("model.compiled_layers:WantedPass", "attend", "attention"),
    Probe("model.compiled_layers:PrefillPass", "_attend_to_pages", "attention"),
    Probe("model.compiled_layers:PrefillPass", "feed_forward", "mlp_linear"),
    Probe("model.compiled_layers:PrefillPass", "share", "mlp_linear"),
    Probe("model.compiled_layers:PrefillPass", "add_experts", "combine"),
    Probe(*_ATTEND),
    Probe("model.compiled_layers:DecodePass", "feed_forward", "mlp_linear"),
    Probe("model.compiled_layers:DecodePass", "share", "mlp_linear"),
    Probe("model.compiled_layers:DecodePass", "add_experts", "combine"),
    Probe("model.transformer:Transformer", "norm", "norm"),
    Probe("model.transformer", "swiglu", "mlp_linear"),
    Probe("model.transformer:Transformer", "logits", "head_linear"),
    Probe("model.transformer:Transformer", "forward", "forward"),
    Probe("model.runner", "build_batch", "batch"),
    Probe("router.gate", "linear", "gate_linear"),
    Probe("router.gate:Gate", "select", "gate"),
    Probe("router.plan:Planner", "plan", "plan"),
    Probe("router.plan:Planner", "route", "gate"),
    Probe("router.routed_experts:RoutedExperts", "dispatch", "dispatch"),
    Probe("router.link:Link", "send", "pack"),
    Probe("router.lane:LaneExchange", "_send_to_all", "pack"),
    Probe("router.link:Link", "_wait", "exchange_wait"),
    Probe("router.lane:LaneExchange", "_add_few", "exchange_wait"),
    Probe("router.lane:LaneExchange", "_wait_for", "exchange_wait"),
    Probe("router.lane:LaneExchange", "await_first", "exchange_wait"),
    Probe("router.routed_experts:RoutedExperts", "combine", "combine"),
    Probe("decode.engine", "sample", "sample"),
    Probe("prefill.engine", "sample", "sample"),
    Probe("octet.mailbox:Mailbox", "receive", "messages"),
    Probe("octet.mailbox:Mailbox", "send", "messages"),
)
"""Besides these, `StepRecorder` charges `engine`, `send` and `unpack`."""

_ENGINES = ("decode.engine:DecodeEngine", "prefill.engine:PrefillEngine")


class StepRecorder:
    """Records the steps of the attention worker of this process. Install it before the worker connects."""

    def __init__(self) -> None:
        self._stopwatch = Stopwatch()
        self._steps: list[Step] = []
        self._rounds: list[Round] = []
        self._spans: list[Span] = []
        self._processor_s = 0.0
        """Of this process, when the step under way began."""
        self._restore: list[Callable[[], None]] = []
        self._exchange: _RecordedExchange | None = None

    def install(self) -> None:
        """Record steps, forward passes and rounds from now on, without taking steps apart."""
        for engine in _ENGINES:
            _replace(engine, "step", self._begin_step)
        _replace("model.runner:ModelRunner", "run", self._note_run)
        _replace("cluster.workers.lanes:WireLanes", "exchange", self._record_exchange)

    def probe(self, on: bool) -> None:
        """Take steps apart, or no longer. Call it only while the worker is idle."""
        while self._restore:
            self._restore.pop()()
        if on:
            wrappers = [(p.owner, p.attribute, p.part) for p in PROBES]
            wrappers += [(engine, "step", "engine") for engine in _ENGINES]
            for owner, attribute, part in wrappers:
                wrap = functools.partial(self._stopwatch.wrap, part=part)
                self._restore.append(_replace(owner, attribute, wrap))
            owner, attribute, _ = _ATTEND
            self._restore.append(_replace(owner, attribute, self._divide_attention))
        assert self._exchange is not None, "the worker is connected"
        self._exchange.probe(self._stopwatch if on else None)

    def take(self) -> list[Step]:
        """The steps since the last call."""
        steps, self._steps = self._steps, []
        return steps

    def _divide_attention(self, attend: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(attend)
        def divided(decode: Any, *args: Any) -> None:
            attend(decode, *args)
            shares = [(_STAGE_PARTS[stage], seconds) for stage, seconds in decode.attended_s()]
            self._stopwatch.divide(_ATTEND[2], shares)

        return divided

    def _begin_step(self, step: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(step)
        def begun(*args: Any) -> Any:
            lap = self._stopwatch.lap()
            processor_s, self._processor_s = self._processor_s, time.process_time()
            spans, rounds = self._spans, tuple(self._rounds)
            self._spans, self._rounds = [], []
            if lap is not None and spans:
                self._steps.append(
                    Step(
                        lap=lap,
                        num_sequences=len(spans),
                        num_tokens=sum(span.stop - span.start for span in spans),
                        num_attended=sum(map(_attended, spans)),
                        rounds=rounds,
                        processor_s=self._processor_s - processor_s,
                    )
                )
            return step(*args)

        return begun

    def _note_run(self, run: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(run)
        def noted(runner: Any, spans: Sequence[Span]) -> Any:
            self._spans += spans
            return run(runner, spans)

        return noted

    def _record_exchange(self, make_exchange: Callable[..., Exchange]) -> Callable[..., Exchange]:
        @functools.wraps(make_exchange)
        def made(*args: Any) -> Exchange:
            self._exchange = _RecordedExchange(make_exchange(*args), lambda: self._rounds)
            return self._exchange

        return made


class _RecordedExchange:
    """An `Exchange` that notes its rounds."""

    def __init__(self, exchange: Exchange, rounds: Callable[[], list[Round]]) -> None:
        self._exchange, self._rounds = exchange, rounds
        self._open: collections.deque[tuple[int, float]] = collections.deque()
        self._wait_s = 0.0
        """Since when the first reply of the oldest round was awaited; 0 if it was not."""
        self.probe(None)

    def probe(self, stopwatch: Stopwatch | None) -> None:
        exchange = self._exchange
        self._send = stopwatch.wrap(exchange.send, "send") if stopwatch else exchange.send
        self._receive = stopwatch.wrap(exchange.receive, "unpack") if stopwatch else exchange.receive

    @property
    def num_shards(self) -> int:
        return self._exchange.num_shards

    @property
    def gives_way(self) -> bool:
        return self._exchange.gives_way

    @gives_way.setter
    def gives_way(self, gives_way: bool) -> None:
        self._exchange.gives_way = gives_way

    @property
    def crowded(self) -> bool:
        return self._exchange.crowded

    def await_first(self, ticket: Ticket) -> None:
        self._wait_s = time.perf_counter()
        self._exchange.await_first(ticket)

    def send(self, layer: int, x_TH: torch.Tensor, plan: DispatchPlan) -> Ticket:
        sent_s = time.perf_counter()
        ticket = self._send(layer, x_TH, plan)
        parts = (plan.of(shard) for shard in range(self._exchange.num_shards))
        self._open.append((sum(_bytes(x_TH, part) for part in parts if part is not None), sent_s))
        return ticket

    def receive(self, ticket: Ticket, y_TH: torch.Tensor) -> None:
        wait_s = self._wait_s or time.perf_counter()
        self._wait_s = 0.0
        self._receive(ticket, y_TH)
        num_bytes, sent_s = self._open.popleft()
        received_s = time.perf_counter()
        self._rounds().append(
            Round(layer=ticket.layer, num_bytes=num_bytes, sent_s=sent_s, wait_s=wait_s, received_s=received_s)
        )

    def settle(self) -> None:
        self._exchange.settle()

    def heartbeat(self) -> None:
        self._exchange.heartbeat()

    def close(self) -> None:
        self._exchange.close()


def _attended(span: Span) -> int:
    """Each token sees all before it and itself."""
    return (span.stop * (span.stop + 1) - span.start * (span.start + 1)) // 2


def _bytes(x_TH: torch.Tensor, part: ShardPlan) -> int:
    """There and back: the sums that return are as large as the rows."""
    return 2 * len(part.slots_UK) * x_TH[:1].nbytes + part.slots_UK.nbytes + part.weights_UK.nbytes


class CallRecorder:
    """Records the calls of the shard of this process."""

    def __init__(self) -> None:
        self._calls: list[tuple[int, torch.Tensor, float, float, float]] = []
        self._of_thread = threading.local()

    def install(self) -> None:
        _replace("experts.shard:ExpertShard", "serve", self._record)

    def take(self) -> list[ShardCall]:
        """The calls since the last call of this."""
        calls, self._calls = self._calls, []
        return list(_described(calls))

    def _record(self, serve: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        @functools.wraps(serve)
        def recorded(shard: Any, layer: int, rows: ExpertRows, *rest: Any) -> torch.Tensor:
            if not hasattr(self._of_thread, "processor_s"):
                self._of_thread.processor_s = time.thread_time()
            start_s = time.perf_counter()
            y_UH = serve(shard, layer, rows, *rest)
            stop_s = time.perf_counter()
            # A lane has a thread of its own: since its last call it has replied, waited, and received this one.
            processor_s = time.thread_time()
            took_s = processor_s - self._of_thread.processor_s
            self._of_thread.processor_s = processor_s
            # A copy: the frame is a buffer that the next one overwrites. What it says is worked out later.
            self._calls.append((layer, rows.slots_UK.clone(), start_s, stop_s, took_s))
            return y_UH

        return recorded


def _described(calls: Sequence[tuple[int, torch.Tensor, float, float, float]]) -> Iterator[ShardCall]:
    for layer, slots_UK, start_s, stop_s, processor_s in calls:
        asked = slots_UK[slots_UK >= 0]
        yield ShardCall(
            layer=layer,
            num_rows=len(slots_UK),
            num_pairs=len(asked),
            num_experts=len(asked.unique()),
            start_s=start_s,
            stop_s=stop_s,
            processor_s=processor_s,
        )


def _replace(owner_name: str, attribute: str, wrap: Callable[[Any], Any]) -> Callable[[], None]:
    """Put `wrap(what is there)` in its place. Returns: a function that puts it back."""
    owner = pkgutil.resolve_name(owner_name)
    original = getattr(owner, attribute)
    setattr(owner, attribute, wrap(original))
    return functools.partial(setattr, owner, attribute, original)
