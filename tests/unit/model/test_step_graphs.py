"""When steps are captured, and into whose memory. Nothing is replayed: CUDA's part is played, where it counts."""

from __future__ import annotations

import contextlib
import gc
import itertools
import pathlib
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from model.batch import Span
from model.kv_cache import KvCache
from model.pages import PagePool
from model.step_graphs import StepGraphs
from octet.errors import LaneError
from tests.unit.model.subject import NUM_PAGES, PAGE, Scaled, build


class Pools:
    """Like torch, it takes no handle of a pool whose last graph is gone."""

    def __init__(self) -> None:
        self.handles = itertools.count()
        self.graphs: Counter[int] = Counter()

    @property
    def in_use(self) -> list[int]:
        return [pool for pool, graphs in self.graphs.items() if graphs > 0]

    def graph(self) -> Graph:
        return Graph(self)


class Graph:
    def __init__(self, pools: Pools) -> None:
        self._pools, self._pool = pools, -1

    def capture_begin(self, pool: int, **_: object) -> None:
        assert self._pools.graphs.get(pool) != 0, f"pool {pool} is gone"
        self._pool = pool
        self._pools.graphs[pool] += 1

    def capture_end(self) -> None:
        return

    def replay(self) -> None:
        return

    def __del__(self) -> None:
        if self._pool >= 0:
            self._pools.graphs[self._pool] -= 1


class Stream:
    def __init__(self, device: torch.device) -> None:
        return

    def wait_stream(self, stream: object) -> None:
        return


class Planned(Scaled):
    """Experts that answer at once, by a plan, unless they are told to fail."""

    generation = 1

    def __init__(self) -> None:
        self.failing: Iterator[bool] = itertools.repeat(False)
        """Plan by plan."""

    def plan(self, layer: int, x_TH: torch.Tensor, real_T: torch.Tensor | None) -> int:
        if next(self.failing):
            raise LaneError("gone")
        return layer

    def send(self, layer: int, x_TH: torch.Tensor, plan: int, y_TH: torch.Tensor) -> torch.Tensor:
        return y_TH.copy_(self.dispatch(plan, x_TH))


@pytest.fixture
def pools(monkeypatch: pytest.MonkeyPatch) -> Iterator[Pools]:
    pools = Pools()
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: next(pools.handles))
    monkeypatch.setattr(torch.cuda, "CUDAGraph", pools.graph)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", contextlib.nullcontext)
    monkeypatch.setattr(KvCache, "nobodys_slot", NUM_PAGES * PAGE - 1)
    gc.disable()
    yield pools
    gc.enable()


def steps(tmp_path: pathlib.Path, routed: Any, pool: PagePool) -> StepGraphs:
    subject = build(tmp_path, "plain", spans(1), pool, torch.bfloat16)
    return StepGraphs(subject.transformer, routed, pool, subject.cache, 8, NUM_PAGES * PAGE)


def spans(count: int) -> list[Span]:
    return [Span(token_ids=[row], start=row, pages=[row, row + 1], by_token=True) for row in range(count)]


def test_what_another_generation_captured_is_gone_at_once_and_its_memory_is_not_asked_for_again(
    tmp_path: pathlib.Path, pools: Pools
) -> None:
    routed = Planned()
    captured = steps(tmp_path, routed, PagePool(NUM_PAGES, PAGE))
    for count in (1, 4, 1):
        captured.run(spans(count))
    (before,) = pools.in_use
    routed.generation += 1
    for count in (4, 1):
        captured.run(spans(count))
    (after,) = pools.in_use
    assert after != before


def test_a_capture_that_failed_is_made_again_in_other_memory(tmp_path: pathlib.Path, pools: Pools) -> None:
    routed = Planned()
    captured = steps(tmp_path, routed, PagePool(NUM_PAGES, PAGE))
    # Two layers without capture, then two with it.
    routed.failing = itertools.chain([False, False, False, True], itertools.repeat(False))
    with pytest.raises(LaneError):
        captured.run(spans(2))
    gc.collect()
    assert pools.graphs
    assert not pools.in_use
    captured.run(spans(2))
    assert pools.in_use


def test_only_what_attends_by_token_is_taken(tmp_path: pathlib.Path, pools: Pools) -> None:
    captured = steps(tmp_path, Planned(), PagePool(NUM_PAGES, PAGE))
    assert captured.takes(spans(8))
    assert not captured.takes(spans(9))
    assert not captured.takes([*spans(2), Span(token_ids=[1], start=0, pages=[3])])
