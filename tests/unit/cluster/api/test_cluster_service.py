"""What is asked of a cluster as a whole, and how a refusal is told."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest

from cluster.api.cluster_service import ClusterService
from octet.errors import ChangeRefusedError, ConfigError, OctetError, StartupError, UnavailableError
from octet.v1 import octet_pb2 as pb
from octet.v1 import octet_pb2_grpc as rpc
from tests.unit.cluster.operations import NoOperations
from tests.unit.cluster.played import PATIENT_S


class Refusing(NoOperations):
    """Every change ends in the same way."""

    def __init__(self) -> None:
        self.error: OctetError = UnavailableError("")

    async def rebalance(self, request: pb.RebalanceRequest) -> pb.RebalanceResponse:
        raise self.error

    async def scale(self, request: pb.ScaleRequest) -> pb.ScaleResponse:
        raise self.error


@pytest.fixture
def operations() -> Refusing:
    return Refusing()


@pytest.fixture
async def stub(operations: Refusing) -> AsyncIterator[Any]:
    server = grpc.aio.server()
    rpc.add_ClusterServicer_to_server(ClusterService(operations), server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        yield rpc.ClusterStub(channel)
    await server.stop(grace=0)


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ChangeRefusedError("no node had room"), grpc.StatusCode.FAILED_PRECONDITION),
        (ConfigError("pools.experts.size", 17, "at most 16"), grpc.StatusCode.FAILED_PRECONDITION),
        (UnavailableError("the router: no answer within 10 s"), grpc.StatusCode.UNAVAILABLE),
        (StartupError("Ray did not start a process"), grpc.StatusCode.UNAVAILABLE),
    ],
    ids=["the state of the cluster", "its config", "a process that is silent", "a process that does not start"],
)
async def test_what_cannot_be_done_as_things_are_is_told_from_what_may_be_tried_again(
    operations: Refusing, stub: Any, error: OctetError, code: grpc.StatusCode
) -> None:
    operations.error = error
    for call in (stub.Scale(pb.ScaleRequest(), timeout=PATIENT_S), stub.Rebalance(pb.RebalanceRequest())):
        with pytest.raises(grpc.RpcError) as caught:
            await call
        assert (caught.value.code(), caught.value.details()) == (code, str(error))
