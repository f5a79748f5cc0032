"""Calls that nobody waits for are made all the same, in order."""

from __future__ import annotations

import functools
import threading
import time

import pytest

from cluster.control.errands import Errands


def test_a_call_that_is_made_at_once_is_waited_for() -> None:
    made: list[int] = []
    errands = Errands(patience_s=10)
    assert all(errands.run(functools.partial(made.append, n)) for n in range(3))
    assert made == [0, 1, 2]


def test_one_that_takes_long_holds_up_nobody_and_the_others_follow_it() -> None:
    made: list[str] = []
    open_again = threading.Event()
    errands = Errands(patience_s=0.1)

    def wait() -> None:
        open_again.wait(30)
        made.append("slow")

    assert not errands.run(wait)
    begun_s = time.monotonic()
    for name in "abc":
        assert not errands.run(functools.partial(made.append, name))
    assert time.monotonic() - begun_s < 0.1, "those behind it are not waited for"
    assert made == []
    open_again.set()
    while not errands.run(lambda: None):
        assert time.monotonic() - begun_s < 30
    assert made == ["slow", "a", "b", "c"]


def test_a_call_that_fails_is_made_again(caplog: pytest.LogCaptureFixture) -> None:
    made: list[int] = []

    def fail_twice() -> None:
        made.append(len(made))
        if len(made) <= 2:
            raise RuntimeError("the answer was lost")

    errands = Errands(patience_s=10, retry_s=0.01)
    assert errands.run(fail_twice)
    assert made == [0, 1, 2]
    assert "the answer was lost" in caplog.text


def test_one_that_always_fails_is_given_up_and_the_next_is_made() -> None:
    made: list[int] = []

    def fail() -> None:
        made.append(len(made))
        raise RuntimeError("the GCS says no")

    errands = Errands(patience_s=10, retry_s=0.01)
    assert errands.run(fail)
    assert 1 < len(made) < 20
    assert errands.run(lambda: None)
