"""Lanes over NCCL are held to the contract of every exchange. Every rank is a process of its own."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import uuid
from collections.abc import Iterator, Sequence
from typing import NoReturn

import pytest
import torch

from octet.errors import ExpertMissingError
from router.exchange import Serve
from router.frames import FrameLayout
from router.group_store import GroupStore
from router.handshake import GUEST_SIDE, HOST_SIDE
from router.nccl_lane import NcclGroup, NcclLaneExchange, NcclLanePort
from router.wire import Wire
from tests.exchange_conformance import CONNECT_S, EPOCH, HOST, PATIENT_S, SECRET, ByShard, ExchangeConformance

_ONE_GPU_FOR_ALL = {"NCCL_MULTI_RANK_GPU_ENABLE": "1", "NCCL_MAX_CTAS": "2", "NCCL_NVLS_ENABLE": "0"}


def _device(rank: int) -> torch.device:
    return torch.device("cuda", rank % torch.cuda.device_count())


def _serve(store: str, name: str, rank: int, size: int, layout: FrameLayout, shard: Serve) -> None:
    os.environ.update(_ONE_GPU_FOR_ALL)
    device = _device(rank)
    torch.cuda.set_device(device)
    joined = GroupStore.join(store, CONNECT_S, SECRET)
    wire = Wire.join(joined, f"{name}/{rank}", GUEST_SIDE, HOST, CONNECT_S, PATIENT_S)
    port = NcclLanePort(wire, NcclGroup(joined, name, rank, size, device), layout, EPOCH, PATIENT_S, device)
    while (call := port.receive()) is not None:
        try:
            y_UH = shard(call.layer, call.rows)
        except ExpertMissingError as error:
            port.refuse(call, error)
        else:
            port.reply(call, y_UH)


class Nccl:
    device = torch.device("cuda", 0)

    @contextlib.contextmanager
    def serve(self, shards: Sequence[Serve], layout: FrameLayout) -> Iterator[ByShard]:
        size = len(shards) + 1
        if torch.cuda.device_count() < size and torch.cuda.nccl.version() < (2, 30):
            pytest.skip(f"{size} ranks need {size} GPUs, or NCCL 2.30 for several ranks on one")
        os.environ.update(_ONE_GPU_FOR_ALL)
        store, name = GroupStore.host(HOST, CONNECT_S, SECRET), uuid.uuid4().hex
        spawn = multiprocessing.get_context("spawn")
        processes = [
            spawn.Process(target=_serve, args=(store.address, name, rank + 1, size, layout, shard))
            for rank, shard in enumerate(shards)
        ]
        for process in processes:
            process.start()
        wires = [Wire.join(store, f"{name}/{rank}", HOST_SIDE, HOST, CONNECT_S, PATIENT_S) for rank in range(1, size)]
        data = NcclGroup(store, name, 0, size, self.device)
        exchange = ByShard(NcclLaneExchange(wires, data, layout, EPOCH, self.device))
        try:
            yield exchange
        finally:
            exchange.close()
            for process in processes:
                process.join(CONNECT_S)
                process.kill()

    def open(self, settings: object) -> NoReturn:
        pytest.skip("the ports of an NCCL lane are in processes of their own; faults are shown on CPUs")


class TestNcclLane(ExchangeConformance):
    implementation = Nccl()
