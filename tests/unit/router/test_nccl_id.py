"""What decides which communicator a rank joins; torch's part is played."""

from __future__ import annotations

import os
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from octet.errors import LaneTimeoutError
from octet.secret import ClusterSecret
from router.group_store import GroupStore
from router.nccl_id import KEY, store_with_id
from router.nccl_lane import NcclGroup
from tests.exchange_conformance import CONNECT_S, HOST, SECRET

ID, ANOTHER, NAME = bytes(range(128)), bytes(128), "lane/nccl"


def _form(store: GroupStore, rank: int) -> bytes:
    """As torch does: rank 0 sets an id that it has drawn, the others get it."""
    with store_with_id(store, NAME, rank) as own:
        if rank == 0:
            own.set(KEY, ID)
        return bytes(own.get(KEY))


def test_every_rank_gets_the_id_that_the_first_has_drawn() -> None:
    store = GroupStore.host(HOST, CONNECT_S, SECRET)
    with ThreadPoolExecutor(3) as pool:
        others = [
            pool.submit(_form, GroupStore.join(store.address, CONNECT_S, SECRET), 1),
            pool.submit(_form, GroupStore.join(store.address, CONNECT_S, SECRET), 2),
        ]
        assert _form(store, 0) == ID
        assert [other.result() for other in others] == [ID, ID]


def test_no_rank_joins_what_a_stranger_has_written_where_torch_would_look() -> None:
    store = GroupStore.host(HOST, CONNECT_S, SECRET)
    store.prefix(NAME).set(KEY, ANOTHER.decode())
    assert _form(store, 0) == ID
    assert _form(store, 1) == ID


@pytest.mark.parametrize("as_whom", [None, "another cluster", "another lane"])
def test_an_id_that_no_member_has_signed_for_this_group_is_refused(as_whom: str | None) -> None:
    store = GroupStore.host(HOST, CONNECT_S, SECRET)
    if as_whom is None:
        store.prefix(NAME).set("value", ANOTHER.hex())
    else:
        other = "lane 2/nccl" if as_whom == "another lane" else NAME
        liar = GroupStore.host(HOST, CONNECT_S, SECRET if as_whom == "another lane" else ClusterSecret.draw())
        liar.publish(other, ANOTHER)
        store.prefix(NAME).set("value", liar.prefix(other).get("value").decode())
    with pytest.raises(LaneTimeoutError, match=r"rank 1 was told no id.*not signed by a member"):
        _form(store, 1)


def test_whoever_is_told_no_id_does_not_wait_longer_than_its_store() -> None:
    store = GroupStore.host(HOST, 0.3, SECRET)
    started_s = time.monotonic()
    with pytest.raises(LaneTimeoutError, match="rank 1 was told no id"):
        _form(store, 1)
    assert time.monotonic() - started_s < CONNECT_S


def test_a_first_exchange_that_fails_tells_no_id_and_waits_for_nothing() -> None:
    store = GroupStore.host(HOST, CONNECT_S, SECRET)
    started_s = time.monotonic()
    with pytest.raises(ZeroDivisionError), store_with_id(store, NAME, 0):
        _ = 1 // 0
    assert time.monotonic() - started_s < CONNECT_S / 2
    assert not store.prefix(NAME).check(["value"])


class Played:
    """Like torch's, rank 0 of more ranks than share a root draws an id for each root, under keys of their own."""

    Options = staticmethod(lambda: None)

    def __init__(self, store: Any, rank: int, size: int, options: None) -> None:
        self._store, self._rank, self._size = store, rank, size

    def alltoall(self, received: list[torch.Tensor], sent: list[torch.Tensor]) -> Played:
        several = self._size > int(os.environ["TORCH_NCCL_RANKS_PER_ROOT"])
        key = f"UniqueNCCLID:{self._rank}" if several else KEY
        if self._rank == 0:
            self._store.set(key, ID)
        else:
            assert self._store.check([key]), "the id is that of one root"
        return self

    def wait(self) -> None:
        return


def test_a_group_of_however_many_ranks_has_one_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_NCCL_RANKS_PER_ROOT", "128")
    monkeypatch.setattr("torch._C._distributed_c10d.ProcessGroupNCCL", Played, raising=False)
    store = GroupStore.host(HOST, 2.0, SECRET)
    with ThreadPoolExecutor(1) as pool:
        joined = GroupStore.join(store.address, 2.0, SECRET)
        other = pool.submit(NcclGroup, joined, NAME, 1, 300, torch.device("cpu"))
        NcclGroup(store, NAME, 0, 300, torch.device("cpu"))
        other.result()
