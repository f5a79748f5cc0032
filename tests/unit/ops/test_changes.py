from __future__ import annotations

import io

import pytest
from rich.console import Console

from octet.errors import RequestError
from octet.v1 import octet_pb2 as pb
from ops.changes import parse_sizes, print_changes, print_rebalance


def console() -> Console:
    return Console(file=io.StringIO(), width=80)


def printed(to: Console) -> str:
    assert isinstance(to.file, io.StringIO)
    return to.file.getvalue()


def test_sizes_are_given_by_pool() -> None:
    assert parse_sizes(["experts=4", "decode=2"]) == {"experts": 4, "decode": 2}


@pytest.mark.parametrize(
    "texts",
    [
        ["experts"],
        ["experts=many"],
        ["experts=-1"],
        ["experts=²"],
        ["experts=1", "experts=2"],
        ["self=3"],
        ["timeout_s=5"],
    ],
)
def test_what_is_no_size_is_refused(texts: list[str]) -> None:
    with pytest.raises(RequestError, match="POOL=SIZE"):
        parse_sizes(texts)


def test_moves_are_shown_by_their_way() -> None:
    moves = [pb.Move(layer=1, expert=expert, to="experts-1", **{"from": "experts-0"}) for expert in (3, 7)]
    moves.append(pb.Move(layer=2, expert=5, to="experts-0"))
    to = console()
    print_rebalance(pb.RebalanceResponse(moves=moves, bytes=3 * 2**20, placement_version=4), dry_run=True, console=to)
    lines = printed(to).splitlines()
    assert lines[0].startswith("3 experts would move (3.0 MiB)")
    assert [line.split() for line in lines[-2:]] == [
        ["checkpoint", "experts-0", "1", "2:5"],
        ["experts-0", "experts-1", "2", "1:3", "1:7"],
    ]


def test_nothing_to_move_is_said_with_the_reason() -> None:
    to = console()
    print_rebalance(pb.RebalanceResponse(reason="no move pays"), dry_run=False, console=to)
    assert printed(to) == "nothing to move: no move pays\n"


def test_the_newest_changes_come_first_and_failures_are_called_so() -> None:
    changes = [
        pb.Change(at_s=n, kind="scale", reason="asked", outcome=f"number {n}", succeeded=n != 6) for n in range(7)
    ]
    to = console()
    print_changes(pb.GetStatusResponse(changes=changes, change_under_way="rebalance"), to)
    lines = printed(to).splitlines()
    assert lines[0] == "under way: rebalance"
    assert "failed: number 6" in lines[1]
    assert len(lines) == 6
