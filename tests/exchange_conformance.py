"""What every `router.exchange.Exchange` and `Port` does, whatever carries the rows.

An implementation is held to the contract by a subclass of `ExchangeConformance` whose `implementation` opens its lanes;
`tests/unit/router/test_exchange.py` does so for `LocalExchange` and wires, `test_nccl_lane.py` for NCCL lanes.
Everything that a shard is given to run is picklable, so that an implementation may put its shards into processes of
their own.

Shapes: `U` rows sent to one shard, `H` hidden, `K` experts per token.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import threading
import time
import uuid
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from typing import ClassVar, NoReturn, Protocol

import pytest
import torch

from model import threads
from octet.errors import (
    ExpertMissingError,
    LaneError,
    LaneTimeoutError,
    PeerLostError,
    RequestLimitError,
    WrongEpochError,
)
from octet.ids import Epoch
from octet.secret import ClusterSecret
from router.exchange import Call, Exchange, ExpertRows, LocalExchange, Port, Serve, Ticket, rows_of
from router.frames import FrameLayout
from router.group_store import GroupStore
from router.lane import SHARD, LaneExchange, LanePort
from router.link import Link, shared_bytes
from router.plan import DensePlan, PlanByShard, ShardPlan
from router.wire import Wire

HOST = "127.0.0.1"
SECRET = ClusterSecret(bytes(range(32)))
"""Of both ends, which may be processes of their own."""
EPOCH = Epoch(7)
CONNECT_S = 20.0
PATIENT_S = 20.0
"""A deadline that no test means to reach."""
SHORT_S = 0.5
"""A deadline that a test waits for."""
MARGIN_S = 5.0
"""What a loaded machine may add to a deadline."""

_random = torch.Generator()
_random.seed()


def layout_of(dtype: torch.dtype = torch.float32, max_rows: int = 32) -> FrameLayout:
    return FrameLayout(hidden_size=64, experts_per_token=4, max_rows=max_rows, dtype=dtype)


def random_rows(num_rows: int, layout: FrameLayout, device: torch.device | None = None) -> ExpertRows:
    shape_UK = (num_rows, layout.experts_per_token)
    x_UH = torch.randn(num_rows, layout.hidden_size, generator=_random).to(layout.dtype)
    slots_UK = torch.randint(-1, 6, shape_UK, generator=_random, dtype=torch.int32)
    weights_UK = torch.rand(shape_UK, generator=_random)
    return ExpertRows(x_UH=x_UH.to(device), slots_UK=slots_UK.to(device), weights_UK=weights_UK.to(device))


@dataclasses.dataclass(frozen=True)
class Scale:
    """A shard whose answer depends on everything that it is sent, and on which shard it is."""

    shard: int

    def __call__(self, layer: int, rows: ExpertRows) -> torch.Tensor:
        weights_U1 = (rows.weights_UK * (rows.slots_UK + 2)).sum(1, keepdim=True)
        return (rows.x_UH.float() * weights_U1 * (self.shard + 1) + layer).to(rows.x_UH.dtype)


@dataclasses.dataclass(frozen=True)
class Lacks:
    """A shard that holds no expert of one layer."""

    layer: int
    otherwise: Serve

    def __call__(self, layer: int, rows: ExpertRows) -> torch.Tensor:
        if layer == self.layer:
            raise ExpertMissingError(f"layer {layer}: no expert in slots [3]")
        return self.otherwise(layer, rows)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LaneSettings:
    num_shards: int = 2
    layout: FrameLayout = dataclasses.field(default_factory=layout_of)
    port_epoch: Epoch = EPOCH
    """The exchange's epoch is `EPOCH`."""
    reply_s: float = PATIENT_S
    """How long the exchange waits for a shard."""
    silence_s: float = PATIENT_S
    """How long a port waits for its attention worker."""


class ByShard:
    """An exchange as these tests speak to it: each shard's rows are tokens of their own, and so are its sums."""

    def __init__(self, exchange: Exchange) -> None:
        self.exchange = exchange

    @property
    def num_shards(self) -> int:
        return self.exchange.num_shards

    def send(self, layer: int, rows: Sequence[ExpertRows | None]) -> ByShardTicket:
        sent = [part for part in rows if part is not None]
        device = sent[0].x_UH.device if sent else torch.device("cpu")
        tokens = torch.arange(sum(len(part.x_UH) for part in sent), device=device).split([len(p.x_UH) for p in sent])
        own = iter(tokens)
        plan = PlanByShard(
            tuple(
                None
                if part is None
                else ShardPlan(rows_U=next(own), slots_UK=part.slots_UK, weights_UK=part.weights_UK)
                for part in rows
            )
        )
        x_TH = torch.cat([part.x_UH for part in sent]) if sent else torch.empty(0, 64)
        return ByShardTicket(self.exchange.send(layer, x_TH, plan), x_TH, plan, len(rows))

    def receive(self, ticket: ByShardTicket) -> list[torch.Tensor | None]:
        y_TH = torch.zeros(ticket.x_TH.shape, dtype=torch.float32, device=ticket.x_TH.device)
        self.exchange.receive(ticket.ticket, y_TH)
        parts = [ticket.plan.of(shard) for shard in range(ticket.num_shards)]
        return [None if part is None else y_TH[part.rows_U].to(ticket.x_TH.dtype) for part in parts]

    def heartbeat(self) -> None:
        self.exchange.heartbeat()

    def close(self) -> None:
        self.exchange.close()


@dataclasses.dataclass(frozen=True, slots=True)
class ByShardTicket:
    ticket: Ticket
    x_TH: torch.Tensor
    plan: PlanByShard
    num_shards: int

    @property
    def layer(self) -> int:
        return self.ticket.layer


class Lane(Protocol):
    """Both ends of a lane, with nobody serving the ports yet."""

    @property
    def exchange(self) -> ByShard: ...
    @property
    def ports(self) -> Sequence[Port]: ...
    def vanish(self) -> None:
        """The attention worker dies: no word, only its connections break."""


class Implementation(Protocol):
    """How the suite gets lanes of one kind."""

    @property
    def device(self) -> torch.device: ...

    def serve(self, shards: Sequence[Serve], layout: FrameLayout) -> AbstractContextManager[ByShard]:
        """An exchange whose shards answer, until the context ends; its end fails if a shard ended badly."""

    def open(self, settings: LaneSettings) -> AbstractContextManager[Lane]:
        """A lane whose ports the test holds. Skips the test if the implementation has none."""


class Local:
    """`LocalExchange`: no wire, hence neither ports nor any fault of a wire."""

    device = torch.device("cpu")

    @contextlib.contextmanager
    def serve(self, shards: Sequence[Serve], layout: FrameLayout) -> Iterator[ByShard]:
        yield ByShard(LocalExchange(shards))

    def open(self, settings: LaneSettings) -> NoReturn:
        pytest.skip("LocalExchange calls its shards directly: there are no ports, frames, epochs or peers to lose")


@dataclasses.dataclass(frozen=True)
class WireEnds:
    wires: Sequence[Wire]
    exchange: ByShard
    ports: Sequence[Port]

    def vanish(self) -> None:
        for wire in self.wires:
            wire.abort()


@dataclasses.dataclass(frozen=True)
class Wires:
    """`router.lane`, every rank in this process."""

    shares: bool = False
    """Whether rows lie in memory that both ends have, or go through the wire."""
    device: ClassVar[torch.device] = torch.device("cpu")

    @contextlib.contextmanager
    def serve(self, shards: Sequence[Serve], layout: FrameLayout) -> Iterator[ByShard]:
        with self.open(LaneSettings(num_shards=len(shards), layout=layout)) as lane:
            with ThreadPoolExecutor(len(shards)) as pool:
                served = [
                    pool.submit(serve_until_closed, port, shard) for port, shard in zip(lane.ports, shards, strict=True)
                ]
                try:
                    yield lane.exchange
                finally:
                    lane.exchange.close()
            for future in served:
                future.result()

    @contextlib.contextmanager
    def open(self, settings: LaneSettings) -> Iterator[WireEnds]:
        shared = shared_bytes(settings.layout) if self.shares else 0
        pairs = [form_pair(settings.reply_s, shared) for _ in range(settings.num_shards)]
        try:
            exchange, ports = self.ends([worker for worker, _ in pairs], [shard for _, shard in pairs], settings)
            yield WireEnds([worker for worker, _ in pairs], ByShard(exchange), ports)
        finally:
            for pair in pairs:
                for wire in pair:
                    wire.abort()

    def ends(
        self, workers: Sequence[Wire], shards: Sequence[Wire], settings: LaneSettings
    ) -> tuple[Exchange, Sequence[Port]]:
        """Of a lane over these wires, one to each shard."""
        return (
            LaneExchange([Link(worker, settings.layout, EPOCH) for worker in workers]),
            [LanePort(shard, settings.layout, settings.port_epoch, settings.silence_s) for shard in shards],
        )


def form_pair(transfer_s: float, shared: int = 0) -> tuple[Wire, Wire]:
    """Both ends of a new wire, in this process.

    Args:
        shared: bytes of memory for both.
    """
    name = uuid.uuid4().hex
    # Each has a thread while they connect, as they wait for each other.
    with ThreadPoolExecutor(2) as pool:
        ends = [
            pool.submit(Wire.join, _store(rank), name, rank, HOST, CONNECT_S, transfer_s, shared) for rank in range(2)
        ]
        return ends[0].result(), ends[1].result()


@functools.cache
def _store(rank: int) -> GroupStore:
    """Connecting to a store takes seconds now and then, hence once per rank. Ranks cannot share one: each waits."""
    return (
        GroupStore.host(HOST, CONNECT_S, SECRET) if rank == 0 else GroupStore.join(_store(0).address, CONNECT_S, SECRET)
    )


def serve_until_closed(port: Port, serve: Serve) -> None:
    """What a shard does with a port, without the loop that shares it among lanes."""
    while (call := port.receive()) is not None:
        try:
            y_UH = serve(call.layer, call.rows)
        except ExpertMissingError as error:
            port.refuse(call, error)
        else:
            port.reply(call, y_UH)


def serve_in_process(store: str, name: str, layout: FrameLayout) -> None:
    """The whole life of a shard's process."""
    wire = Wire.join(GroupStore.join(store, CONNECT_S, SECRET), name, SHARD, HOST, CONNECT_S, PATIENT_S)
    serve_until_closed(LanePort(wire, layout, EPOCH, PATIENT_S), Scale(0))


class ExchangeConformance:
    """The contract, as statements. Subclasses name the implementation."""

    implementation: ClassVar[Implementation]

    def rows(self, num_rows: int, layout: FrameLayout | None = None) -> ExpertRows:
        return random_rows(num_rows, layout or layout_of(), self.implementation.device)

    # What goes well.

    def test_the_sums_of_a_token_that_goes_to_several_shards_are_added(self) -> None:
        shards, rows, device = [Scale(0), Scale(1)], self.rows(6), self.implementation.device
        plan = PlanByShard(
            tuple(
                ShardPlan(rows_U=tokens, slots_UK=rows.slots_UK[tokens], weights_UK=rows.weights_UK[tokens])
                for tokens in (torch.tensor([0, 2, 5], device=device), torch.tensor([2, 3, 4, 5], device=device))
            )
        )
        with self.implementation.serve(shards, layout_of()) as exchange:
            y_TH = torch.ones_like(rows.x_UH)
            exchange.exchange.receive(exchange.exchange.send(1, rows.x_UH, plan), y_TH)
        expected_TH = torch.ones_like(y_TH)
        for shard, part in zip(shards, plan.shards, strict=True):
            assert part is not None
            expected_TH[part.rows_U] += shard(1, rows_of(rows.x_UH, part))
        torch.testing.assert_close(y_TH, expected_TH, rtol=0, atol=0)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_a_dense_plan_sends_every_token_to_every_shard(self, dtype: torch.dtype) -> None:
        layout = layout_of(dtype)
        shards, rounds = [Scale(shard) for shard in range(3)], []
        with self.implementation.serve(shards, layout) as exchange:
            for layer, num_rows in enumerate((1, 7, 32)):
                rows = self.rows(num_rows, layout)
                slots_XTK = torch.stack([rows.slots_UK, rows.slots_UK.flip(0), rows.slots_UK + 1])
                plan = DensePlan(slots_XTK=slots_XTK, weights_TK=rows.weights_UK)
                y_TH = torch.ones(rows.x_UH.shape, device=rows.x_UH.device)
                exchange.exchange.receive(exchange.exchange.send(layer, rows.x_UH, plan), y_TH)
                rounds.append((layer, rows.x_UH, plan, y_TH))
            exchange.exchange.settle()
            for layer, x_TH, plan, y_TH in rounds:
                expected_TH = torch.ones_like(y_TH)
                for shard, serve in enumerate(shards):
                    expected_TH += serve(layer, rows_of(x_TH, plan.of(shard))).float()
                torch.testing.assert_close(y_TH, expected_TH, rtol=0, atol=0)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize(
        "sizes",
        [(5, 1, 9), (4, None, 2), (None, None, 3), (None, None, None), (1, None, None), (32, 32, 32)],
        ids=["uneven", "one idle", "two idle", "all idle", "one token", "largest frame"],
    )
    def test_each_shard_answers_the_rows_it_was_sent(self, sizes: Sequence[int | None], dtype: torch.dtype) -> None:
        layout = layout_of(dtype)
        shards = [Scale(shard) for shard in range(3)]
        sent = [None if size is None else self.rows(size, layout) for size in sizes]
        with self.implementation.serve(shards, layout) as exchange:
            assert_answered(exchange.receive(exchange.send(3, sent)), shards, 3, sent)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_threads_share_a_round_of_many_tokens(self, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(threads, "_own", 3)
        layout, device = layout_of(dtype, max_rows=5000), self.implementation.device
        shards: list[Serve] = [Scale(0), Lacks(4, Scale(1)), Scale(2)]
        with self.implementation.serve(shards, layout) as exchange:
            for layer in (3, 4, 5):
                rows = self.rows(6000, layout)
                parts = []
                for size in (100, 5000, 3000):
                    rows_U = torch.randperm(6000)[:size].sort().values.to(device)
                    part = ShardPlan(rows_U=rows_U, slots_UK=rows.slots_UK[rows_U], weights_UK=rows.weights_UK[rows_U])
                    parts.append(part)
                y_TH = torch.randn(rows.x_UH.shape, device=device)
                before_TH = y_TH.clone()

                def round_of(
                    exchange: Exchange, layer: int, x_TH: torch.Tensor, plan: PlanByShard, y_TH: torch.Tensor
                ) -> None:
                    ticket = exchange.send(layer, x_TH, plan)
                    exchange.await_first(ticket)
                    exchange.receive(ticket, y_TH)
                    exchange.settle()

                the_round = exchange.exchange, layer, rows.x_UH, PlanByShard(tuple(parts)), y_TH
                if layer == 4:
                    with pytest.raises(ExpertMissingError, match=r"layer 4: no expert in slots \[3\]"):
                        round_of(*the_round)
                else:
                    round_of(*the_round)
                    for shard, part in zip(shards, parts, strict=True):
                        before_TH[part.rows_U] += shard(layer, rows_of(rows.x_UH, part)).float()
                    torch.testing.assert_close(y_TH, before_TH, rtol=0, atol=0)

    def test_it_tells_how_many_shards_it_reaches(self) -> None:
        with self.implementation.serve([Scale(0), Scale(1)], layout_of()) as exchange:
            assert exchange.num_shards == 2

    def test_a_ticket_names_its_layer(self) -> None:
        with self.implementation.serve([Scale(0)], layout_of()) as exchange:
            ticket = exchange.send(5, [self.rows(1)])
            exchange.receive(ticket)
        assert ticket.layer == 5

    def test_two_rounds_in_flight_are_received_in_order(self) -> None:
        shards = [Scale(0), Scale(1)]
        rounds = [(layer, [self.rows(1 + layer % 4), self.rows(8)]) for layer in range(9)]
        with self.implementation.serve(shards, layout_of()) as exchange:
            ticket = exchange.send(*rounds[0])
            for number, (layer, rows) in enumerate(rounds):
                following = exchange.send(*rounds[number + 1]) if number + 1 < len(rounds) else None
                assert_answered(exchange.receive(ticket), shards, layer, rows)
                if following is not None:
                    ticket = following

    def test_a_shard_left_out_of_some_rounds_answers_the_others(self) -> None:
        shards = [Scale(0), Scale(1)]
        with self.implementation.serve(shards, layout_of()) as exchange:
            for layer in range(6):
                sent = [self.rows(2), self.rows(3) if layer % 3 == 2 else None]
                assert_answered(exchange.receive(exchange.send(layer, sent)), shards, layer, sent)

    # What is refused.

    def test_a_refusal_is_raised_with_its_text(self) -> None:
        with self.implementation.serve([Scale(0), Lacks(4, Scale(1))], layout_of()) as exchange:
            rows = [self.rows(2), self.rows(2)]
            with pytest.raises(ExpertMissingError, match=r"layer 4: no expert in slots \[3\]"):
                exchange.receive(exchange.send(4, rows))

    def test_a_refusal_of_a_dense_plan_is_raised_before_it_is_settled_and_the_exchange_goes_on(self) -> None:
        shards: list[Serve] = [Scale(0), Lacks(4, Scale(1))]
        with self.implementation.serve(shards, layout_of()) as exchange:
            for _ in range(2):
                rows = self.rows(3)
                plan = DensePlan(slots_XTK=torch.stack([rows.slots_UK] * 2), weights_TK=rows.weights_UK)
                y_TH = torch.zeros(rows.x_UH.shape, device=rows.x_UH.device)

                def two_layers(exchange: Exchange, x_TH: torch.Tensor, plan: DensePlan, y_TH: torch.Tensor) -> None:
                    for layer in (3, 4):
                        exchange.receive(exchange.send(layer, x_TH, plan), y_TH)
                    exchange.settle()

                with pytest.raises(ExpertMissingError, match=r"layer 4: no expert in slots \[3\]"):
                    two_layers(exchange.exchange, rows.x_UH, plan, y_TH)
            sent = [self.rows(3), self.rows(1)]
            assert_answered(exchange.receive(exchange.send(5, sent)), shards, 5, sent)

    def test_an_exchange_goes_on_after_a_refusal(self) -> None:
        shards: list[Serve] = [Scale(0), Lacks(4, Scale(1)), Scale(2)]
        with self.implementation.serve(shards, layout_of()) as exchange:
            for _ in range(3):
                with pytest.raises(ExpertMissingError):
                    exchange.receive(exchange.send(4, [self.rows(2), self.rows(2), self.rows(2)]))
            sent = [self.rows(3), self.rows(1), self.rows(2)]
            assert_answered(exchange.receive(exchange.send(5, sent)), shards, 5, sent)

    def test_a_refusal_longer_than_a_reply_is_cut(self) -> None:
        with self.implementation.open(LaneSettings(num_shards=1)) as lane:
            ticket = lane.exchange.send(0, [self.rows(1)])
            lane.ports[0].refuse(next_call(lane.ports[0]), ExpertMissingError("no expert " * 1000))
            with pytest.raises(ExpertMissingError, match="no expert no expert"):
                lane.exchange.receive(ticket)

    def test_a_frame_over_the_limit_is_not_sent(self) -> None:
        with (
            self.implementation.open(LaneSettings(num_shards=1, layout=layout_of(max_rows=8))) as lane,
            pytest.raises(RequestLimitError, match=r"9 rows.*8"),
        ):
            lane.exchange.send(0, [self.rows(9)])

    @pytest.mark.parametrize("limit", [8, 4000])
    def test_an_exchange_goes_on_after_a_frame_over_the_limit(self, limit: int) -> None:
        layout = layout_of(max_rows=limit)
        with self.implementation.open(LaneSettings(layout=layout)) as lane:
            with pytest.raises(RequestLimitError):
                lane.exchange.send(1, [self.rows(2), self.rows(limit + 1)])
            sent = [self.rows(3), self.rows(4)]
            ticket = lane.exchange.send(2, sent)
            shards = [Scale(0), Scale(1)]
            for port, shard in zip(lane.ports, shards, strict=True):
                call = next_call(port)
                port.reply(call, shard(call.layer, call.rows))
            assert_answered(lane.exchange.receive(ticket), shards, 2, sent)

    def test_a_third_round_in_flight_is_refused(self) -> None:
        with self.implementation.open(LaneSettings(num_shards=1)) as lane:
            for layer in range(2):
                lane.exchange.send(layer, [self.rows(1)])
            with pytest.raises(LaneError, match="2 rounds"):
                lane.exchange.send(2, [self.rows(1)])

    # What breaks.

    def test_a_frame_of_another_epoch_is_recognised(self) -> None:
        with self.implementation.open(LaneSettings(num_shards=1, port_epoch=Epoch(EPOCH + 1))) as lane:
            lane.exchange.send(0, [self.rows(1)])
            with pytest.raises(WrongEpochError, match=f"epoch {EPOCH} .* epoch {EPOCH + 1}"):
                lane.ports[0].receive()

    def test_a_silent_shard_is_given_up_at_the_deadline(self) -> None:
        with self.implementation.open(LaneSettings(num_shards=1, reply_s=SHORT_S)) as lane:
            ticket = lane.exchange.send(0, [self.rows(1)])
            with within(SHORT_S + MARGIN_S), pytest.raises(LaneTimeoutError):
                lane.exchange.receive(ticket)

    def test_a_silent_attention_worker_is_given_up_at_the_deadline(self) -> None:
        with (
            self.implementation.open(LaneSettings(num_shards=1, silence_s=SHORT_S)) as lane,
            within(SHORT_S + MARGIN_S),
            pytest.raises(LaneTimeoutError),
        ):
            lane.ports[0].receive()

    def test_a_shard_that_closes_is_noticed_at_once(self) -> None:
        with self.implementation.open(LaneSettings()) as lane:
            ticket = lane.exchange.send(0, [self.rows(1), self.rows(1)])
            next_call(lane.ports[1])
            lane.ports[0].close()
            with within(MARGIN_S), pytest.raises(PeerLostError):
                lane.exchange.receive(ticket)

    def test_rows_for_a_shard_that_has_closed_are_not_waited_for(self) -> None:
        with self.implementation.open(LaneSettings(num_shards=1)) as lane:
            lane.ports[0].close()
            with within(MARGIN_S), pytest.raises(PeerLostError):
                lane.exchange.receive(lane.exchange.send(0, [self.rows(1)]))

    def test_an_attention_worker_that_dies_is_noticed_at_once(self) -> None:
        with self.implementation.open(LaneSettings()) as lane:
            lane.exchange.send(0, [self.rows(1), self.rows(1)])
            next_call(lane.ports[0])
            lane.vanish()
            with within(MARGIN_S), pytest.raises(PeerLostError):
                lane.ports[0].receive()

    # What keeps a lane alive, and what ends it.

    def test_heartbeats_keep_an_idle_port_past_its_deadline(self) -> None:
        silence_s = 3 * SHORT_S
        with (
            self.implementation.open(LaneSettings(num_shards=1, silence_s=silence_s)) as lane,
            ThreadPoolExecutor(1) as pool,
        ):
            waiting = pool.submit(lane.ports[0].receive)
            until_s = time.monotonic() + 1.5 * silence_s
            while time.monotonic() < until_s:
                lane.exchange.heartbeat()
                threading.Event().wait(silence_s / 10)
            lane.exchange.send(6, [self.rows(1)])
            call = waiting.result(PATIENT_S)
        assert call is not None
        assert call.layer == 6

    def test_a_heartbeat_between_two_calls_takes_the_room_of_neither(self) -> None:
        """A shard may take the next call while it computes the last one."""
        sent = [self.rows(4), self.rows(4)]
        with self.implementation.open(LaneSettings(num_shards=1)) as lane:
            taken = []
            for layer, rows in enumerate(sent):
                lane.exchange.heartbeat()
                lane.exchange.send(layer, [rows])
                taken.append(next_call(lane.ports[0]))
            for call, rows in zip(taken, sent, strict=True):
                torch.testing.assert_close(call.rows.x_UH, rows.x_UH, rtol=0, atol=0)
                torch.testing.assert_close(call.rows.slots_UK, rows.slots_UK, rtol=0, atol=0)

    def test_an_idle_port_hears_that_its_lane_was_closed(self) -> None:
        with self.implementation.open(LaneSettings()) as lane, ThreadPoolExecutor(2) as pool:
            waiting = [pool.submit(port.receive) for port in lane.ports]
            lane.exchange.close()
            assert [future.result(PATIENT_S) for future in waiting] == [None, None]

    def test_a_lane_closes_though_a_shard_is_gone(self) -> None:
        with self.implementation.open(LaneSettings()) as lane:
            lane.ports[0].close()
            with within(MARGIN_S):
                lane.exchange.close()

    def test_a_lane_may_be_closed_twice(self) -> None:
        with self.implementation.serve([Scale(0)], layout_of()) as exchange:
            exchange.close()
            exchange.close()


def assert_answered(
    replies: Sequence[torch.Tensor | None], shards: Sequence[Serve], layer: int, sent: Sequence[ExpertRows | None]
) -> None:
    expected = [None if rows is None else shard(layer, rows) for shard, rows in zip(shards, sent, strict=True)]
    assert [reply is None for reply in replies] == [reply is None for reply in expected]
    for reply, answer in zip(replies, expected, strict=True):
        if reply is not None:
            torch.testing.assert_close(reply, answer, rtol=0, atol=0)


def next_call(port: Port) -> Call:
    call = port.receive()
    assert call is not None, "the lane was closed"
    return call


@contextlib.contextmanager
def within(seconds: float) -> Iterator[None]:
    start_s = time.monotonic()
    yield
    assert time.monotonic() - start_s < seconds
