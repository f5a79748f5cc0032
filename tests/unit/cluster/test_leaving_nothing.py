"""What the tests of leaks themselves notice."""

from __future__ import annotations

import threading

import pytest

from tests.unit.cluster.leaving_nothing import nothing_left_of


class Thing:
    pass


class Keeper:
    def __init__(self, kept: Thing) -> None:
        self.kept = kept


def test_what_is_kept_is_named_with_who_keeps_it() -> None:
    keepers = []
    with pytest.raises(pytest.fail.Exception, match="1 objects are left: Thing, held by Keeper"):  # noqa: SIM117
        with nothing_left_of(Thing, within_s=0.0):
            keepers.append(Keeper(Thing()))


def test_what_was_there_before_is_not_asked_about() -> None:
    earlier = Thing()
    with nothing_left_of(Thing, within_s=0.0):
        Thing()
    assert earlier


def test_what_is_let_go_soon_after_is_waited_for() -> None:
    keepers = []
    with nothing_left_of(Thing):
        keepers.append(Thing())
        threading.Timer(0.3, keepers.clear).start()
