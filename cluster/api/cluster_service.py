"""The Cluster service: what is asked of the cluster as a whole."""

from __future__ import annotations

from collections.abc import Awaitable
from typing import Protocol, TypeVar

from cluster.api.status_codes import Context, abort
from octet.errors import OctetError
from octet.v1 import octet_pb2 as pb
from octet.v1 import octet_pb2_grpc as rpc

_Response = TypeVar("_Response")


class Operations(Protocol):
    """What can be asked of a cluster as a whole. Each raises OctetError."""

    async def status(self, request: pb.GetStatusRequest) -> pb.GetStatusResponse: ...
    async def rebalance(self, request: pb.RebalanceRequest) -> pb.RebalanceResponse: ...
    async def scale(self, request: pb.ScaleRequest) -> pb.ScaleResponse: ...


class ClusterService(rpc.ClusterServicer):
    def __init__(self, operations: Operations) -> None:
        self._operations = operations

    async def GetStatus(self, request: pb.GetStatusRequest, context: Context) -> pb.GetStatusResponse:
        return await _answered(self._operations.status(request), context)

    async def Rebalance(self, request: pb.RebalanceRequest, context: Context) -> pb.RebalanceResponse:
        return await _answered(self._operations.rebalance(request), context)

    async def Scale(self, request: pb.ScaleRequest, context: Context) -> pb.ScaleResponse:
        return await _answered(self._operations.scale(request), context)


async def _answered(answer: Awaitable[_Response], context: Context) -> _Response:
    try:
        return await answer
    except OctetError as error:
        await abort(context, error)
