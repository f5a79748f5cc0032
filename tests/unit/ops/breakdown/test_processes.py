"""An object in a process of its own, and what becomes of it when its other end is gone."""

from __future__ import annotations

import multiprocessing
import os

import pytest

from octet.errors import StartupError
from ops.bench.breakdown.processes import Remote, _host


def test_a_call_is_answered_or_says_why_not() -> None:
    remote = Remote("list", list)
    try:
        remote.call("append", 3)
        assert remote.call("pop") == 3
        with pytest.raises(StartupError, match="pop: IndexError"):
            remote.call("pop")
    finally:
        remote.end()


class Mortal:
    def die(self) -> None:
        os._exit(0)


def test_a_process_that_is_gone_is_named() -> None:
    remote = Remote("mortal", Mortal)
    try:
        for _ in range(2):
            with pytest.raises(StartupError, match="mortal: its process is gone"):
                remote.call("die")
    finally:
        remote.end()


@pytest.mark.parametrize("method", ["pop", "copy"])
def test_nobody_hears_of_an_answer_to_one_who_is_gone(method: str) -> None:
    ours, theirs = multiprocessing.Pipe()
    ours.send((method, ()))
    ours.close()
    _host(theirs, list, ())
    theirs.close()
