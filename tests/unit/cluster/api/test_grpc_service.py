"""The gRPC servers of a frontend: one port, many connections."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import time
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from cluster.api.cluster_service import ClusterService
from cluster.api.generation_service import GenerationService
from cluster.api.grpc_service import GrpcServer
from octet.config import FrontendConfig
from octet.errors import ConfigError
from octet.v1 import octet_pb2 as pb
from octet.v1 import octet_pb2_grpc as rpc
from tests.unit.cluster.operations import NoOperations
from tests.unit.cluster.played import PATIENT_S, Cluster, playing

NUM_CONNECTIONS = 48
"""So many that no server has most of them."""


@pytest.fixture
async def cluster() -> AsyncIterator[Cluster]:
    async with playing() as cluster:
        yield cluster


@contextlib.asynccontextmanager
async def serving(cluster: Cluster, host: str = "127.0.0.1", port: int = 0) -> AsyncIterator[tuple[GrpcServer, int]]:
    """A server and its port."""
    generation = GenerationService(cluster.frontend, "model", 0, 10.0)
    server = GrpcServer(FrontendConfig(host=host, port=port), generation, ClusterService(NoOperations()))
    try:
        yield server, await server.start()
    finally:
        await server.stop(grace_s=0)


@contextlib.asynccontextmanager
async def connected(port: int) -> AsyncIterator[list[grpc.aio.Channel]]:
    """Connections of their own."""
    async with contextlib.AsyncExitStack() as stack, asyncio.timeout(PATIENT_S):
        options = [("grpc.use_local_subchannel_pool", 1)]
        channels = [grpc.aio.insecure_channel(f"127.0.0.1:{port}", options) for _ in range(NUM_CONNECTIONS)]
        for channel in channels:
            await stack.enter_async_context(channel)
        await asyncio.gather(*(channel.channel_ready() for channel in channels))
        yield channels


async def model_name(channel: grpc.aio.Channel) -> str:
    generation: Any = rpc.GenerationStub(channel)
    name: str = (await generation.GetModelInfo(pb.GetModelInfoRequest(), timeout=PATIENT_S)).model
    return name


async def is_serving(channel: grpc.aio.Channel) -> bool:
    health: Any = health_pb2_grpc.HealthStub(channel)
    state: int = (await health.Check(health_pb2.HealthCheckRequest(), timeout=PATIENT_S)).status
    return state == health_pb2.HealthCheckResponse.SERVING


async def test_calls_of_several_connections_are_accepted_side_by_side(cluster: Cluster) -> None:
    turns: list[asyncio.Handle] = []

    def turn() -> None:
        time.sleep(0.001)
        turns.append(asyncio.get_running_loop().call_soon(turn))

    async with serving(cluster) as (_, port), connected(port) as channels:
        turn()
        await asyncio.gather(*map(model_name, channels))
        turns[-1].cancel()
    # One after the other, each takes six.
    assert len(turns) < 3 * NUM_CONNECTIONS


async def test_a_second_server_on_the_port_is_refused(cluster: Cluster) -> None:
    async with serving(cluster) as (_, port), connected(port) as channels:
        for host in ("127.0.0.1", "0.0.0.0"):
            with pytest.raises(ConfigError, match=rf"frontend\.port.*{host}:{port}"):
                async with serving(cluster, host, port):
                    pass
        assert await asyncio.gather(*map(model_name, channels)) == ["model"] * NUM_CONNECTIONS


async def test_a_port_that_others_share_is_refused(cluster: Cluster) -> None:
    with socket.socket() as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        other.bind(("127.0.0.1", 0))
        other.listen()
        with pytest.raises(ConfigError, match=r"frontend\.port"):
            async with serving(cluster, port=other.getsockname()[1]):
                pass


async def test_a_server_may_have_the_port_of_the_one_before_whose_connections_it_closed(cluster: Cluster) -> None:
    async with serving(cluster) as (before, port), connected(port):
        await before.stop(grace_s=0)
        async with serving(cluster, port=port), connected(port) as channels:
            assert await asyncio.gather(*map(model_name, channels)) == ["model"] * NUM_CONNECTIONS


@pytest.mark.parametrize("host", ["localhost", "0.0.0.0", "[::]"])
async def test_a_host_may_be_a_name_or_every_interface(cluster: Cluster, host: str) -> None:
    async with serving(cluster, host) as (_, port), connected(port) as channels:
        assert await asyncio.gather(*map(model_name, channels)) == ["model"] * NUM_CONNECTIONS


async def test_a_host_that_is_not_here_is_refused(cluster: Cluster) -> None:
    with pytest.raises(ConfigError, match=r"frontend\.port.*192\.0\.2\.1"):
        async with serving(cluster, "192.0.2.1"):
            pass


async def test_every_connection_hears_whether_it_is_served(cluster: Cluster) -> None:
    async with serving(cluster) as (server, port), connected(port) as channels:
        assert not any(await asyncio.gather(*map(is_serving, channels)))
        await server.set_serving(True)
        assert all(await asyncio.gather(*map(is_serving, channels)))


async def test_a_stop_is_one_of_every_connection(cluster: Cluster) -> None:
    async with serving(cluster) as (server, port), connected(port) as channels:
        await server.stop(grace_s=0)
        answers = await asyncio.gather(*map(model_name, channels), return_exceptions=True)
        codes = [answer.code() for answer in answers if isinstance(answer, grpc.aio.AioRpcError)]
        assert codes == [grpc.StatusCode.UNAVAILABLE] * NUM_CONNECTIONS
