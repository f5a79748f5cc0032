"""NCCL lanes without NCCL: headers go over wires as on GPUs, and frames over queues in its place."""

from __future__ import annotations

import contextlib
import queue
import socket
import struct
from collections import defaultdict
from collections.abc import Mapping, Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from octet.errors import ExpertMissingError, LaneError
from router.exchange import Exchange, Port, Serve
from router.frames import MAGIC, FrameLayout
from router.nccl_lane import NcclGroup, NcclLaneExchange, NcclLanePort
from router.plan import DensePlan, PlanByShard, ShardPlan
from router.wire import Wire
from tests.exchange_conformance import (
    EPOCH,
    HOST,
    PATIENT_S,
    ExchangeConformance,
    Lacks,
    LaneSettings,
    Scale,
    Wires,
    assert_answered,
    form_pair,
    layout_of,
    random_rows,
)

CPU = torch.device("cpu")

Frames = defaultdict[tuple[int, int], "queue.SimpleQueue[torch.Tensor]"]
"""On their way, by the ranks from which and to which."""


class Queues(NcclGroup):
    """Like NCCL it wants a receive for each send, as long as what was sent, in the same order."""

    def __init__(self, frames: Frames, rank: int) -> None:
        self._frames, self._rank = frames, rank

    def send(self, frames: Mapping[int, torch.Tensor]) -> None:
        for rank, frame in frames.items():
            self._frames[self._rank, rank].put(frame.clone())

    def receive(self, rooms: Mapping[int, torch.Tensor]) -> None:
        for rank, room in rooms.items():
            frame = self._frames[rank, self._rank].get(timeout=PATIENT_S)
            assert len(room) == len(frame)
            room.copy_(frame)

    def abort(self) -> None:
        return


class Zeros(NcclGroup):
    """Whatever is to be received is zeros, however much was announced."""

    def __init__(self) -> None:
        return

    def send(self, frames: Mapping[int, torch.Tensor]) -> None:
        return

    def receive(self, rooms: Mapping[int, torch.Tensor]) -> None:
        for room in rooms.values():
            room.zero_()

    def abort(self) -> None:
        return


class Announced(Wires):
    def ends(
        self, workers: Sequence[Wire], shards: Sequence[Wire], settings: LaneSettings
    ) -> tuple[Exchange, Sequence[Port]]:
        frames: Frames = defaultdict(queue.SimpleQueue)
        return (
            NcclLaneExchange(workers, Queues(frames, 0), settings.layout, EPOCH, CPU),
            [
                NcclLanePort(
                    wire, Queues(frames, shard + 1), settings.layout, settings.port_epoch, settings.silence_s, CPU
                )
                for shard, wire in enumerate(shards)
            ],
        )


class TestNcclLane(ExchangeConformance):
    implementation = Announced()


def test_what_a_dense_round_was_refused_is_raised_by_the_next_other_round_and_leaves_nothing_of_it_behind() -> None:
    """Two micro-batches take turns, of which one is just small enough to be dense."""
    shards: list[Serve] = [Scale(0), Lacks(4, Scale(1))]
    layout = layout_of()
    with Announced().serve(shards, layout) as exchange:
        rows = random_rows(3, layout)
        plan = DensePlan(slots_XTK=torch.stack([rows.slots_UK] * 2), weights_TK=rows.weights_UK)
        dense = exchange.exchange.send(4, rows.x_UH, plan)
        other = exchange.send(5, [random_rows(2, layout), random_rows(7, layout)])
        exchange.exchange.receive(dense, torch.zeros(rows.x_UH.shape))
        with pytest.raises(ExpertMissingError, match="layer 4"):
            exchange.receive(other)
        sent = [random_rows(7, layout), random_rows(2, layout)]
        assert_answered(exchange.receive(exchange.send(6, sent)), shards, 6, sent)


def test_every_shard_that_is_there_hears_that_its_lane_was_closed() -> None:
    layout = FrameLayout(hidden_size=8, experts_per_token=2, max_rows=3, dtype=torch.float32)
    (lost, _), (there, shard) = form_pair(PATIENT_S), form_pair(PATIENT_S)
    lost.abort()
    NcclLaneExchange([lost, there], Queues(defaultdict(queue.SimpleQueue), 0), layout, EPOCH, CPU).close()
    port = NcclLanePort(shard, Queues(defaultdict(queue.SimpleQueue), 2), layout, EPOCH, PATIENT_S, CPU)
    assert port.receive() is None


_numbers = st.integers(-(2**63), 2**63 - 1) | st.integers(-2, 300)
_headers = st.builds(
    lambda *fields: struct.pack("<8q", *fields), st.just(MAGIC), st.integers(0, 8), st.just(EPOCH), *[_numbers] * 5
)


@given(sent=st.binary(max_size=100) | st.lists(_headers, max_size=3).map(b"".join), to_shard=st.booleans())
def test_whatever_comes_instead_of_a_header_is_a_typed_error(sent: bytes, to_shard: bool) -> None:
    """Nothing is received over NCCL that is longer than what the lane was formed for."""
    layout = FrameLayout(hidden_size=8, experts_per_token=2, max_rows=3, dtype=torch.float32)
    with socket.create_server((HOST, 0)) as listener:
        other = socket.create_connection(listener.getsockname())
        wire = Wire(listener.accept()[0], PATIENT_S)
    with other:
        other.sendall(sent)
        with contextlib.suppress(LaneError, ExpertMissingError):
            if to_shard:
                other.shutdown(socket.SHUT_WR)
                call = NcclLanePort(wire, Zeros(), layout, EPOCH, PATIENT_S, CPU).receive()
                assert call is None or len(call.rows.x_UH) <= layout.max_rows
            else:
                exchange = NcclLaneExchange([wire], Zeros(), layout, EPOCH, CPU)
                part = ShardPlan(
                    rows_U=torch.arange(2), slots_UK=torch.zeros(2, 2, dtype=torch.int32), weights_UK=torch.ones(2, 2)
                )
                ticket = exchange.send(0, torch.zeros(2, 8), PlanByShard((part,)))
                other.shutdown(socket.SHUT_WR)
                exchange.receive(ticket, torch.zeros(2, 8))
        wire.abort()
