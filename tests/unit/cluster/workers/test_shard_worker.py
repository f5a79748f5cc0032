"""An expert shard's process, in this one: what becomes of a change that it prepares and nobody wants any more."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

import cluster.workers.shard_worker
from cluster.members import Endpoint
from cluster.workers.shard_worker import ShardWorker
from cluster.workers.weight_transfer import parts_of
from experts.slots import EMPTY, ExpertSlots, Fill
from octet.errors import UnavailableError
from octet.ids import WorkerId
from router.group_store import GroupStore
from router.handshake import HOST_SIDE
from router.transition import SlotFill
from router.wire import Wire
from tests.unit.cluster.played import HOST, PATIENT_S, PLAN

LAYERS = PLAN.routing.placement.layers
NOTHING = {layer: [EMPTY] * PLAN.routing.placement.slots_per_shard for layer in LAYERS}
SHARD, LENDER = WorkerId("experts-0"), WorkerId("experts-1")
AT_ONCE_S = 5.0
"""Far less than a silent lender is waited for."""


@pytest.fixture
def worker() -> Iterator[ShardWorker]:
    worker = ShardWorker(SHARD, PLAN, HOST, "node")
    worker.load(NOTHING)
    yield worker
    worker.stop()


def fills(count: int, source: WorkerId | None = None) -> list[SlotFill]:
    return [SlotFill(shard=SHARD, layer=LAYERS[0], slot=slot, expert=slot, source=source) for slot in range(count)]


def test_a_change_that_is_given_up_is_not_prepared_to_its_end(
    worker: ShardWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, may_go_on, parts = threading.Event(), threading.Event(), list[int]()
    fill: Any = ExpertSlots.fill

    def slowly(self: ExpertSlots, wanted: list[Fill]) -> None:
        begun.set()
        assert may_go_on.wait(PATIENT_S)
        parts.append(len(wanted))
        fill(self, wanted)

    monkeypatch.setattr(cluster.workers.shard_worker, "_READ_BYTES", 1)
    monkeypatch.setattr(ExpertSlots, "fill", slowly)
    with ThreadPoolExecutor() as threads:
        preparing = threads.submit(worker.prepare, fills(8), {}, "7.2")
        assert begun.wait(PATIENT_S)
        retiring = threads.submit(worker.retire, NOTHING, "7.2")
        while "7.2" not in worker._given_up:
            time.sleep(0.01)
        may_go_on.set()
        retiring.result(PATIENT_S)
        with pytest.raises(UnavailableError, match=r"7\.2 .* given up"):
            preparing.result(PATIENT_S)
    assert parts == [1], "nothing after the one that was being read"
    assert worker.status().num_held == 0
    assert worker.prepare(fills(2), {}, "8.2") == 0, "the next one is another"
    assert worker.status().num_held == 2


def test_a_lender_that_says_nothing_is_waited_for_no_longer_than_the_change(worker: ShardWorker) -> None:
    store = GroupStore.host(HOST, 10.0, PLAN.secret)
    lender = Endpoint(worker_id=LENDER, mailbox="", store=store.address, node_id="", pid=0)
    with ThreadPoolExecutor() as threads:
        preparing = threads.submit(worker.prepare, fills(2, LENDER), {LENDER: lender}, "7.2")
        name = f"weights/{LENDER}/{SHARD}/7.2"
        silent = Wire.join(store, name, HOST_SIDE, HOST, 10.0, 10.0)
        while worker._borrowing is None:
            time.sleep(0.01)
        begun_s = time.monotonic()
        worker.retire(NOTHING, "7.2")
        with pytest.raises(UnavailableError):
            preparing.result(PATIENT_S)
        assert time.monotonic() - begun_s < AT_ONCE_S < PLAN.config.lane.timeout_s
        silent.abort()
    assert worker.status().num_held == 0


def test_a_change_that_was_given_up_before_it_is_prepared_is_not_begun(worker: ShardWorker) -> None:
    worker.retire(NOTHING, "7.2")
    with pytest.raises(UnavailableError):
        worker.prepare(fills(2), {}, "7.2")
    assert worker.status().num_held == 0


@pytest.mark.parametrize("most", [1, 2, 3, 100])
def test_an_expert_with_several_slots_is_read_once_however_experts_are_parted(most: int) -> None:
    wanted = [Fill(layer=layer, slot=slot, expert=slot % 3) for slot in range(7) for layer in (1, 2)]
    parts = parts_of(wanted, most)
    experts = [{(fill.layer, fill.expert) for fill in part} for part in parts]
    assert all(0 < len(part) <= most for part in experts)
    assert sum(len(part) for part in experts) == 6
    assert sorted((f.layer, f.slot, f.expert) for part in parts for f in part) == sorted(
        (f.layer, f.slot, f.expert) for f in wanted
    )
