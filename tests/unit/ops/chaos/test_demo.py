"""What `octet demo --chaos` says of its kills."""

from __future__ import annotations

import random

import pytest

from ops.chaos.demo import done_without, line_of
from ops.chaos.history import Injected

BEGIN_S = random.uniform(0, 2e9)


def kill(*, fired: bool = True, note: str = "") -> Injected:
    return Injected(
        at_s=BEGIN_S + 2, what="kill experts-1", kind="kill experts", until_s=BEGIN_S + 62.5, fired=fired, note=note
    )


@pytest.mark.parametrize(
    ("fault", "well", "said"),
    [
        (kill(), True, "gone on without it after 60.50 s"),
        (kill(note="it was never done without"), False, "it was never done without, for 60.50 s"),
        (kill(fired=False, note="nobody [/x] is there"), False, "it was not killed: nobody [/x] is there"),
    ],
)
def test_only_a_kill_that_came_about_and_was_done_without_counts(fault: Injected, well: bool, said: str) -> None:
    assert done_without(fault) == well
    assert line_of(fault, BEGIN_S) == f"  2.0 s  kill experts-1; {said}"
