"""What the Cluster service says of the cluster, by a controller that is played."""

from __future__ import annotations

from typing import Any

from cluster.api.cluster_status import ClusterStatus
from cluster.api.operations import ControllerOperations
from cluster.members import MemberStatus
from octet.ids import Epoch, PlacementVersion, WorkerId
from octet.v1 import octet_pb2 as pb
from tests.unit.cluster.played import soon


class Controller:
    """Two decode workers serve, and a third waits to."""

    def __init__(self) -> None:
        self.asked: list[Any] = []

    @property
    def scale(self) -> Any:
        return _Method(self._scale)

    @property
    def status(self) -> Any:
        return _Method(self._status)

    async def _scale(self, sizes: dict[str, int]) -> None:
        self.asked.append(sizes)

    async def _status(self, window_s: float | None) -> ClusterStatus:
        states = ("READY", "READY", "STANDBY")
        decode = [
            MemberStatus(worker_id=WorkerId(f"decode-{number}"), node_id="n", pid=1, state=state)
            for number, state in enumerate(states)
        ]
        return ClusterStatus(
            state="READY",
            reason="",
            members={"prefill": [], "decode": decode, "experts": []},
            sizes={"prefill": 0, "decode": 2, "experts": 0},
            telemetry=None,
            epoch=Epoch(1),
            placement_version=PlacementVersion(1),
            changes=(),
            under_way="",
            waiting_for="",
            decisions=None,
            decisions_s=0.0,
        )


class _Method:
    def __init__(self, answer: Any) -> None:
        self.remote = answer


async def test_processes_on_standby_are_no_part_of_a_pools_size() -> None:
    controller, any_frontend = Controller(), Any
    operations = ControllerOperations(controller, any_frontend)  # type: ignore[arg-type]
    request = pb.ScaleRequest(sizes=[pb.PoolSize(pool="decode", size=2)])
    answer = await soon(operations.scale(request))
    assert controller.asked == [{"decode": 2}]
    assert {pool.pool: pool.size for pool in answer.sizes} == {"prefill": 0, "decode": 2, "experts": 0}
