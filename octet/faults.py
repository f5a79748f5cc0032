"""Faults at named steps of the protocol, for chaos tests: `reach(point)` does nothing unless a fault is armed there.

A process takes no fault unless its cluster's configuration says so (`chaos.enabled`, off by default): then a fault that
is armed by a call strikes when its step is reached for the given time, and only once.
"""

from __future__ import annotations

import dataclasses
import os
import signal
import threading
import time
from collections.abc import Mapping
from typing import Literal, get_args

from octet.errors import ConfigError, LaneError

Action = Literal["kill", "stop", "delay", "raise"]
ACTIONS: tuple[Action, ...] = get_args(Action)

POINTS: Mapping[str, tuple[str, ...]] = {
    "dispatch": ("prefill", "decode"),
    "combine": ("prefill", "decode"),
    "serve": ("experts",),
    "sampled": ("prefill", "decode"),
    "handoff.send": ("prefill", "decode"),
    "handoff.receive": ("decode",),
    "link": ("prefill", "decode", "experts"),
    "prepare": ("experts",),
    "adopt": ("prefill", "decode"),
    "retire": ("experts",),
    "commit": ("frontend",),
    "change.linked": ("controller",),
    "change.prepared": ("controller",),
    "change.adopted": ("controller",),
}
"""And the processes in which they are reached.

`dispatch`: a layer's rows are about to be sent. `combine`: they are sent, and the sums awaited. `serve`: a shard has
received rows and not computed them. `sampled`: a step has sampled its tokens, and nobody has heard of them.
`handoff.send`, `handoff.receive`: KV pages are about to be sent, or received. `link`, `prepare`, `adopt`, `retire`: the
steps by which one member goes to another epoch. `commit`: a token has come, and is not committed.
`change.*`: the controller has brought all members through that step of a change.
"""


class InjectedError(LaneError):
    """Raised on purpose at a fault point."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """Raises: ConfigError for a point or an action that there is not."""

    point: str
    action: Action
    after: int = 0
    """How often the step is passed unharmed before."""
    for_s: float = 0.0
    """Of a delay. A process that stops stays so until another one lets it go on."""

    def __post_init__(self) -> None:
        if self.point not in POINTS:
            raise ConfigError("point", repr(self.point), f"one of {', '.join(POINTS)}")
        if self.action not in ACTIONS:
            raise ConfigError("action", repr(self.action), f"one of {', '.join(ACTIONS)}")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Struck:
    """A fault that has struck a process which lived to tell."""

    fault: Fault
    at_s: float
    """Seconds since 1970."""


class FaultPoints:
    """Of one process. Any thread may call anything."""

    def __init__(self) -> None:
        self._allowed = False
        self._armed: dict[str, tuple[Fault, int]] = {}
        self._struck: list[Struck] = []
        self._lock = threading.Lock()

    def allow(self, allowed: bool) -> None:
        """Whether faults may be armed in this process."""
        self._allowed = allowed

    def arm(self, fault: Fault) -> None:
        """Let it strike at the next passes of its step, in place of another one there. Raises: ConfigError."""
        if not self._allowed:
            raise ConfigError("chaos.enabled", False, "true, for faults to be armed")
        with self._lock:
            self._armed[fault.point] = (fault, fault.after)

    def struck(self) -> tuple[Struck, ...]:
        """The faults that have struck so far."""
        return tuple(self._struck)

    def disarm(self) -> None:
        """Forget every fault that is armed."""
        with self._lock:
            self._armed.clear()

    def reach(self, point: str) -> None:
        """A step is reached: whatever is armed there strikes. Raises: InjectedError, if that is what was armed."""
        if self._armed:
            self._strike(point)

    def _strike(self, point: str) -> None:
        with self._lock:
            if point not in self._armed:
                return
            fault, left = self._armed[point]
            if left > 0:
                self._armed[point] = (fault, left - 1)
                return
            del self._armed[point]
            self._struck.append(Struck(fault=fault, at_s=time.time()))
        match fault.action:
            case "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            case "stop":
                os.kill(os.getpid(), signal.SIGSTOP)
            case "delay":
                time.sleep(fault.for_s)
            case "raise":
                raise InjectedError(f"a fault was armed at {point}")


_process = FaultPoints()
allow, arm, disarm, reach, struck = _process.allow, _process.arm, _process.disarm, _process.reach, _process.struck
