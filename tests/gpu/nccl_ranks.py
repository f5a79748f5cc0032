"""Lanes over NCCL whose shards are processes of their own."""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import os
import uuid
from collections.abc import Iterator, Sequence

import pytest
import torch

from octet.errors import ExpertMissingError
from router.exchange import Serve
from router.frames import FrameLayout
from router.group_store import GroupStore
from router.handshake import GUEST_SIDE, HOST_SIDE
from router.nccl_lane import NcclGroup, NcclLaneExchange, NcclLanePort
from router.wire import Wire
from tests.exchange_conformance import CONNECT_S, EPOCH, HOST, PATIENT_S, SECRET

_ONE_GPU_FOR_ALL = {"NCCL_MULTI_RANK_GPU_ENABLE": "1", "NCCL_MAX_CTAS": "2", "NCCL_NVLS_ENABLE": "0"}


def nccl_version() -> int:
    """Of the library that is loaded, such as 23007; torch only knows what it was built with."""
    version = ctypes.c_int()
    ctypes.CDLL("libnccl.so.2").ncclGetVersion(ctypes.byref(version))
    return version.value


@contextlib.contextmanager
def serve_over_nccl(shards: Sequence[Serve], layout: FrameLayout, device: torch.device) -> Iterator[NcclLaneExchange]:
    """Skips where there are neither as many GPUs as ranks nor an NCCL that puts several on one."""
    size = len(shards) + 1
    if torch.cuda.device_count() < size and nccl_version() < 23000:
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
    exchange = NcclLaneExchange(wires, NcclGroup(store, name, 0, size, device), layout, EPOCH, device)
    try:
        yield exchange
    finally:
        exchange.close()
        for process in processes:
            process.join(CONNECT_S)
            process.kill()


def _serve(store: str, name: str, rank: int, size: int, layout: FrameLayout, shard: Serve) -> None:
    os.environ.update(_ONE_GPU_FOR_ALL)
    device = torch.device("cuda", rank % torch.cuda.device_count())
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
