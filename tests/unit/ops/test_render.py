"""What a server says is shown as it is, whatever its words would mean to a terminal's markup."""

from __future__ import annotations

import bisect
import io
import math
import random
from collections.abc import Callable

import pytest
from rich.console import Console

from cluster.frontend.histograms import Histogram
from octet.v1 import octet_pb2 as pb
from ops.render import print_status, quantile
from ops.render_decisions import print_decisions
from ops.render_experts import print_experts

WORDS = "no answer from [/mnt/x] [abc] at :100: [bold]"


def status() -> pb.GetStatusResponse:
    lane = pb.LaneLoad(worker_id="[/l]", wait_s=0.01)
    load = pb.MemberLoad(busy_share=0.5, lanes=[lane])
    decision = pb.ScalingDecision(pool="[/p]", reason=WORDS, outcome=f"{WORDS}!")
    return pb.GetStatusResponse(
        state="[/s]",
        reason=WORDS,
        pools=[
            pb.Pool(name="decode", members=[pb.Member(worker_id="[/d]", state="[/m]", node_id="[/n]")]),
            pb.Pool(name="experts", members=[pb.Member(worker_id="[/e]", state="READY", load=load)]),
        ],
        expert_counts=[pb.ExpertCounts(layer=1, tokens=[1, 2], window_tokens=[1, 2])],
        changes=[pb.Change(kind="[/k]", reason=WORDS, outcome=f"{WORDS}!")],
        autoscaler_enabled=True,
        latest_decisions=[decision],
        decisions=[decision],
    )


@pytest.mark.parametrize(
    ("show", "told"),
    [
        (print_status, ["[/s] (", f"({WORDS})", "[/d]", "[/m]", "[/n]", "[/e]"]),
        (print_experts, ["[/s] (", f"({WORDS})", "[/d]", "[/e]", "[/l]"]),
        (print_decisions, ["[/p]", WORDS, f"{WORDS}!"]),
    ],
)
def test_no_word_of_a_server_is_taken_for_markup(
    show: Callable[[pb.GetStatusResponse, Console], None], told: list[str]
) -> None:
    out = io.StringIO()
    show(status(), Console(file=out, width=200, color_system=None))
    assert [words for words in told if words not in out.getvalue()] == []


def test_an_outcome_of_a_change_is_shown_whole() -> None:
    out = io.StringIO()
    told = status()
    told.changes[0].reason = told.changes[0].outcome = "[/x] [abc]"
    print_status(told, Console(file=out, width=200, color_system=None))
    assert "[/k] ([/x] [abc]) in 0.0 s: failed: [/x] [abc]" in out.getvalue()


def test_quantiles_lie_within_their_buckets() -> None:
    told = Histogram(sorted(random.sample(range(1, 1000), k=30)))
    values = sorted(random.uniform(0, 1000) for _ in range(500))
    for value in values:
        told.note(value)
    histogram = pb.Histogram(bounds=told.bounds, counts=told.counts)
    for q in (0.01, 0.25, 0.5, 0.9, 0.99, 1.0):
        exact = values[max(0, math.ceil(q * len(values)) - 1)]
        bucket = bisect.bisect_left(told.bounds, exact)
        low, high = (0, *told.bounds)[bucket], (*told.bounds, told.bounds[-1])[bucket]
        assert low <= quantile(histogram, q) <= high


def test_values_of_one_bucket_are_taken_to_lie_evenly() -> None:
    histogram = pb.Histogram(bounds=[1.0, 3.0, 10.0], counts=[0, 4, 0, 0])
    assert [quantile(histogram, q) for q in (0.25, 0.5, 1.0)] == [1.5, 2.0, 3.0]
    assert quantile(pb.Histogram(bounds=[1.0, 3.0], counts=[0, 0, 5]), 0.5) == 3.0


def test_latencies_are_shown_once_there_are_some() -> None:
    out = io.StringIO()
    told = status()
    print_status(told, Console(file=out, width=200, color_system=None))
    assert "p50" not in out.getvalue()
    told.request_histograms.ttft_s.CopyFrom(pb.Histogram(bounds=[0.01, 0.03, 0.05], counts=[0, 0, 50, 0]))
    print_status(told, Console(file=out, width=200, color_system=None))
    assert "latencies, ms (p50 / p95 / p99): first token 40 / 49 / 50\n" in out.getvalue()


@pytest.mark.parametrize(("refused", "dropped"), [(0, 0), (3, 0), (0, 4)])
def test_what_knocks_in_vain_is_shown_once_there_is_some(refused: int, dropped: int) -> None:
    out = io.StringIO()
    told = status()
    told.strangers_refused, told.messages_dropped = refused, dropped
    print_status(told, Console(file=out, width=200, color_system=None))
    line = f"between members: {refused} strangers refused, {dropped} messages dropped\n"
    assert (line in out.getvalue()) == ("between members" in out.getvalue()) == bool(refused or dropped)
