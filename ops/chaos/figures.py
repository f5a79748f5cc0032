"""What faults cost: the longest gap in any stream, and tokens per second before, during and after. Pure."""

from __future__ import annotations

import collections
import dataclasses
import statistics
from collections.abc import Iterable, Mapping, Sequence

from ops.bench.changes.gaps import Answer, Window, look
from ops.chaos.history import History, Injected, Stream

_TAIL_S = 0.25
_LEAST_S = 1.0
"""A window begins with its fault, ends a tail after its effect, and lasts at least so long."""
_BEFORE_S = 2.0


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """Of one fault. Seconds, and tokens per second."""

    kind: str
    gap_s: float
    wait_s: float
    """The longest time to a first token."""
    before: float
    during: float
    after: float


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class KindCost:
    """Over the faults of one kind: medians, and the longest."""

    faults: int
    gap_p50_s: float
    gap_max_s: float
    wait_p50_s: float
    wait_max_s: float
    before: float
    during: float
    after: float


def answers_of(streams: Iterable[Stream]) -> list[Answer]:
    """One for each choice, as `ops.bench.changes` looks at them."""
    found = []
    for stream in streams:
        ended_s = stream.endings[0][0] if stream.endings else float("inf")
        for choice in range(stream.question.num_choices):
            deltas = [delta for delta in stream.deltas if delta.choice == choice]
            times_s = [delta.at_s for delta in deltas for _ in delta.token_ids]
            found.append(Answer(sent_s=stream.sent_s, times_s=times_s, ended_s=ended_s, away_s=stream.away_s))
    return found


def window_of(fault: Injected) -> Window:
    """The time in which a fault is felt."""
    return Window(fault.at_s, max(fault.until_s + _TAIL_S, fault.at_s + _LEAST_S))


def costs(history: History) -> list[Cost]:
    """Of every fault that was alone in its time: what others did is not counted as its own."""
    answers = answers_of(history.streams)
    struck = [fault for fault in history.faults if fault.fired]
    found = []
    for fault in struck:
        window = window_of(fault)
        others = [window_of(other) for other in struck if other is not fault]
        if any(window.touches(other.begin_s, other.end_s) for other in others):
            continue
        seen = look(answers, window)
        last_s = min([other.begin_s for other in others if other.begin_s >= window.end_s], default=history.end_s)
        first_s = max([other.end_s for other in others if other.end_s <= window.begin_s], default=history.begin_s)
        found.append(
            Cost(
                kind=fault.kind,
                gap_s=seen.gap_s,
                wait_s=seen.wait_s,
                before=_rate(answers, max(first_s, window.begin_s - _BEFORE_S), window.begin_s),
                during=seen.tokens_per_s,
                after=_rate(answers, window.end_s, last_s),
            )
        )
    return found


def by_kind(found: Iterable[Cost]) -> Mapping[str, KindCost]:
    """In the order of the kinds' names."""
    kinds: dict[str, list[Cost]] = collections.defaultdict(list)
    for cost in found:
        kinds[cost.kind].append(cost)
    return {
        kind: KindCost(
            faults=len(of_kind),
            gap_p50_s=statistics.median(cost.gap_s for cost in of_kind),
            gap_max_s=max(cost.gap_s for cost in of_kind),
            wait_p50_s=statistics.median(cost.wait_s for cost in of_kind),
            wait_max_s=max(cost.wait_s for cost in of_kind),
            before=statistics.median(cost.before for cost in of_kind),
            during=statistics.median(cost.during for cost in of_kind),
            after=statistics.median(cost.after for cost in of_kind),
        )
        for kind, of_kind in sorted(kinds.items())
    }


def quiet_gap_s(history: History) -> float:
    """The longest gap of any stream that touches no fault: what the machine does by itself."""
    windows = [window_of(fault) for fault in history.faults if fault.fired]
    gaps = [
        later - earlier
        for answer in answers_of(history.streams)
        for earlier, later in answer.gaps()
        if not any(window.touches(earlier, later) for window in windows)
    ]
    return max(gaps, default=0.0)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Resumed:
    """How many streams took more than one call."""

    streams: int
    left: int
    """Of them: their users left, and came back."""

    def __str__(self) -> str:
        return f"{self.streams} resumed ({self.left} of them left by their users)"


def resumed(streams: Iterable[Stream]) -> Resumed:
    several = [stream for stream in streams if stream.resumes]
    return Resumed(streams=len(several), left=sum(bool(stream.away_s) for stream in several))


def _rate(answers: Sequence[Answer], begin_s: float, end_s: float) -> float:
    return look(answers, Window(begin_s, end_s)).tokens_per_s if end_s > begin_s else 0.0
