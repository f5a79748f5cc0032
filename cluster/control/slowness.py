"""Who is slow, and who is too slow to keep: a pure policy, in which members are compared with the others of their pool.

Two signs: beats at which a process gave no pulse, because it was not scheduled, and what a shard takes to serve an
expert that is hit. A machine on which everybody is slow has no slow member.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Mapping

from octet.config import HealthConfig
from octet.ids import WorkerId

_LEAST_LATE = 0.2
"""Of its beats, those that a member must miss, whatever the others do."""
_LEAST_SECONDS = 0.001
"""What a shard must lose on each expert, whatever the others do: shorter times are noise."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Signs:
    """Of one member, within the last seconds."""

    late: float
    """Of its beats, those at which no pulse was felt."""
    service_s: float | None = None
    """For each expert hit by a frame; None where it has served too little to tell, and of attention workers."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    slow: Mapping[WorkerId, str]
    """With what is slow about them."""
    evicted: Mapping[WorkerId, str]
    """Those of them that the cluster is better off without. At most one at a time."""


class Slowness:
    """Asked now and then about one pool. Whoever is slow stays so until it has been like the others for a while."""

    def __init__(self, config: HealthConfig) -> None:
        self._config = config
        self._since_s: dict[WorkerId, float] = {}
        self._last_s: dict[WorkerId, float] = {}
        self._why: dict[WorkerId, str] = {}

    def judge(self, now_s: float, signs: Mapping[WorkerId, Signs]) -> Verdict:
        """
        Args:
            signs: of all members of a pool. One alone is never slow: there is nobody to compare it with.
        """
        config = self._config
        for worker_id in signs:
            if why := self._slow(worker_id, signs):
                self._since_s.setdefault(worker_id, now_s)
                self._last_s[worker_id], self._why[worker_id] = now_s, why
        for worker_id in list(self._since_s):
            if worker_id not in signs or now_s - self._last_s[worker_id] > config.slow_s:
                for known in (self._since_s, self._last_s, self._why):
                    known.pop(worker_id)
        # A pause that is over by now is none of these.
        times_s = {worker_id: self._last_s[worker_id] - since_s for worker_id, since_s in self._since_s.items()}
        slow = {each: self._why[each] for each, time_s in times_s.items() if time_s >= config.slow_s}
        evicted: dict[WorkerId, str] = {}
        if config.evict_slow_s is not None and slow:
            slowest = max(slow, key=lambda each: times_s[each])
            if times_s[slowest] >= config.evict_slow_s:
                evicted = {slowest: f"it has been slow for {times_s[slowest]:.0f} s: {slow[slowest]}"}
        return Verdict(slow=slow, evicted=evicted)

    def _slow(self, worker_id: WorkerId, signs: Mapping[WorkerId, Signs]) -> str:
        mine, ratio = signs[worker_id], self._config.slow_ratio
        others = [sign for other, sign in signs.items() if other != worker_id]
        if not others:
            return ""
        late = statistics.median(sign.late for sign in others)
        if mine.late > max(_LEAST_LATE, ratio * late):
            return f"it has missed {mine.late:.0%} of its beats, and the others {late:.0%}"
        served = [sign.service_s for sign in others if sign.service_s is not None]
        if mine.service_s is not None and served:
            usual_s = statistics.median(served)
            if mine.service_s > max(ratio * usual_s, usual_s + _LEAST_SECONDS):
                return f"an expert takes it {1e3 * mine.service_s:.1f} ms, and the others {1e3 * usual_s:.1f} ms"
        return ""
