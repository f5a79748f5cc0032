"""A frontend behind gRPC as a process of its own, with workers that compute a token now and then. Prints its port."""

from __future__ import annotations

import asyncio
import sys
from typing import cast

from cluster.api.cluster_service import ClusterService
from cluster.api.generation_service import GenerationService
from cluster.api.grpc_service import GrpcServer
from cluster.frontend.frontend import Frontend
from cluster.planning import make_plan
from octet.config import load_config
from octet.ids import WorkerId
from octet.mailbox import AsyncMailbox
from tests.unit.cluster.operations import NoOperations
from tests.unit.cluster.pools import Pools, PoolsMailbox, Worker

STEP_S = 0.02
FRONTEND, PREFILL, DECODE = WorkerId("frontend-0"), WorkerId("prefill-0"), WorkerId("decode-0")


async def serve() -> None:
    """Until its input ends."""
    plan = make_plan(load_config(None, ["frontend={port: 0, resume_grace_s: 5, max_stall_s: 5}"]))
    pools = Pools()
    pools.prefill[PREFILL], pools.decode[DECODE] = Worker(PREFILL), Worker(DECODE)
    mailbox = PoolsMailbox(pools)
    frontend = Frontend(FRONTEND, plan, None, cast(AsyncMailbox, mailbox))
    generation = GenerationService(frontend, "model", 0, plan.config.frontend.max_stall_s)
    server = GrpcServer(plan.config.frontend, generation, ClusterService(NoOperations()))
    frontend.serve({PREFILL: "nowhere"}, {DECODE: "nowhere"})
    print(await server.start(), flush=True)
    waiting = asyncio.create_task(asyncio.to_thread(sys.stdin.read))
    while not waiting.done():
        pools.step_prefill(pools.prefill[PREFILL])
        pools.step_decode(pools.decode[DECODE])
        for reports in pools.reports.values():
            while reports:
                mailbox.inbound.put_nowait(reports.popleft())
        await asyncio.sleep(STEP_S)
    await server.stop(grace_s=0)
    frontend.close()


if __name__ == "__main__":
    asyncio.run(serve())
