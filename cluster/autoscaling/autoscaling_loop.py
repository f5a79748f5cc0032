"""The autoscaler at work: observe, decide, record, act, and again.

What it observes and how it acts are given to it, so that it runs without Ray and its tests do as well.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

from cluster.autoscaling.autoscaler import REDUNDANCY, Fleet, PoolDecision, State, decide, give_up
from cluster.autoscaling.decision_log import DecisionLog
from cluster.autoscaling.signals import Signals
from octet.autoscaler_config import AutoscalerConfig
from octet.errors import OctetError

_log = logging.getLogger(__name__)

_ASLEEP_S = 0.5
"""Between looks while all pools are empty: the first request waits for the next of them."""

Observe = Callable[[], Awaitable[Signals]]
Act = Callable[[PoolDecision], Awaitable[None]]
"""Carries a decision about one pool out. Raises: OctetError, if it was refused or rolled back."""


class AutoscalingLoop:
    """Belongs to the controller's event loop. Actions go on while the next decisions are made."""

    def __init__(
        self,
        config: AutoscalerConfig,
        fleet: Fleet,
        observe: Observe,
        act: Act,
        clock: Callable[[], float] | None = None,
    ) -> None:
        self._config, self._fleet = config, fleet
        self._observe, self._act = observe, act
        self._clock = clock or asyncio.get_running_loop().time
        self._state = State()
        self._asleep = False
        self._actions: set[asyncio.Task[None]] = set()
        self.log = DecisionLog()

    async def run(self) -> None:
        """Until it is cancelled; actions under way are cancelled with it."""
        try:
            while True:
                interval_s = self._config.metrics_interval_s
                await asyncio.sleep(min(interval_s, _ASLEEP_S) if self._asleep else interval_s)
                await self.step()
        finally:
            for action in self._actions:
                action.cancel()

    async def step(self) -> None:
        """One decision. Without signals there is none: the pools stay as they are."""
        try:
            signals = await self._observe()
        except OctetError as error:
            _log.warning("the autoscaler sees nothing: %s", error)
            return
        decision, self._state = decide(self._clock(), signals, self._config, self._fleet, self._state)
        self._asleep = not any(one.current or one.target for one in decision.pools if one.pool != REDUNDANCY)
        self.log.add(decision)
        for one in decision.actions:
            _log.info("%s: %d → %d: %s", one.pool, one.current, one.target, one.reason)
            task = asyncio.get_running_loop().create_task(self._carry_out(one))
            self._actions.add(task)
            task.add_done_callback(self._actions.discard)

    async def _carry_out(self, one: PoolDecision) -> None:
        outcome = "done"
        try:
            async with asyncio.timeout(self._config.action_timeout_s):
                await self._act(one)
        except TimeoutError:
            outcome = f"not complete after {self._config.action_timeout_s:g} s"
        except OctetError as error:
            outcome = str(error)
        if outcome != "done":
            _log.warning("%s: %d → %d: %s", one.pool, one.current, one.target, outcome)
            self._state = give_up(self._state, one.pool)
        self.log.end(one.pool, one.target, outcome)
