"""One change at a time, and what is on record of it."""

from __future__ import annotations

import pytest

from cluster.control.change_log import ChangeLog
from octet.errors import UnavailableError


async def test_a_change_is_under_way_until_it_ends_and_on_record_from_then_on() -> None:
    log, noted = ChangeLog(), list[str]()
    log.note = lambda: noted.append(log.under_way)
    async with log.change("scale", "for a test") as outcome:
        assert (log.under_way, log.busy, log.records) == ("scale", True, ())
        outcome.append("done")
    assert (log.under_way, log.busy) == ("", False)
    assert noted[0] == "scale"
    assert noted[-1] == ""
    with pytest.raises(UnavailableError):
        async with log.change("rebalance", "for a test"):
            raise UnavailableError("not now")
    assert (log.under_way, log.busy) == ("", False)
    assert [(one.kind, one.succeeded, one.outcome) for one in log.records] == [
        ("scale", True, "done"),
        ("rebalance", False, "not now"),
    ]


async def test_what_only_fails_on_record_is_there_only_where_it_has_failed() -> None:
    log = ChangeLog()
    async with log.attempt("scale", "for a test", only_failure=True):
        pass
    assert not log.records
    with pytest.raises(UnavailableError):
        async with log.attempt("scale", "for a test", only_failure=True):
            raise UnavailableError("no node has room")
    assert [one.outcome for one in log.records] == ["no node has room"]
