"""The gRPC servers of a frontend."""

from __future__ import annotations

import asyncio
import sys

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from cluster.api.cluster_service import ClusterService
from cluster.api.exclusive_port import exclusive_port
from cluster.api.generation_service import GenerationService
from cluster.api.server_tls import server_credentials
from cluster.api.unreadable import Unreadable
from octet.addresses import with_port
from octet.config import FrontendConfig
from octet.errors import ConfigError
from octet.v1 import octet_pb2_grpc as rpc

SERVICES = ("octet.v1.Generation", "octet.v1.Cluster", "")
"""Services that have a health of their own; the empty name is the server's."""

_SHARES_PORTS = sys.platform == "linux"
"""Elsewhere sockets that share a port do not share its connections."""
_SERVERS = 8 if _SHARES_PORTS else 1
"""Each accepts one call after the other, and takes some six turns of the event loop for it. Under overload the slowest
refusals took half as long with eight that share the connections (docs/benchmarks.md)."""


class GrpcServer:
    """Servers on one port and one event loop, with both services, health and reflection. The kernel gives each
    connection to one of them."""

    def __init__(self, config: FrontendConfig, generation: GenerationService, cluster: ClusterService) -> None:
        self._config = config
        self._health = health.aio.HealthServicer()
        self._servers = [_server(config) for _ in range(_SERVERS)]
        for server in self._servers:
            rpc.add_GenerationServicer_to_server(generation, server)
            rpc.add_ClusterServicer_to_server(cluster, server)
            health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
            reflection.enable_server_reflection((*SERVICES[:2], health.SERVICE_NAME, reflection.SERVICE_NAME), server)

    async def start(self, port: int | None = None) -> int:
        """Listen, not serving yet, on this port or the configured one. Returns: the port.

        Raises: ConfigError if it is taken, or a TLS file cannot be read.
        """
        host, port = self._config.host, self._config.port if port is None else port
        credentials = server_credentials(self._config.tls)
        try:
            if _SHARES_PORTS:
                with exclusive_port(host, port) as (addresses, bound):
                    for server in self._servers:
                        for address in addresses:
                            _bind(server, f"{address}:{bound}", credentials)
            else:
                bound = _bind(self._servers[0], with_port(host, port), credentials)
        except (OSError, RuntimeError) as error:
            raise ConfigError(
                "frontend.port", f"{host}:{port}", "a free address of this machine", str(error)
            ) from error
        await self.set_serving(False)
        await asyncio.gather(*(server.start() for server in self._servers))
        return bound

    async def set_serving(self, serving: bool) -> None:
        state = health_pb2.HealthCheckResponse.SERVING if serving else health_pb2.HealthCheckResponse.NOT_SERVING
        for service in SERVICES:
            await self._health.set(service, state)

    async def stop(self, grace_s: float) -> None:
        await asyncio.gather(*(server.stop(grace_s) for server in self._servers))


def _bind(server: grpc.aio.Server, address: str, credentials: grpc.ServerCredentials | None) -> int:
    """Returns: the port. Raises: RuntimeError."""
    bound: int = (
        server.add_insecure_port(address) if credentials is None else server.add_secure_port(address, credentials)
    )
    return bound


def _server(config: FrontendConfig) -> grpc.aio.Server:
    limit = config.max_message_mib * 2**20
    return grpc.aio.server(
        interceptors=[Unreadable()],
        options=[
            ("grpc.so_reuseport", int(_SHARES_PORTS)),
            ("grpc.max_receive_message_length", limit),
            ("grpc.max_send_message_length", limit),
            ("grpc.keepalive_time_ms", 30_000),
            ("grpc.keepalive_timeout_ms", 10_000),
            ("grpc.keepalive_permit_without_calls", 1),
            ("grpc.http2.min_recv_ping_interval_without_data_ms", 10_000),
        ],
    )
