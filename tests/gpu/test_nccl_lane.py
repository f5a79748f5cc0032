"""Lanes over NCCL are held to the contract of every exchange. Every rank is a process of its own."""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import Iterator, Sequence
from typing import NoReturn

import pytest
import torch

from router.exchange import Serve
from router.frames import FrameLayout
from router.group_store import GroupStore
from router.nccl_lane import NcclGroup
from tests.exchange_conformance import CONNECT_S, HOST, SECRET, ByShard, ExchangeConformance
from tests.gpu.nccl_ranks import serve_over_nccl


class Nccl:
    device = torch.device("cuda", 0)

    @contextlib.contextmanager
    def serve(self, shards: Sequence[Serve], layout: FrameLayout) -> Iterator[ByShard]:
        with serve_over_nccl(shards, layout, self.device) as exchange:
            yield ByShard(exchange)

    def open(self, settings: object) -> NoReturn:
        pytest.skip("the ports of an NCCL lane are in processes of their own; faults are shown on CPUs")


class TestNcclLane(ExchangeConformance):
    implementation = Nccl()


def test_a_communicator_of_one_rank_forms_and_ends() -> None:
    """All that one GPU can show with an NCCL before 2.30."""
    store = GroupStore.host(HOST, CONNECT_S, SECRET)
    group = NcclGroup(store, uuid.uuid4().hex, 0, 1, Nccl.device)
    torch.cuda.synchronize()
    group.abort()
