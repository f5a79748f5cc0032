"""The gRPC server of a frontend."""

from __future__ import annotations

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from cluster.cluster_service import ClusterService
from cluster.generation_service import GenerationService
from cluster.server_tls import server_credentials
from cluster.unreadable import Unreadable
from octet.config import FrontendConfig
from octet.errors import ConfigError
from octet.v1 import octet_pb2_grpc as rpc

SERVICES = ("octet.v1.Generation", "octet.v1.Cluster", "")
"""Services that have a health of their own; the empty name is the server's."""


class GrpcServer:
    """The server with both services, health and reflection."""

    def __init__(self, config: FrontendConfig, generation: GenerationService, cluster: ClusterService) -> None:
        limit = config.max_message_mib * 2**20
        self._config = config
        self._server = grpc.aio.server(
            interceptors=[Unreadable()],
            options=[
                # Two servers on one port would share its connections at random; the second must fail.
                ("grpc.so_reuseport", 0),
                ("grpc.max_receive_message_length", limit),
                ("grpc.max_send_message_length", limit),
                ("grpc.keepalive_time_ms", 30_000),
                ("grpc.keepalive_timeout_ms", 10_000),
                ("grpc.keepalive_permit_without_calls", 1),
                ("grpc.http2.min_recv_ping_interval_without_data_ms", 10_000),
            ],
        )
        rpc.add_GenerationServicer_to_server(generation, self._server)
        rpc.add_ClusterServicer_to_server(cluster, self._server)
        self._health = health.aio.HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        reflection.enable_server_reflection((*SERVICES[:2], health.SERVICE_NAME, reflection.SERVICE_NAME), self._server)

    async def start(self, port: int | None = None) -> int:
        """Listen, not serving yet, on this port or the configured one. Returns: the port.

        Raises: ConfigError if it is taken, or a TLS file cannot be read.
        """
        address = f"{self._config.host}:{self._config.port if port is None else port}"
        credentials = server_credentials(self._config.tls)
        try:
            if credentials is None:
                bound = self._server.add_insecure_port(address)
            else:
                bound = self._server.add_secure_port(address, credentials)
        except RuntimeError as error:
            raise ConfigError("frontend.port", address, "a free address of this machine", str(error)) from error
        await self.set_serving(False)
        await self._server.start()
        return bound

    async def set_serving(self, serving: bool) -> None:
        state = health_pb2.HealthCheckResponse.SERVING if serving else health_pb2.HealthCheckResponse.NOT_SERVING
        for service in SERVICES:
            await self._health.set(service, state)

    async def stop(self, grace_s: float) -> None:
        await self._server.stop(grace_s)
