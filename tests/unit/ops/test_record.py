from __future__ import annotations

import io
import pathlib
import time
from typing import Any, cast

import numpy as np
import pytest
from rich.console import Console

from octet.client import Client
from octet.errors import UnavailableError
from octet.v1 import octet_pb2 as pb
from ops.record import record, window_between
from router.trace.files import read_trace
from router.trace.values import TraceHeader

HEADER = TraceHeader(model="glm", layers=(3, 4), num_experts=4, experts_per_token=2)


def status(*counts: list[int], balancedness: float = 0.5) -> pb.GetStatusResponse:
    answer = pb.GetStatusResponse(balancedness=balancedness)
    for layer, tokens in zip(HEADER.layers, counts, strict=True):
        answer.expert_counts.add(layer=layer, tokens=tokens)
    answer.pools.add(name="experts", members=[pb.Member(worker_id="experts-0"), pb.Member(worker_id="experts-1")])
    answer.pools[0].members[1].load.CopyFrom(pb.MemberLoad(busy_share=0.75, rows_per_s=12.0))
    return answer


def test_loads_are_what_was_counted_in_between() -> None:
    window = window_between(status([1, 2, 3, 4], [0] * 4), status([1, 5, 3, 9], [2] * 4), HEADER, 10.0, 5.0)
    assert window.loads_LE.tolist() == [[0, 3, 0, 5], [2, 2, 2, 2]]
    assert (window.t_s, window.duration_s, window.tokens, window.balancedness) == (10.0, 5.0, 4.0, 0.5)


def test_members_that_do_not_answer_are_left_out() -> None:
    window = window_between(status([0] * 4, [0] * 4), status([0] * 4, [0] * 4), HEADER, 0.0, 5.0)
    assert list(window.members) == ["experts-1"]
    assert (window.members["experts-1"].busy_share, window.members["experts-1"].kv_share) == (0.75, 0.0)


class FakeClient:
    """A cluster that serves a row with every expert between two answers; those numbered in `silent` say nothing."""

    def __init__(self, *silent: int, interrupted_at: int | None = None) -> None:
        self.asked, self.silent, self.interrupted_at = 0, silent, interrupted_at

    def model_info(self) -> pb.GetModelInfoResponse:
        return pb.GetModelInfoResponse(model="glm", num_experts=4, num_experts_per_tok=2)

    def status(self, **window: Any) -> pb.GetStatusResponse:
        self.asked += 1
        if self.asked == self.interrupted_at:
            raise KeyboardInterrupt
        if self.asked in self.silent:
            return pb.GetStatusResponse()
        return status([self.asked] * 4, [self.asked] * 4)


class ReplacedRouter(FakeClient):
    """Another router service answers from the third time on: at first of one shard only, and never of one that left."""

    def status(self, **window: Any) -> pb.GetStatusResponse:
        answer = super().status(**window)
        if self.asked < 3:
            return answer
        rows = self.asked - (2 if self.asked > 3 else 3)
        answer = status([rows] * 4, [rows + 10] * 4)
        answer.telemetry_incarnation = 1
        if self.asked > 3:
            answer.pools[0].members[0].load.CopyFrom(pb.MemberLoad())
        return answer


def recorded(file: pathlib.Path, client: FakeClient, seconds: float, step_s: float) -> tuple[list[np.ndarray], str]:
    out = io.StringIO()
    record(cast(Client, client), file, seconds, step_s, Console(file=out, width=100))
    return [window.loads_LE for window in read_trace(file).windows], out.getvalue()


@pytest.mark.parametrize("suffix", [".jsonl", ".npz"])
def test_windows_follow_each_other_until_the_time_is_up(tmp_path: pathlib.Path, suffix: str) -> None:
    file = tmp_path / f"trace{suffix}"
    client = FakeClient()
    loads, said = recorded(file, client, seconds=0.5, step_s=0.1)
    assert len(loads) == client.asked - 1
    assert all((load == 1).all() for load in loads)
    trace = read_trace(file)
    assert trace.header == HEADER
    assert trace.windows[-1].t_s + trace.windows[-1].duration_s >= 0.5
    for before, after in zip(trace.windows, trace.windows[1:], strict=False):
        assert before.t_s + before.duration_s == pytest.approx(after.t_s, abs=1e-4)
    assert f"{len(loads)} windows are in" in said.replace("\n", " ")


def test_an_answer_without_telemetry_makes_a_longer_window(tmp_path: pathlib.Path) -> None:
    loads, _ = recorded(tmp_path / "trace.jsonl", FakeClient(2, 3), seconds=0.25, step_s=0.1)
    assert loads[0].tolist() == [[3] * 4] * 2


def test_a_window_in_which_the_router_service_was_replaced_is_left_out(tmp_path: pathlib.Path) -> None:
    loads, said = recorded(tmp_path / "trace.jsonl", ReplacedRouter(), seconds=0.65, step_s=0.1)
    assert len(loads) >= 2
    assert all((load == 1).all() for load in loads)
    assert said.count("are left out: the router service counts anew") == 2


def test_a_window_in_which_counts_fall_is_left_out(tmp_path: pathlib.Path) -> None:
    class Falling(FakeClient):
        def status(self, **window: Any) -> pb.GetStatusResponse:
            super().status(**window)
            fallen = 20 if self.asked < 3 else 0
            answer = status([self.asked + fallen, *[self.asked] * 3], [self.asked] * 4)
            answer.pools[0].members[0].load.CopyFrom(pb.MemberLoad())
            return answer

    loads, said = recorded(tmp_path / "trace.jsonl", Falling(), seconds=0.45, step_s=0.1)
    assert len(loads) >= 2
    assert all((load == 1).all() for load in loads)
    assert said.count("are left out: the router service counts anew") == 1


def test_the_last_window_ends_with_the_time_asked_for(tmp_path: pathlib.Path) -> None:
    file = tmp_path / "trace.jsonl"
    begun_s = time.monotonic()
    recorded(file, FakeClient(), seconds=0.3, step_s=0.2)
    took_s = time.monotonic() - begun_s
    first, last = read_trace(file).windows
    assert first.duration_s >= 0.2
    assert last.t_s + last.duration_s == pytest.approx(0.3, abs=took_s - 0.3 + 1e-3)
    file.unlink()
    recorded(file, FakeClient(), seconds=0.1, step_s=60.0)
    assert len(read_trace(file).windows) == 1


def test_what_nobody_tells_at_the_end_is_left_out(tmp_path: pathlib.Path) -> None:
    loads, said = recorded(tmp_path / "trace.jsonl", FakeClient(3), seconds=0.3, step_s=0.2)
    assert len(loads) == 1
    assert "are left out: the router service tells nothing" in said


def test_a_files_name_is_shown_as_it_is(tmp_path: pathlib.Path) -> None:
    file = tmp_path / "[" / "bold] :smile:[" / "x].jsonl"
    file.parent.mkdir(parents=True)
    _, said = recorded(file, FakeClient(), seconds=0.1, step_s=0.1)
    assert f"1 windows are in {file}".replace(" ", "") in "".join(said.split())


def test_an_interrupt_keeps_what_was_recorded(tmp_path: pathlib.Path) -> None:
    loads, _ = recorded(tmp_path / "trace.npz", FakeClient(interrupted_at=4), seconds=60, step_s=0.1)
    assert len(loads) == 2


def test_a_cluster_without_telemetry_cannot_be_recorded(tmp_path: pathlib.Path) -> None:
    with pytest.raises(UnavailableError):
        recorded(tmp_path / "trace.jsonl", FakeClient(1), seconds=1, step_s=0.1)
    assert not (tmp_path / "trace.jsonl").exists()
