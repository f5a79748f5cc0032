"""A frontend as a Ray actor: the gRPC server and the frontend behind it."""

from __future__ import annotations

import asyncio
import gc
import os
import pathlib
from collections.abc import Collection, Mapping
from typing import Any

import ray.util

from cluster.api.cluster_service import ClusterService
from cluster.api.generation_service import GenerationService
from cluster.api.grpc_service import GrpcServer
from cluster.api.operations import ControllerOperations
from cluster.fault_points import FaultCalls
from cluster.frontend.frontend import Frontend
from cluster.frontend.request_meter import RequestLoad
from cluster.plan import ServingPlan
from cluster.tether import Tether
from model.tokenizer import Tokenizer
from octet import faults
from octet.ids import WorkerId
from octet.mailbox import AsyncMailbox

_MIDDLE_COLLECTIONS = 100
"""Between two of all objects."""


class FrontendActor(FaultCalls):
    """Called in this order: `listen`, `serve`, `drain`, `stop`; `set_workers` whenever they change after `serve`."""

    def __init__(self, worker_id: WorkerId, plan: ServingPlan, controller: Any) -> None:
        faults.allow(plan.config.chaos.enabled)
        self._worker_id, self._plan, self._controller = worker_id, plan, controller
        self._tether = Tether(controller)
        self._serves = False

    async def listen(self, port: int | None = None) -> tuple[str, int]:
        """Open the gRPC port, NOT_SERVING. Returns: the frontend's mailbox address and the port.

        Args:
            port: in place of the configured one: that of the frontend which was here before.

        Raises: CheckpointError for a broken tokenizer, ConfigError for a port that is taken.
        """
        plan = self._plan
        model_dir = pathlib.Path(plan.model_dir)
        tokenizer = await asyncio.to_thread(Tokenizer.open, model_dir)
        self._frontend = Frontend(
            self._worker_id, plan, tokenizer, AsyncMailbox(ray.util.get_node_ip_address(), plan.secret)
        )
        generation = GenerationService(
            self._frontend, model_dir.name, plan.census.total_parameters, plan.config.frontend.max_stall_s
        )
        operations = ControllerOperations(self._controller, self._frontend)
        self._server = GrpcServer(plan.config.frontend, generation, ClusterService(operations))
        return self._frontend.address, await self._server.start(port)

    async def serve(
        self, prefill: Mapping[WorkerId, str], decode: Mapping[WorkerId, str], draining: Collection[WorkerId] = ()
    ) -> None:
        """See `Frontend.serve`."""
        self._frontend.serve(prefill, decode, draining)
        _settle_garbage()
        self._serves = True
        await self._server.set_serving(True)

    async def set_workers(
        self, prefill: Mapping[WorkerId, str], decode: Mapping[WorkerId, str], draining: Collection[WorkerId] = ()
    ) -> None:
        """See `Frontend.set_workers`."""
        self._frontend.set_workers(prefill, decode, draining)

    async def request_load(self) -> RequestLoad:
        """See `Frontend.request_load`."""
        return self._frontend.request_load()

    async def mailbox(self) -> str | None:
        """Its address; None before it serves."""
        return self._frontend.address if self._serves else None

    async def ping(self) -> None:
        """Answered as long as the frontend's event loop runs and it hears the workers."""
        if self._serves and self._frontend.deaf:
            # Whose process is lost is replaced, and its clients go on with the next one.
            os._exit(1)

    async def fail(self, reason: str) -> None:
        await self._server.set_serving(False)
        self._frontend.fail(reason)

    async def drain(self, timeout_s: float) -> None:
        """Admit nothing more, and wait for what is live."""
        await self._server.set_serving(False)
        self._frontend.stop_admitting("the cluster is draining")
        await self._frontend.drain(timeout_s)

    async def stop(self) -> None:
        await self._server.stop(grace_s=2.0)
        self._frontend.close()


def _settle_garbage() -> None:
    """Look for garbage among what comes from now on, and seldom among all of it.

    Modules, which stay, are nine tenths of the objects here: a collection that looks at all of them took 0.12 s, every
    other second under load, in which no stream was told anything and no call refused.
    """
    gc.collect()
    gc.freeze()
    youngest, middle, _ = gc.get_threshold()
    gc.set_threshold(youngest, middle, _MIDDLE_COLLECTIONS)
