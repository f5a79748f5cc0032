"""A good history passes; a planted violation of each kind is caught, and is the only one that is."""

from __future__ import annotations

import dataclasses
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import given

from ops.chaos.checker import check
from ops.chaos.history import Delta, History, Sample
from ops.chaos.violations import KINDS
from tests.unit.ops.chaos.histories import (
    EXPECTED,
    accept,
    commit,
    end,
    facts,
    history,
    journal,
    question,
    served,
    stream,
    workers,
)

MEMBERS = workers("prefill-0", "decode-0", "decode-1")
ANOTHER = workers("decode-0", frontend="f1")
"""Another frontend has taken the first one's place."""
TOKENS = [commit(index) for index in range(len(EXPECTED))]


def delta(offset: int, *token_ids: int, at_s: float = 101.0, **changes: Any) -> Delta:
    return Delta(at_s=at_s, choice=0, offset=offset, token_ids=token_ids, **changes)


REFUSED = stream(request_id="r9", accepted=False, deltas=[], endings=[(100.1, "RESOURCE_EXHAUSTED")], final=None)
LAST = delta(2, 7, 8, at_s=102.0, finish_reason="LENGTH", usage=(3, 4))


def kinds(found: History) -> list[str]:
    return sorted({violation.kind for violation in check(found)})


def test_a_good_history_has_no_violation() -> None:
    assert check(history(stream(), stream(question=question(name="sampled 0", seed=9, temperature=1.0)))) == []


def test_a_stream_that_was_resumed_and_restarted_is_as_good() -> None:
    commits = [
        MEMBERS,
        accept(),
        commit(0, "prefill-0", attempt=1),
        commit(1, attempt=1),
        workers("prefill-0", "decode-1"),
        commit(2, "prefill-0", attempt=2),
        commit(3, "decode-1", attempt=2),
        end(),
    ]
    assert check(history(stream(calls_s=[100.0, 101.5]), commits=commits)) == []


def test_a_stream_that_went_on_at_another_frontend_is_as_good() -> None:
    commits = [
        MEMBERS,
        accept(),
        commit(0, "prefill-0"),
        commit(1),
        workers("prefill-0", "decode-1", frontend="f1"),
        accept(2, frontend="f1"),
        commit(2, "prefill-0", attempt=1, frontend="f1"),
        commit(3, "decode-1", attempt=1, frontend="f1"),
        end(frontend="f1"),
    ]
    assert check(history(stream(), commits=commits)) == []


def test_a_request_that_was_refused_at_once_is_no_violation() -> None:
    assert check(history(stream(), REFUSED)) == []


def test_an_answer_that_the_lost_frontend_had_kept_may_be_computed_again() -> None:
    again = [accept(frontend="f1"), *(commit(index, frontend="f1") for index in range(4)), end(frontend="f1")]
    assert check(history(commits=[*served(), ANOTHER, *again])) == []


@pytest.mark.parametrize("outcome", ["failed", "cancelled"])
def test_what_failed_or_was_cancelled_may_begin_anew(outcome: str) -> None:
    assert check(history(commits=[MEMBERS, accept(), commit(0), end(outcome), accept(1), *TOKENS[1:], end()])) == []


def test_two_lost_frontends_leave_what_they_had_without_an_end() -> None:
    commits = [
        *(MEMBERS, accept(), commit(0)),
        *(ANOTHER, accept(1, frontend="f1"), commit(1, frontend="f1")),
        *(workers("decode-0", frontend="f2"), accept(2, frontend="f2"), commit(2, frontend="f2")),
        *(commit(3, frontend="f2"), end(frontend="f2")),
    ]
    assert check(history(commits=commits)) == []


def test_where_nothing_is_written_down_streams_are_compared_with_nothing() -> None:
    assert check(history(commits=None)) == []


@pytest.mark.parametrize(
    ("kind", "planted"),
    [
        ("gap in a stream", history(stream(deltas=[delta(0, 5, 6), dataclasses.replace(LAST, offset=3)]))),
        ("deltas are not the answer", history(stream(final=((5, 6, 7, 9),)))),
        ("terminal status", history(stream(endings=[]))),
        ("terminal status", history(stream(endings=[(102.5, "OK"), (102.6, "OK")]))),
        ("terminal status", history(stream(endings=[(101.5, "OK")]))),
        ("terminal status", history(stream(deltas=[delta(0, 5, 6, finish_reason="STOP"), LAST]))),
        ("not finished", history(stream(deltas=[delta(0, 5, 6)], endings=[(105.0, "UNAVAILABLE")], final=None))),
        ("not finished", history(stream(deltas=[delta(0, 5)], endings=[(109.0, "DEADLINE_EXCEEDED")], final=None))),
        ("greedy answer differs", history(stream(question=question(expected=((5, 6, 7, 9),))))),
        ("sampled answer differs", history(stream(question=question(seed=3, expected=((5, 9, 7, 8),))))),
        ("usage", history(stream(deltas=[delta(0, 5, 6), dataclasses.replace(LAST, usage=(3, 5))]))),
        ("usage", history(stream(deltas=[delta(0, 5, 6), dataclasses.replace(LAST, usage=None)]))),
        ("too late", history(stream(endings=[(112.5, "OK")]))),
        ("old epoch committed", journal(MEMBERS, accept(), commit(0, "decode-7"), end())),
        (
            "old epoch committed",
            journal(MEMBERS, accept(), commit(0), workers("decode-1"), commit(1, "decode-0"), end()),
        ),
        (
            "old epoch committed",
            journal(MEMBERS, accept(), commit(0, attempt=1), commit(1, attempt=2), commit(2, attempt=1), end()),
        ),
        ("journal out of order", journal(MEMBERS, accept(), commit(0), commit(0), end())),
        ("journal out of order", journal(MEMBERS, accept(), commit(0), commit(2), end())),
        ("journal out of order", journal(MEMBERS, accept(2), commit(0), end())),
        ("journal out of order", journal(MEMBERS, accept(), end(), commit(0))),
        ("journal out of order", journal(MEMBERS, commit(0))),
        ("request ended not once", journal(MEMBERS, accept())),
        ("request ended not once", journal(MEMBERS, accept(), end(), end())),
        ("request ended not once", journal(MEMBERS, accept(), commit(0), accept(), commit(0), end())),
        ("request ended not once", journal(MEMBERS, accept(), end("failed"), end("failed"), accept(), end())),
        ("request ended not once", journal(MEMBERS, accept(), accept(), commit(0), ANOTHER)),
        ("journal out of order", journal(MEMBERS, end())),
        ("computed twice", journal(MEMBERS, accept(), commit(0), end(), accept(), commit(0), end())),
        ("journal and stream differ", history(commits=[])),
        ("journal and stream differ", history(commits=[MEMBERS])),
        ("journal and stream differ", history(commits=served("r1"))),
        ("journal and stream differ", history(commits=[MEMBERS, accept(), *TOKENS, end("failed")])),
        ("journal and stream differ", history(commits=[MEMBERS, accept(), *TOKENS, end("cancelled")])),
        ("journal and stream differ", history(commits=[MEMBERS, accept(), *TOKENS[:3], end()])),
        ("journal and stream differ", history(commits=[MEMBERS, accept(2), *TOKENS[2:], end()])),
        (
            "journal and stream differ",
            history(commits=[MEMBERS, accept(), *TOKENS, end("failed"), accept(), *TOKENS[:2], end()]),
        ),
        (
            "journal and stream differ",
            history(commits=[*served(), ANOTHER, accept(frontend="f1"), end("failed", "f1")]),
        ),
        ("journal and stream differ", history(commits=[MEMBERS, accept(), *TOKENS, ANOTHER])),
        ("nobody was served", history(REFUSED, REFUSED, commits=[])),
        ("nobody was served", history(REFUSED, commits=None)),
        ("nobody was served", history(streams=[], commits=[])),
        ("epoch went back", history(samples=[Sample(at_s=101.0, epoch=3, state="READY", sizes={})])),
        ("not at baseline", history(after=facts(epoch=2, live_requests=1))),
        ("not at baseline", history(after=facts(epoch=2, pages=3))),
        ("not at baseline", history(after=facts(epoch=2, leases=1))),
        ("not at baseline", history(after=facts(epoch=2, sequences=1))),
        ("not at baseline", history(after=facts(epoch=2, slots=31))),
        ("not at baseline", history(after=facts(epoch=2, slots=41))),
        ("not at baseline", history(after=facts(epoch=2, state="DEGRADED"))),
        ("not at baseline", history(after=facts(epoch=2, sizes={"prefill": 1, "decode": 1, "experts": 2}))),
        ("not at baseline", history(after=facts(epoch=2, actors={**facts().actors, "experts": 3}))),
        ("not at baseline", history(after=facts(epoch=2, processes={**facts().processes, "ExpertShard": 3}))),
        ("not at baseline", history(after=facts(epoch=2, bundles=6))),
        ("not at baseline", history(after=facts(epoch=2, ports=21))),
    ],
)
def test_a_planted_violation_is_caught(kind: str, planted: History) -> None:
    assert kinds(planted) == [kind]


def test_every_kind_of_violation_is_planted_above() -> None:
    (mark,) = [mark for mark in getattr(test_a_planted_violation_is_caught, "pytestmark") if mark.name == "parametrize"]  # noqa: B009
    assert {kind for kind, _ in mark.args[1]} == set(KINDS)


def test_what_was_not_to_be_replaced_may_be_missing() -> None:
    found = history(complete=False, after=facts(epoch=2, state="DEGRADED", sizes={"decode": 1}, actors={}, ports=3))
    assert check(found) == []
    leak = history(complete=False, after=facts(epoch=2, pages=1))
    assert kinds(leak) == ["not at baseline"]


def test_what_no_host_that_is_left_has_room_for_may_be_missing_if_the_cluster_says_so() -> None:
    missing = {"epoch": 2, "sizes": {"prefill": 1, "decode": 1, "experts": 2}, "unplaced": 1}
    assert check(history(host_lost=True, after=facts(state="DEGRADED", **missing))) == []
    assert kinds(history(host_lost=True, after=facts(state="READY", **missing))) == ["not at baseline"]
    assert kinds(history(after=facts(state="DEGRADED", **missing))) == ["not at baseline"]
    assert kinds(history(host_lost=True, after=facts(epoch=2, state="DEGRADED"))) == ["not at baseline"]


@given(st.data())
def test_any_change_of_the_tokens_that_a_client_saw_is_caught(data: st.DataObject) -> None:
    ids = list(EXPECTED)
    how = data.draw(st.sampled_from(["drop", "repeat", "swap", "other"]))
    at = data.draw(st.integers(0, len(ids) - 2))
    if how == "drop":
        del ids[at]
    elif how == "repeat":
        ids.insert(at, ids[at])
    elif how == "swap":
        ids[at], ids[at + 1] = ids[at + 1], ids[at]
    else:
        ids[at] += 100
    cut = data.draw(st.integers(0, len(ids)))
    last = delta(cut, *ids[cut:], at_s=102.0, finish_reason="LENGTH", usage=(3, len(ids)))
    assert "greedy answer differs" in kinds(history(stream(deltas=[delta(0, *ids[:cut]), last])))
