"""Inter-token latencies of running streams, with and without long prompts beside them. Pure.

A gap is the time between two arrivals of one stream. Those count in which every stream ran: from the last one's first
token to the first one's end. In a disturbed phase, of these those count that overlap the time in which at least one
long prompt had been sent and had no token yet.
"""

from __future__ import annotations

import dataclasses
import itertools
import statistics
from collections.abc import Iterator, Sequence

from octet.errors import ConfigError
from ops.bench.summary import percentiles


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Phase:
    """What was seen, in seconds of one clock."""

    streams: Sequence[Sequence[float]]
    """When something arrived."""
    long: Sequence[tuple[float, float]]
    """When each long prompt was sent, and when its first token came."""

    @property
    def gaps_s(self) -> list[float]:
        start_s, end_s = max(times[0] for times in self.streams), min(times[-1] for times in self.streams)
        return [
            after - before
            for times in self.streams
            for before, after in itertools.pairwise(times)
            if before >= start_s and after <= end_s and self._counts(before, after)
        ]

    @property
    def long_ttft_s(self) -> list[float]:
        return [first_s - sent_s for sent_s, first_s in self.long]

    def _counts(self, before: float, after: float) -> bool:
        return not self.long or any(sent_s < after and before < first_s for sent_s, first_s in self.long)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Latency:
    p50_s: float
    p99_s: float
    longest_s: float
    gaps: int


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """One contestant over all rounds."""

    quiet: Latency
    disturbed: Latency
    p99_ratios: tuple[float, ...]
    """Disturbed over quiet, round by round."""
    long_ttft_s: float
    """Median over the long prompts."""

    @property
    def p99_ratio(self) -> float:
        return statistics.median(self.p99_ratios)


def compare(rounds: Sequence[tuple[Phase, Phase]]) -> Comparison:
    """
    Args:
        rounds: a quiet and a disturbed phase each.

    Raises: ConfigError if no gap counts, as when the first streams end before the last one has its first token.
    """
    return Comparison(
        quiet=latency([gap for quiet, _ in rounds for gap in quiet.gaps_s]),
        disturbed=latency([gap for _, disturbed in rounds for gap in disturbed.gaps_s]),
        p99_ratios=tuple(_ratios(rounds)),
        long_ttft_s=statistics.median(ttft for _, disturbed in rounds for ttft in disturbed.long_ttft_s),
    )


def latency(gaps_s: Sequence[float]) -> Latency:
    if not gaps_s:
        raise ConfigError(
            "bench interference --new-tokens", "streams that ended before all of them ran", "more of them"
        )
    of_all = percentiles(gaps_s)
    return Latency(p50_s=of_all.p50, p99_s=of_all.p99, longest_s=max(gaps_s), gaps=len(gaps_s))


def _ratios(rounds: Sequence[tuple[Phase, Phase]]) -> Iterator[float]:
    for quiet, disturbed in rounds:
        yield latency(disturbed.gaps_s).p99_s / latency(quiet.gaps_s).p99_s
