"""What the autoscaler has decided, for whoever asks why: every action, and the last look at every pool."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Iterable

from cluster.autoscaling.autoscaler import Decision, PoolDecision

_MOST_KEPT = 256


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Logged:
    """One pool's part of a decision."""

    at_s: float
    """On the clock that the decisions were made by."""
    pool: str
    current: int
    wanted: int
    target: int
    reason: str
    outcome: str = ""
    """Of an action: empty while it goes on."""


class DecisionLog:
    """Keeps the last actions; of decisions that change nothing, the latest."""

    def __init__(self, most_kept: int = _MOST_KEPT) -> None:
        self._actions: collections.deque[Logged] = collections.deque(maxlen=most_kept)
        self._latest: dict[str, Logged] = {}

    def take_over(self, actions: Iterable[Logged], latest: Iterable[Logged]) -> None:
        """Of a controller before this one. Its clock was the machine's, too."""
        self._actions.extend(
            one if one.outcome else dataclasses.replace(one, outcome="not known, as the controller was lost meanwhile")
            for one in actions
        )
        self._latest |= {logged.pool: logged for logged in latest}

    def add(self, decision: Decision) -> None:
        for one in decision.pools:
            logged = _logged(decision.now_s, one)
            self._latest[one.pool] = logged
            if one.acts:
                self._actions.append(logged)

    def end(self, pool: str, target: int, outcome: str) -> None:
        """Say how the last action that had this target ended."""
        for index in range(len(self._actions) - 1, -1, -1):
            if (self._actions[index].pool, self._actions[index].target) == (pool, target):
                self._actions[index] = dataclasses.replace(self._actions[index], outcome=outcome)
                return

    @property
    def actions(self) -> tuple[Logged, ...]:
        """Oldest first."""
        return tuple(self._actions)

    @property
    def latest(self) -> tuple[Logged, ...]:
        """One for each pool that was ever looked at."""
        return tuple(self._latest.values())


def _logged(now_s: float, one: PoolDecision) -> Logged:
    return Logged(
        at_s=now_s, pool=one.pool, current=one.current, wanted=one.wanted, target=one.target, reason=one.reason
    )
