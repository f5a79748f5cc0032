"""`octet bench lane`: a dispatch and combine without experts, against gloo's own all-to-all of the same bytes.

Every rank is a process of its own on this machine. A shard answers at once, so what is timed is the way there and back:
packing, two frames per shard, unpacking. Once through sockets alone, and once with the rows in shared memory.
"""

from __future__ import annotations

import datetime
import multiprocessing
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from octet.ids import Epoch
from octet.secret import ClusterSecret
from router.frames import FrameLayout
from router.group_store import GroupStore
from router.lane import SHARD, WORKER, LaneExchange, LanePort
from router.link import Link, shared_bytes
from router.plan import PlanByShard, ShardPlan
from router.wire import Wire

_HOST, _WAIT_S, _EPOCH = "127.0.0.1", 30.0, Epoch(1)
_SECRET = ClusterSecret(bytes(32))
"""Of processes that live as long as the measurement."""
_LAYOUT = FrameLayout(hidden_size=512, experts_per_token=8, max_rows=1024, dtype=torch.float32)
_SHARED_BYTES = (0, shared_bytes(_LAYOUT))
_ROUNDS, _REPEATS = 200, 5


def bench_lane(shard_counts: tuple[int, ...] = (1, 2, 4), row_counts: tuple[int, ...] = (1, 8, 32, 1024)) -> None:
    """Medians of five medians of 200 rounds each, in µs, and their ratio."""
    table = Table(box=None, pad_edge=False)
    columns = (
        "shards",
        "rows per shard",
        "lane, sockets µs",
        "shared memory µs",
        "gloo alltoall µs",
        "alltoall ÷ shared",
    )
    for column in columns:
        table.add_column(column, justify="right")
    for num_shards in shard_counts:
        for num_rows, sockets_s, shared_s, alltoall_s in _measured(num_shards, row_counts):
            table.add_row(
                str(num_shards),
                str(num_rows),
                f"{sockets_s * 1e6:.0f}",
                f"{shared_s * 1e6:.0f}",
                f"{alltoall_s * 1e6:.0f}",
                f"{alltoall_s / shared_s:.1f}",
            )
    Console(highlight=False).print(table)


def _measured(num_shards: int, row_counts: tuple[int, ...]) -> list[tuple[int, float, float, float]]:
    torch.set_num_threads(1)
    store = GroupStore.host(_HOST, _WAIT_S, _SECRET)
    spawn = multiprocessing.get_context("spawn")
    shards = [
        spawn.Process(target=_shard, args=(store.address, shard + 1, num_shards + 1, row_counts), daemon=True)
        for shard in range(num_shards)
    ]
    for shard in shards:
        shard.start()
    lane_s = []
    for shared in _SHARED_BYTES:
        wires = [_wire(store, shard, WORKER, shared) for shard in range(num_shards)]
        exchange = LaneExchange([Link(wire, _LAYOUT, _EPOCH) for wire in wires])
        lane_s.append([_lane_round(exchange, num_shards, num_rows) for num_rows in row_counts])
        exchange.close()
    group = _gloo(store, 0, num_shards + 1)
    alltoall_s = [_median(_alltoall(group, num_shards + 1, num_rows)) for num_rows in row_counts]
    for shard in shards:
        shard.join(_WAIT_S)
    return list(zip(row_counts, *lane_s, alltoall_s, strict=True))


def _wire(store: GroupStore, shard: int, rank: int, shared: int) -> Wire:
    return Wire.join(store, f"link/{shard}/{shared}", rank, _HOST, _WAIT_S, _WAIT_S, shared)


def _shard(store: str, rank: int, size: int, row_counts: tuple[int, ...]) -> None:
    torch.set_num_threads(1)
    joined = GroupStore.join(store, _WAIT_S, _SECRET)
    for shared in _SHARED_BYTES:
        port = LanePort(_wire(joined, rank - 1, SHARD, shared), _LAYOUT, _EPOCH, _WAIT_S)
        while (call := port.receive()) is not None:
            port.reply(call, call.rows.x_UH)
    group = _gloo(joined, rank, size)
    for num_rows in row_counts:
        _median(_alltoall(group, size, num_rows))


def _lane_round(exchange: LaneExchange, num_shards: int, num_rows: int) -> float:
    """Every token goes to every shard."""
    part = ShardPlan(
        rows_U=torch.arange(num_rows),
        slots_UK=torch.zeros(num_rows, _LAYOUT.experts_per_token, dtype=torch.int32),
        weights_UK=torch.rand(num_rows, _LAYOUT.experts_per_token),
    )
    plan, x_TH = PlanByShard((part,) * num_shards), torch.randn(num_rows, _LAYOUT.hidden_size)
    y_TH = torch.zeros_like(x_TH)
    return _median(lambda: exchange.receive(exchange.send(0, x_TH, plan), y_TH))


def _gloo(store: GroupStore, rank: int, size: int) -> Any:
    from torch._C._distributed_c10d import ProcessGroupGloo

    return ProcessGroupGloo(store.prefix("alltoall"), rank, size, datetime.timedelta(seconds=_WAIT_S))


def _alltoall(group: Any, size: int, num_rows: int) -> Callable[[], None]:
    """One exchange each way, every rank sending every other as many bytes as a call has."""
    sent = torch.zeros(size * _LAYOUT.call_bytes(num_rows), dtype=torch.uint8)
    received = torch.empty_like(sent)

    def both_ways() -> None:
        for _ in range(2):
            group.alltoall_base(received, sent, [], []).wait()

    return both_ways


def _median(run: Callable[[], object]) -> float:
    medians = []
    for _ in range(_REPEATS):
        times = []
        for _ in range(_ROUNDS):
            start_s = time.perf_counter()
            run()
            times.append(time.perf_counter() - start_s)
        medians.append(statistics.median(times))
    return statistics.median(medians)
