"""The processes beside the pools, one of each: the frontend, and the router service. What is lost of them is replaced.

Both run on the controller's node, where `octet serve` runs, so that the address it prints is the right one.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cluster.actors import TASK_EVENTS, Gone, answer_of, call, find, kill
from cluster.api.frontend_actor import FrontendActor
from cluster.plan import ServingPlan
from cluster.workers.pool_actors import node_id
from cluster.workers.router_actor import Router
from cluster.workers.worker_start import runtime_env
from octet.errors import UnavailableError
from octet.ids import WorkerId

FRONTEND, ROUTER = WorkerId("frontend-0"), WorkerId("router")
_ANSWER_S = 10.0
_START_S = 60.0


class Services:
    """Belongs to the controller's event loop."""

    def __init__(self, plan: ServingPlan, controller: Any, port: int | None = None) -> None:
        """
        Args:
            port: where the frontend of a controller before this one listens: what it has started serves on.
        """
        self._plan, self._controller, self._port = plan, controller, port
        namespace = plan.config.ray.namespace
        self.frontend = self._start_frontend() if port is None else find(FRONTEND, namespace)
        self.router = self._start_router() if port is None else find(ROUTER, namespace)

    def all(self) -> list[Any]:
        return [self.router, self.frontend]

    @property
    def port(self) -> int:
        """Of the gRPC API, once the frontend listens: every later one listens there, too."""
        assert self._port is not None
        return self._port

    async def listen(self) -> str:
        """Let the first frontend open its port. Returns: its mailbox. Raises: OctetError."""
        listening: tuple[str, int] = await call(FRONTEND, self.frontend.listen.remote())
        mailbox, self._port = listening
        return mailbox

    async def mailbox(self) -> str | None:
        """Of a frontend that was found; None if it serves nobody, and has to be replaced."""
        try:
            found: str | None = await call(FRONTEND, self.frontend.mailbox.remote(), _ANSWER_S)
        except UnavailableError:
            return None
        if found is None:
            # Whoever started it did not come to the end of it.
            self.give_up_frontend()
        return found

    async def replace_frontend(self) -> str:
        """Start another one on the port of the one that is lost. Returns: its mailbox.

        Raises: OctetError, and then none serves yet.
        """
        self._bury(self.frontend)
        frontend = self._start_frontend()
        try:
            listening: tuple[str, int] = await call(FRONTEND, frontend.listen.remote(self._port), _START_S)
        except BaseException:
            kill(frontend)
            raise
        self.frontend = frontend
        return listening[0]

    def give_up_frontend(self) -> None:
        """Kill one that cannot serve: it is lost from here on."""
        self._bury(self.frontend)
        self.frontend = Gone()

    async def serve(
        self, prefill: Mapping[WorkerId, str], decode: Mapping[WorkerId, str], draining: frozenset[WorkerId]
    ) -> None:
        """Let the frontend accept requests. Raises: OctetError."""
        await call(FRONTEND, self.frontend.serve.remote(prefill, decode, draining), _ANSWER_S)

    def replace_router(self) -> None:
        """It holds nothing that others do not know, but for the telemetry of the last minutes. Raises: OctetError."""
        self._bury(self.router)
        self.router = self._start_router()

    def close(self) -> None:
        """Kill both."""
        for service in self.all():
            kill(service)

    def _bury(self, service: Any) -> None:
        """One killed from outside keeps its name until then, in Ray or in what this process remembers of it."""
        kill(service)

    def _start_frontend(self) -> Any:
        return self._start(FrontendActor, FRONTEND, FRONTEND, self._plan, self._controller)

    def _start_router(self) -> Any:
        return self._start(Router, ROUTER, self._plan, self._controller)

    def _start(self, cls: type, name: str, *args: Any) -> Any:
        options = {
            "name": name,
            "namespace": self._plan.config.ray.namespace,
            # They go on without the controller's process; see `cluster.tether`.
            "lifetime": "detached",
            "num_cpus": 0,
            "scheduling_strategy": NodeAffinitySchedulingStrategy(node_id(), soft=False),
            "max_concurrency": 1000,
            "enable_task_events": TASK_EVENTS,
            "runtime_env": runtime_env(self._plan.config),
        }
        try:
            return ray.remote(cls).options(**options).remote(*args)
        except ValueError as error:
            raise UnavailableError(f"{name}: {error}") from error


async def is_gone(service: Any) -> bool:
    """Whether the process is lost; one that is only slow is not."""
    try:
        await asyncio.wait_for(answer_of(lambda: service.ping.remote()), _ANSWER_S)
    except ray.exceptions.RayActorError:
        return True
    except TimeoutError:
        return False
    return False
