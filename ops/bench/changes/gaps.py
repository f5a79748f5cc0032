"""What streams saw within a window of time. Pure; all times are seconds of one clock."""

from __future__ import annotations

import dataclasses
import itertools
import math
import statistics
from collections.abc import Iterator, Sequence


@dataclasses.dataclass(frozen=True, slots=True)
class Window:
    begin_s: float
    end_s: float

    @property
    def length_s(self) -> float:
        return self.end_s - self.begin_s

    def touches(self, begin_s: float, end_s: float) -> bool:
        """Whether a span overlaps, by however little."""
        return begin_s < self.end_s and self.begin_s < end_s


@dataclasses.dataclass(slots=True, kw_only=True)
class Answer:
    """One request of a stream; grows while it runs."""

    sent_s: float
    times_s: list[float] = dataclasses.field(default_factory=list)
    """When each token came; those of one chunk came together."""
    ended_s: float = math.inf
    problem: str = ""
    """Why it failed."""
    differs: bool = False
    """From the quiet answer."""
    away_s: Sequence[tuple[float, float]] = ()
    """From when to when nobody listened."""

    def gaps(self) -> Iterator[tuple[float, float]]:
        """From each token to the next. Whoever was away between them has waited since coming back."""
        for before_s, after_s in itertools.pairwise(self.times_s):
            since_s = max((back_s for left_s, back_s in self.away_s if before_s <= left_s < after_s), default=before_s)
            yield min(since_s, after_s), after_s


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """By all streams, in one window."""

    gap_s: float
    """The longest time between two tokens of an answer, of those that overlap the window; counted whole."""
    wait_s: float
    """The longest time from a request to its first token, likewise."""
    tokens_per_s: float


def look(answers: Sequence[Answer], window: Window) -> Seen:
    """0 where nothing overlaps."""
    gaps = [after - before for answer in answers for before, after in answer.gaps() if window.touches(before, after)]
    waits = [a.times_s[0] - a.sent_s for a in answers if a.times_s and window.touches(a.sent_s, a.times_s[0])]
    tokens = sum(window.begin_s <= at_s < window.end_s for answer in answers for at_s in answer.times_s)
    return Seen(
        gap_s=max(gaps, default=0.0),
        wait_s=max(waits, default=0.0),
        tokens_per_s=tokens / window.length_s if window.length_s else 0.0,
    )


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Outcomes:
    """Of the answers that ran in any of some windows."""

    answers: int
    different: int
    """From the quiet answers."""
    problems: tuple[str, ...]
    """Of each that failed."""


def outcomes(answers: Sequence[Answer], windows: Sequence[Window]) -> Outcomes:
    ran = [a for a in answers if any(window.touches(a.sent_s, a.ended_s) for window in windows)]
    return Outcomes(
        answers=len(ran),
        different=sum(answer.differs for answer in ran),
        problems=tuple(answer.problem for answer in ran if answer.problem),
    )


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Windows:
    """Of one change: from its cause to when everything is as it shall be, and quiet times beside it."""

    before: Window
    during: Window
    quiet: Window
    """After it, and as long."""
    duration_s: float
    recovered_s: float | None
    """Of a loss: until the cluster went on without what was lost."""
    others: float
    """Cores that processes of nobody here had during it, on average."""
    quiet_others: float

    def trial(self, answers: Sequence[Answer]) -> Trial:
        """What streams saw; once they have ended, since a gap is known by its end."""
        return Trial(
            duration_s=self.duration_s,
            recovered_s=self.recovered_s,
            others=self.others,
            quiet_others=self.quiet_others,
            before=look(answers, self.before),
            during=look(answers, self.during),
            quiet=look(answers, self.quiet),
        )


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """One change; see `Windows`."""

    duration_s: float
    recovered_s: float | None
    others: float
    quiet_others: float
    before: Seen
    during: Seen
    quiet: Seen


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Middle:
    p50: float
    max: float


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """Over the trials of one kind of change; seconds, and tokens per second."""

    trials: int
    duration_s: Middle
    recovered_s: Middle | None
    others: Middle
    """Cores that they had in either window: where that is not small, they made gaps as well."""
    gap_s: Middle
    quiet_gap_s: Middle
    more_gap_s: Middle
    """Than in the quiet window of the same trial."""
    wait_s: Middle
    quiet_wait_s: Middle
    more_wait_s: Middle
    tokens_per_s: tuple[float, float, float]
    """Medians before, during and after."""


def summarize(trials: Sequence[Trial]) -> Summary:
    """
    Args:
        trials: at least one.
    """
    recovered = [trial.recovered_s for trial in trials if trial.recovered_s is not None]
    return Summary(
        trials=len(trials),
        duration_s=middle([trial.duration_s for trial in trials]),
        recovered_s=middle(recovered) if recovered else None,
        others=middle([max(trial.others, trial.quiet_others) for trial in trials]),
        gap_s=middle([trial.during.gap_s for trial in trials]),
        quiet_gap_s=middle([trial.quiet.gap_s for trial in trials]),
        more_gap_s=middle([trial.during.gap_s - trial.quiet.gap_s for trial in trials]),
        wait_s=middle([trial.during.wait_s for trial in trials]),
        quiet_wait_s=middle([trial.quiet.wait_s for trial in trials]),
        more_wait_s=middle([trial.during.wait_s - trial.quiet.wait_s for trial in trials]),
        tokens_per_s=(
            statistics.median(trial.before.tokens_per_s for trial in trials),
            statistics.median(trial.during.tokens_per_s for trial in trials),
            statistics.median(trial.quiet.tokens_per_s for trial in trials),
        ),
    )


def middle(values: Sequence[float]) -> Middle:
    return Middle(p50=statistics.median(values), max=max(values))
