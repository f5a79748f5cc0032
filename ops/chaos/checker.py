"""What must hold of every history, whatever happened. Pure.

Each function names what it finds as violations of one kind; `check` is all of them.
"""

from __future__ import annotations

import collections
import itertools
from collections.abc import Callable, Sequence

from ops.chaos.history import Delta, Facts, History, Stream
from ops.chaos.journals import Journals
from ops.chaos.violations import Found, Kind, Violation, about

EPSILON_S = 2.0
"""How long after its deadline a request may end for its client: a busy machine is slow to say so."""
_REFUSALS = ("UNAVAILABLE", "RESOURCE_EXHAUSTED")
_FINISHED = ("STOP", "LENGTH")


def check(history: History, epsilon_s: float = EPSILON_S) -> list[Violation]:
    """Everything that should not be. An empty list is a run in which every promise was kept."""
    found: list[Violation] = []
    of_stream: tuple[Callable[[Stream], Found], ...] = (
        _offsets,
        _final,
        _status,
        _answer,
        _usage,
        lambda stream: _deadline(stream, epsilon_s),
    )
    for stream in history.streams:
        for look in of_stream:
            found += look(stream)
    found += _served(history.streams)
    if history.commits is not None:
        journals = Journals(history.commits)
        found += journals.violations
        for stream in history.streams:
            found += journals.differences(stream)
    found += _epochs(history)
    found += baseline(history.before, history.after, history.complete, history.host_lost)
    return found


def _offsets(stream: Stream) -> Found:
    """Offsets are contiguous: no token is missing and none is told twice."""
    told: collections.Counter[int] = collections.Counter()
    for delta in stream.deltas:
        if delta.offset != told[delta.choice]:
            found = f"choice {delta.choice} goes on at {delta.offset} after {told[delta.choice]} tokens"
            yield about(stream, "gap in a stream", found)
            return
        told[delta.choice] += len(delta.token_ids)


def _final(stream: Stream) -> Found:
    """Deltas concatenate to the answer that is told when it is asked for whole."""
    if stream.final is None:
        return
    for choice, ids in enumerate(stream.final):
        if stream.ids(choice) != ids:
            yield about(stream, "deltas are not the answer", _difference(choice, stream.ids(choice), ids))


def _status(stream: Stream) -> Found:
    """One end for the request, one for each choice, and nothing after either. What was accepted is finished."""
    if len(stream.endings) != 1:
        names = ", ".join(name for _, name in stream.endings) or "none"
        yield about(stream, "terminal status", f"{len(stream.endings)} of them ({names})")
        return
    ((ended_s, status),) = stream.endings
    if any(delta.at_s > ended_s for delta in stream.deltas):
        yield about(stream, "terminal status", "tokens came after the end")
    if not stream.accepted and status in _REFUSALS:
        return
    if status != "OK":
        yield about(stream, "not finished", status)
        return
    for choice in range(stream.question.num_choices):
        ends = [number for number, delta in enumerate(_deltas(stream, choice)) if delta.finish_reason]
        reasons = [delta.finish_reason for delta in _deltas(stream, choice) if delta.finish_reason]
        if len(ends) != 1:
            yield about(stream, "terminal status", f"choice {choice} ended {len(ends)} times")
        elif reasons[0] not in _FINISHED:
            yield about(stream, "not finished", f"choice {choice}: {reasons[0]}")
        elif any(delta.token_ids for delta in _deltas(stream, choice)[ends[0] + 1 :]):
            yield about(stream, "terminal status", f"choice {choice} went on after its end")


def _answer(stream: Stream) -> Found:
    """What came is what comes without faults, or the beginning of it."""
    kind: Kind = "greedy answer differs" if stream.question.seed is None else "sampled answer differs"
    whole = bool(stream.endings) and stream.endings[-1][1] == "OK"
    for choice, expected in enumerate(stream.question.expected):
        found = stream.ids(choice)
        if found != (expected if whole else expected[: len(found)]):
            yield about(stream, kind, _difference(choice, found, expected))


def _usage(stream: Stream) -> Found:
    """The last chunk counts what came."""
    if not stream.endings or stream.endings[-1][1] != "OK":
        return
    told = [delta.usage for delta in stream.deltas if delta.usage is not None]
    seen = (len(stream.question.prompt), sum(len(delta.token_ids) for delta in stream.deltas))
    if told != [seen]:
        yield about(stream, "usage", f"{told or 'none'}, seen {seen}")


def _deadline(stream: Stream, epsilon_s: float) -> Found:
    """By its deadline, and a little for the way back."""
    for ended_s, _ in stream.endings:
        late_s = ended_s - stream.sent_s - stream.timeout_s
        if late_s > epsilon_s:
            yield about(stream, "too late", f"{late_s:.2f} s after its deadline")


def _served(streams: Sequence[Stream]) -> Found:
    """At least one was: of streams that are all refused, none breaks a promise. An accepted one has to finish."""
    if not any(stream.accepted for stream in streams):
        yield Violation(kind="nobody was served", subject="the users", found=f"none of {len(streams)} streams accepted")


def _epochs(history: History) -> Found:
    """Epochs only rise."""
    epochs = [history.before.epoch, *(sample.epoch for sample in history.samples), history.after.epoch]
    for earlier, later in itertools.pairwise(epochs):
        if later < earlier:
            yield Violation(kind="epoch went back", subject="the cluster", found=f"{later} after {earlier}")


def baseline(before: Facts, after: Facts, complete: bool, host_lost: bool = False) -> Found:
    """Nothing is held any more that was not held before.

    Args:
        complete: whether members that were lost had to be replaced by now.
        host_lost: those for whom no other host has room need not be, if the cluster says so.
    """

    def found(subject: str, what: str) -> Violation:
        return Violation(kind="not at baseline", subject=subject, found=what)

    for subject in ("live_requests", "pages", "leases", "sequences"):
        if getattr(after, subject) > getattr(before, subject):
            yield found(subject, f"{getattr(before, subject)} before, {getattr(after, subject)} after")
    if not after.least_slots <= after.slots <= after.most_slots:
        yield found("slots", f"{after.slots} filled, expected {after.least_slots} to {after.most_slots}")
    if not complete:
        return
    if host_lost and after.unplaced:
        if after.state != "DEGRADED":
            yield found("state", f"{after.state}, though no node has room for all")
        return
    if after.state != before.state:
        yield found("state", f"{before.state} before, {after.state} after")
    for subject in ("sizes", "actors", "processes"):
        was, now = getattr(before, subject), getattr(after, subject)
        for name in sorted({*was, *now}):
            if was.get(name, 0) != now.get(name, 0):
                yield found(subject, f"{was.get(name, 0)} × {name} before, {now.get(name, 0)} after")
    for subject in ("bundles", "ports"):
        if getattr(after, subject) > getattr(before, subject):
            yield found(subject, f"{getattr(before, subject)} before, {getattr(after, subject)} after")


def _deltas(stream: Stream, choice: int) -> list[Delta]:
    return [delta for delta in stream.deltas if delta.choice == choice]


def _difference(choice: int, found: Sequence[int], expected: Sequence[int]) -> str:
    at = next((i for i, (f, e) in enumerate(zip(found, expected, strict=False)) if f != e), None)
    if at is None:
        return f"choice {choice}: {len(found)} tokens instead of {len(expected)}"
    return f"choice {choice}: token {at} is {found[at]} instead of {expected[at]}"
