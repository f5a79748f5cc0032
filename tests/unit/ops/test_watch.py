"""A page that is drawn anew until it is interrupted."""

from __future__ import annotations

import io

import grpc
from rich.console import Console

from octet.resumption import CallError
from octet.v1 import octet_pb2 as pb
from ops.render import print_json, print_status
from ops.watch import Show, watch


def watched(answers: list[pb.GetStatusResponse | CallError], show: Show) -> tuple[list[str], list[float]]:
    """What was shown of each answer, and the pauses behind them; it is interrupted in the last one."""
    out, pages, pauses = io.StringIO(), list[str](), list[float]()
    coming = iter(answers)

    def ask() -> pb.GetStatusResponse:
        answer = next(coming)
        if isinstance(answer, CallError):
            raise answer
        return answer

    def pause(seconds: float) -> None:
        pages.append(out.getvalue())
        out.seek(0)
        out.truncate()
        pauses.append(seconds)
        if len(pages) == len(answers):
            raise KeyboardInterrupt

    watch(ask, 2.5, show, Console(file=out, width=100, force_terminal=True, color_system=None), pause)
    return pages, pauses


def test_each_page_takes_the_place_of_the_last_one() -> None:
    answers = [pb.GetStatusResponse(state="READY", epoch=1), pb.GetStatusResponse(state="DEGRADED", epoch=2)]
    pages, pauses = watched(list(answers), print_status)
    for page, words in zip(pages, ("READY  epoch 1 ", "DEGRADED  epoch 2 "), strict=True):
        # Home, and everything behind it is gone.
        assert page.startswith("\x1b[2J\x1b[H")
        assert words in page
    assert pauses == [2.5, 2.5]


def test_a_cluster_that_does_not_answer_is_asked_again() -> None:
    gone = CallError(grpc.StatusCode.UNAVAILABLE, "nobody listens at [::1]")
    pages, _ = watched([gone, pb.GetStatusResponse(state="READY")], print_status)
    assert "octet: UNAVAILABLE: nobody listens at [::1]" in pages[0]
    assert "READY" in pages[1]


def test_json_is_told_as_it_is() -> None:
    pages, _ = watched([pb.GetStatusResponse(state="READY", reason="[bold]" + "x" * 200)], print_json)
    assert '"reason": "[bold]' + "x" * 200 in pages[0]
