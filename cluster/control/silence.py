"""Whose silence is death: a pure policy over what was heard of members, beat by beat.

Time counts only as far as the observer was awake for it. One that was not scheduled, or that a long change held up, has
missed the members' signs by its own fault.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping

from octet.config import HealthConfig
from octet.ids import WorkerId

_MOST_BEATS = 2.0
"""Of the time between two looks, so many beats count; the rest is the observer's lateness."""
_LATE_S = 3.0
"""So long a missed beat counts, about."""
_IDLE_LOOKS = 3
"""Looks in a row at which all of a process slept: it is not for want of time that it does not answer."""


@dataclasses.dataclass(slots=True)
class _Heard:
    pulse_s: float | None
    """Since its pulse was felt, in observed time; None if it has no pulse."""
    answer_s: float = 0.0
    """Since it last answered a call."""
    idle_looks: int = 0
    late: float = 0.0
    """Of the last beats, those at which no pulse was felt: a mean that forgets."""


class Silence:
    """Told of every sign of life; asked at every beat who is dead, and why."""

    def __init__(self, config: HealthConfig, now_s: float) -> None:
        self._config, self._now_s = config, now_s
        self._heard: dict[WorkerId, _Heard] = {}

    def keep(self, members: Mapping[WorkerId, bool]) -> None:
        """Judge these, each of which has a pulse or has not, and no others. Those that are new begin alive."""
        self._heard = {
            worker_id: self._heard.get(worker_id) or _Heard(pulse_s=0.0 if has_pulse else None)
            for worker_id, has_pulse in members.items()
        }

    def answered(self, worker_id: WorkerId) -> None:
        """It has answered a call: its interpreter is of use, and the calls of the observer reach somebody."""
        if (heard := self._heard.get(worker_id)) is not None:
            heard.answer_s = 0.0

    def judge(self, now_s: float, felt: Iterable[str], idle: Mapping[WorkerId, bool]) -> dict[WorkerId, str]:
        """One beat.

        Args:
            felt: whose pulses were felt since the last beat.
            idle: whether nothing in a process wants to run, where that can be seen.

        Returns: who is dead, with the reason.
        """
        config, felt = self._config, set(felt)
        passed_s = min(now_s - self._now_s, _MOST_BEATS * config.beat_s)
        self._now_s = now_s
        for worker_id, heard in self._heard.items():
            heard.answer_s += passed_s
            heard.idle_looks = heard.idle_looks + 1 if idle.get(worker_id) else 0
            if heard.pulse_s is not None:
                heard.pulse_s = 0.0 if worker_id in felt else heard.pulse_s + passed_s
                heard.late += (float(worker_id not in felt) - heard.late) * min(1.0, passed_s / _LATE_S)
        return {worker_id: why for worker_id in self._heard if (why := self._why(worker_id))}

    def unanswered(self) -> list[WorkerId]:
        """Members that let a call wait: worth a look at what they do meanwhile."""
        return [worker_id for worker_id, heard in self._heard.items() if heard.answer_s > self._config.silent_s / 2]

    def late(self) -> dict[WorkerId, float]:
        """Of each member's last beats, the share at which no pulse was felt."""
        return {worker_id: heard.late for worker_id, heard in self._heard.items()}

    def _why(self, worker_id: WorkerId) -> str:
        config, heard = self._config, self._heard[worker_id]
        if heard.answer_s > config.timeout_s:
            return f"no answer within {config.timeout_s:g} s"
        if heard.pulse_s is not None and heard.pulse_s > config.silent_s and not self._deaf():
            return f"no sign of life within {config.silent_s:g} s"
        stuck = heard.answer_s > config.silent_s and heard.idle_looks >= _IDLE_LOOKS
        if stuck and self._others_answer(worker_id):
            return f"no answer within {config.silent_s:g} s, and nothing runs in it"
        return ""

    def _deaf(self) -> bool:
        """Where all of several fall silent in the same moment, it is the observer that hears nothing."""
        silences = [heard.pulse_s for heard in self._heard.values() if heard.pulse_s is not None]
        moment_s = 2 * self._config.beat_s
        return len(silences) > 1 and min(silences) > moment_s and max(silences) - min(silences) <= moment_s

    def _others_answer(self, worker_id: WorkerId) -> bool:
        """Whether the observer's calls go through at all."""
        others = [heard.answer_s for other, heard in self._heard.items() if other != worker_id]
        return any(answer_s < self._config.silent_s for answer_s in others)
