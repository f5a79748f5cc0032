"""What a server says is shown as it is, whatever its words would mean to a terminal's markup."""

from __future__ import annotations

import io
from collections.abc import Callable

import pytest
from rich.console import Console

from octet.v1 import octet_pb2 as pb
from ops.render import print_status
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
