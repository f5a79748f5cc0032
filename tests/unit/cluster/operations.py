"""Operations for servers that are tested without a cluster behind them."""

from __future__ import annotations

from octet.errors import UnavailableError
from octet.v1 import octet_pb2 as pb


class NoOperations:
    """A frontend without a controller."""

    async def status(self, request: pb.GetStatusRequest) -> pb.GetStatusResponse:
        raise UnavailableError("there is no controller")

    async def rebalance(self, request: pb.RebalanceRequest) -> pb.RebalanceResponse:
        raise UnavailableError("there is no controller")

    async def scale(self, request: pb.ScaleRequest) -> pb.ScaleResponse:
        raise UnavailableError("there is no controller")
