from __future__ import annotations

import pathlib
import time

import pytest

from cluster.members import Endpoint
from cluster.workers.stores import Stores
from octet.errors import LaneTimeoutError
from octet.ids import WorkerId
from octet.secret import ClusterSecret
from router.group_store import GroupStore

HOST = "127.0.0.1"
SECRET = ClusterSecret.draw()


def peer(name: str, store: GroupStore) -> Endpoint:
    return Endpoint(worker_id=WorkerId(name), mailbox="", store=store.address, node_id="", pid=0)


def open_files() -> int:
    return len(list(pathlib.Path("/proc/self/fd").iterdir()))


def test_a_peers_store_is_joined_once() -> None:
    hosted = GroupStore.host(HOST, 5.0, SECRET)
    stores = Stores(5.0, SECRET)
    assert stores.of(peer("decode-0", hosted)) is stores.of(peer("decode-0", hosted))
    assert stores.of(peer("decode-0", hosted)).address == hosted.address


def test_a_forgotten_peer_leaves_no_open_file() -> None:
    hosted = GroupStore.host(HOST, 5.0, SECRET)
    stores, before = Stores(5.0, SECRET), open_files()
    names = [f"decode-{number}" for number in range(4)]
    for name in names:
        stores.of(peer(name, hosted))
    assert open_files() >= before + 4
    stores.forget([WorkerId(name) for name in [*names, "never-there"]])
    # The host, whose ends are in this process as well, closes them when it notices.
    deadline_s = time.monotonic() + 10
    while open_files() > before and time.monotonic() < deadline_s:
        time.sleep(0.05)
    assert open_files() == before


def test_a_store_that_does_not_answer_is_not_kept() -> None:
    hosted = GroupStore.host(HOST, 5.0, SECRET)
    stores, gone = (
        Stores(0.5, SECRET),
        Endpoint(worker_id=WorkerId("decode-0"), mailbox="", store=f"{HOST}:1", node_id="", pid=0),
    )
    with pytest.raises(LaneTimeoutError):
        stores.of(gone)
    assert stores.of(peer("decode-0", hosted)).address == hosted.address
