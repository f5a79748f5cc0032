"""From what is wanted now to what is done: delays, hysteresis, one action at a time, few reversals. Pure.

A pool grows to the *least* that was wanted throughout `upscale_delay_s`, and shrinks to the *most* that was lastingly
wanted within `downscale_delay_s`: the stabilisation windows of Kubernetes' horizontal pod autoscaler, with Ray Serve's
names. What is wanted lastingly is no more than what is wanted, and leaves bursts out.
A load that swings faster than the windows therefore moves nothing.

A pool that has begun to shrink cannot grow again before the cooldown is over, unless requests keep missing their
target. Until then it keeps the most that was lastingly wanted in as long a time as is left of the cooldown, less what
the load has fallen by since, as its trend tells.
"""

from __future__ import annotations

import bisect
import dataclasses
import math
from collections.abc import Sequence
from typing import NamedTuple

from octet.autoscaler_config import PoolScalingConfig

_SLACK_S = 1e-6


class Turns(NamedTuple):
    """When a pool changed last: which way (1 or -1; 0 before the first change), and when it last changed its way."""

    last_direction: int
    last_action_s: float
    last_reversal_s: float


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Pending:
    """A change under way."""

    origin: int
    target: int
    since_s: float
    before: Turns
    """What `undo` goes back to."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Stabilizer:
    """What one pool remembers."""

    wanted: tuple[tuple[float, int, int], ...] = ()
    """(time, members wanted, wanted lastingly), ascending in time, as far back as the delays reach."""
    pending: Pending | None = None
    last_direction: int = 0
    last_action_s: float = -1e18
    last_reversal_s: float = -1e18


NOTHING_YET = Stabilizer()


class Proposal(NamedTuple):
    target: int
    """The current size, where nothing is to be done."""
    why: str
    """What holds it back, or lets it go."""


def note(
    state: Stabilizer,
    now_s: float,
    wanted: int,
    config: PoolScalingConfig,
    reversal_cooldown_s: float,
    lasting: int | None = None,
) -> Stabilizer:
    """Remember what is wanted now, and how much of it lastingly: all, where nothing is said."""
    since_s = now_s - max(config.upscale_delay_s, config.downscale_delay_s, reversal_cooldown_s)
    samples = (*state.wanted, (now_s, wanted, wanted if lasting is None else lasting))
    return dataclasses.replace(state, wanted=samples[max(_begin(samples, since_s), 0) :])


def settle(state: Stabilizer, now_s: float, current: int, num_moving: int, timeout_s: float) -> tuple[Stabilizer, str]:
    """Forget the pending action once it is complete, or has taken too long. Returns also what happened, if anything.

    Args:
        num_moving: members that start or drain.
    """
    pending = state.pending
    if pending is None:
        return state, ""
    if current == pending.target and num_moving == 0:
        return dataclasses.replace(state, pending=None), ""
    if now_s - pending.since_s > timeout_s:
        why = f"the change to {pending.target} was given up after {timeout_s:g} s at {current}"
        return dataclasses.replace(state, pending=None), why
    return state, ""


def propose(
    state: Stabilizer,
    now_s: float,
    current: int,
    config: PoolScalingConfig,
    reversal_cooldown_s: float,
    *,
    slope_per_s: float = 0.0,
    urgent: bool = False,
) -> Proposal:
    """
    Args:
        current: members that serve or start, less those that drain.
        slope_per_s: of the smoothed load, in members.
        urgent: requests keep missing their target, so that growing may not wait for a reversal to be due.
    """
    if state.pending is not None:
        waited_s = now_s - state.pending.since_s
        return Proposal(current, f"the change to {state.pending.target}, {waited_s:.0f} s old, is not complete")
    _, wanted, _ = state.wanted[-1]
    up = min((sample[1] for sample in _since(state, now_s, config.upscale_delay_s)), default=None)
    keep_s, fall_per_s = config.downscale_delay_s, 0.0
    turned_s = 0.0 if state.last_direction > 0 else now_s - state.last_reversal_s
    if reversal_cooldown_s - turned_s > keep_s:
        # For so long it could not grow again.
        keep_s, fall_per_s = reversal_cooldown_s - turned_s, max(0.0, -slope_per_s)
    kept = (lasting - fall_per_s * (now_s - at_s) for at_s, _, lasting in _since(state, now_s, keep_s))
    down = max((math.ceil(count) for count in kept), default=None)
    target, why = current, ""
    if up is not None and up > current:
        target, why = up, f"wanted for {config.upscale_delay_s:g} s"
    elif down is not None and down < current:
        target, why = down, f"the most wanted in {keep_s:.0f} s"
    elif wanted != current:
        delay_s = config.upscale_delay_s if wanted > current else keep_s
        why = f"{wanted} not wanted for {delay_s:.0f} s yet"
    direction = (target > current) - (target < current)
    grown_s = now_s - state.last_action_s if state.last_direction > 0 else reversal_cooldown_s
    if direction < 0 and grown_s < reversal_cooldown_s:
        # Most reversals come in pairs: what was given back too early has to be fetched again, and at once.
        return Proposal(current, f"the pool grew {grown_s:.0f} s ago")
    if direction * state.last_direction < 0 and now_s - state.last_reversal_s < reversal_cooldown_s:
        if not (urgent and direction > 0):
            return Proposal(current, f"the last reversal is {now_s - state.last_reversal_s:.0f} s ago")
        why += "; requests miss their target"
    return Proposal(target, why)


def act(state: Stabilizer, now_s: float, current: int, target: int) -> Stabilizer:
    """Remember that the change from `current` to `target` begins now."""
    direction = (target > current) - (target < current)
    reverses = direction * state.last_direction < 0
    before = Turns(state.last_direction, state.last_action_s, state.last_reversal_s)
    return dataclasses.replace(
        state,
        pending=Pending(origin=current, target=target, since_s=now_s, before=before),
        last_direction=direction,
        last_action_s=now_s,
        last_reversal_s=now_s if reverses else state.last_reversal_s,
    )


def undo(state: Stabilizer) -> Stabilizer:
    """Forget the pending action as if it had never begun: what was refused is no change, and no reversal."""
    if state.pending is None:
        return state
    return dataclasses.replace(state, pending=None, **state.pending.before._asdict())


def _since(state: Stabilizer, now_s: float, delay_s: float) -> Sequence[tuple[float, int, int]]:
    """What was wanted throughout the delay; empty while less than the delay is known."""
    first = _begin(state.wanted, now_s - delay_s)
    return () if first < 0 else state.wanted[first:]


def _begin(samples: Sequence[tuple[float, int, int]], since_s: float) -> int:
    """The last sample at or before `since_s`: what it says held when the window began. -1 if there is none."""
    return bisect.bisect_right(samples, since_s + _SLACK_S, key=lambda sample: sample[0]) - 1
