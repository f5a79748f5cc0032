"""The router service as a Ray actor: it reads every member's counters, step by step, and answers for all of them."""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import Mapping, Sequence
from typing import Any

from cluster.autoscaling.prospects import prospects
from cluster.autoscaling.signals import Prospect
from cluster.fault_points import FaultCalls
from cluster.plan import ServingPlan
from cluster.tether import Tether
from octet import faults
from octet.ids import Epoch, WorkerId
from router.proposal import Proposal, make_proposal
from router.routing import Routing
from router.service import RouterService
from router.telemetry_window import TelemetryWindow

_log = logging.getLogger(__name__)

_FRESH_S = 5.0
"""How long whoever asks for fresh telemetry waits for a member that is slow to answer."""


class Router(FaultCalls):
    """An async Ray actor. `watch` whenever members have joined or left."""

    def __init__(self, plan: ServingPlan, controller: Any = None) -> None:
        faults.allow(plan.config.chaos.enabled)
        self._tether = Tether(controller)
        self._config = plan.config.telemetry
        self._plan = plan
        self._service = RouterService(
            plan.routing, plan.model.num_experts_per_tok, self._config, time.monotonic(), secrets.randbits(63)
        )
        self._members: Mapping[WorkerId, Any] = {}
        self._reading = asyncio.Lock()
        self._num_readings = 0
        self._reader: asyncio.Task[None] | None = None

    async def watch(self, routing: Routing, members: Mapping[WorkerId, Any]) -> None:
        """This is in force; take telemetry from these actors, of all three pools, and from no others."""
        self._service.routing = routing
        if self._members.keys() - members.keys():
            # What the members that leave have counted last.
            await self._read(self._config.step_s)
        self._members = dict(members)
        self._service.telemetry.keep(self._members)
        if self._reader is None:
            self._reader = asyncio.get_running_loop().create_task(self._read_steps())

    async def ping(self) -> None:
        """Answered as long as the service's event loop runs."""

    async def propose(
        self,
        current: Routing,
        epoch: Epoch,
        num_redundant: int,
        joining: Sequence[WorkerId] = (),
        leaving: Sequence[WorkerId] = (),
        lost: Sequence[WorkerId] = (),
        domains: Mapping[WorkerId, int] | None = None,
        resized: bool = False,
        held_out: bool = False,
    ) -> Proposal:
        """The next routing by the loads of the window; see `router.proposal`. Raises: ConfigError.

        Args:
            held_out: plan by the earlier half of the window, and judge the plan by the later one.
        """
        config, telemetry, judged_LE = self._plan.config, self._service.telemetry, None
        if held_out:
            loads_LE, judged_LE = telemetry.halves(time.monotonic())
        else:
            loads_LE = telemetry.window(time.monotonic()).loads_LE
        return await asyncio.to_thread(
            make_proposal,
            current,
            epoch,
            loads_LE,
            config.balancing,
            num_redundant,
            self._plan.census.expert_bytes,
            joining=joining,
            leaving=leaving,
            lost=lost,
            resized=resized,
            judged_LE=judged_LE,
            domains=domains,
        )

    async def telemetry(self, last_s: float | None = None, fresh: bool = False) -> TelemetryWindow:
        """The last `last_s` seconds, or all of the window.

        Args:
            fresh: ask the members first, so that it ends now and not with the last step.
        """
        if fresh:
            await self._read(_FRESH_S)
        return self._service.telemetry.window(time.monotonic(), last_s)

    async def prospects(self, num_shards: int, num_redundant: int, slots_that_fit: int) -> tuple[Prospect, ...]:
        """What the balancer promises for other numbers of redundant experts, by the loads of the window."""
        loads_LE = self._service.telemetry.window(time.monotonic()).loads_LE
        if not loads_LE.any():
            return ()
        slots = -(-(loads_LE.shape[1] + num_redundant) // num_shards)
        most = self._plan.config.autoscaler.experts.max_redundant_experts
        return await asyncio.to_thread(prospects, loads_LE, num_shards, slots, slots_that_fit, most)

    async def stop(self) -> None:
        """Read no more."""
        if self._reader is not None:
            self._reader.cancel()

    async def _read_steps(self) -> None:
        next_s = time.monotonic()
        while True:
            next_s = max(next_s + self._config.step_s, time.monotonic())
            await asyncio.sleep(next_s - time.monotonic())
            try:
                await self._read(self._config.step_s)
            except Exception:
                # Serving does not depend on it, and the next step makes up for this one.
                _log.exception("the members' counters could not be read")

    async def _read(self, deadline_s: float) -> None:
        """Read every member's counters once. Whoever waits for a reading that began later shares it."""
        asked = self._num_readings
        async with self._reading:
            if self._num_readings > asked:
                return
            self._num_readings += 1
            calls = [asyncio.wait_for(actor.telemetry.remote(), deadline_s) for actor in self._members.values()]
            answers = await asyncio.gather(*calls, return_exceptions=True)
            # Members that are slow, lost or not ready yet are made up for by their next answer, or age out.
            samples = [answer for answer in answers if answer is not None and not isinstance(answer, BaseException)]
            self._service.telemetry.record(time.monotonic(), samples)
