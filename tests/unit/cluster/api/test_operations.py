"""What the Cluster service says of the cluster, by a controller that is played."""

from __future__ import annotations

from typing import Any

import pytest
from ray.exceptions import ActorDiedError, ActorUnavailableError

from cluster.api.cluster_status import ClusterStatus
from cluster.api.operations import ControllerOperations
from cluster.members import MemberStatus
from octet.errors import UnavailableError
from octet.ids import Epoch, PlacementVersion, WorkerId
from octet.v1 import octet_pb2 as pb
from tests.unit.cluster.played import playing, soon, token


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


async def test_the_status_has_what_the_frontend_has_counted() -> None:
    controller: Any = Controller()
    async with playing() as cluster:
        client, request = await cluster.admitted()
        cluster.decode.tell(token(request, 0, 100), token(request, 1, 101, "length"))
        await client.end()
        status = await soon(ControllerOperations(controller, cluster.frontend).status(pb.GetStatusRequest()))
    told = status.request_histograms
    assert (status.requests_finished, status.tokens_served, status.live_requests) == (1, 2, 0)
    assert [sum(each.counts) for each in (told.ttft_s, told.itl_s, told.e2e_s)] == [1, 1, 1]
    assert 0 < told.ttft_s.sum <= told.e2e_s.sum
    assert (told.prompt_tokens.sum, told.new_tokens.sum) == (request.num_prompt_tokens, 2)
    assert len(told.itl_s.bounds) + 1 == len(told.itl_s.counts)


class Replaced(Controller):
    """Its process is lost when it is first asked, and another one takes its place."""

    def __init__(self, *, comes_back: bool) -> None:
        super().__init__()
        self.comes_back, self.num_asked = comes_back, 0

    def _lose(self) -> None:
        self.num_asked += 1
        if not self.comes_back:
            raise ActorDiedError
        if self.num_asked == 1:
            raise ActorUnavailableError("its process was lost", None)

    async def _scale(self, sizes: dict[str, int]) -> None:
        await super()._scale(sizes)
        self._lose()

    async def _status(self, window_s: float | None) -> ClusterStatus:
        self._lose()
        return await super()._status(window_s)


async def test_the_status_is_asked_for_again_where_the_controller_is_replaced() -> None:
    controller, any_frontend = Replaced(comes_back=True), Any
    status = await soon(ControllerOperations(controller, any_frontend)._status())  # type: ignore[arg-type]
    assert (status.state, controller.num_asked) == ("READY", 2)


async def test_a_controller_that_does_not_come_back_is_not_waited_for() -> None:
    controller, any_frontend = Replaced(comes_back=False), Any
    with pytest.raises(UnavailableError, match="its process is gone"):
        await soon(ControllerOperations(controller, any_frontend)._status())  # type: ignore[arg-type]
    assert controller.num_asked == 1


@pytest.mark.parametrize(("comes_back", "says"), [(True, "lost and replaced during the change"), (False, "is gone")])
async def test_a_change_is_asked_for_once_whatever_becomes_of_the_controller(comes_back: bool, says: str) -> None:
    controller, any_frontend = Replaced(comes_back=comes_back), Any
    operations = ControllerOperations(controller, any_frontend)  # type: ignore[arg-type]
    with pytest.raises(UnavailableError, match=says) as caught:
        await soon(operations.scale(pb.ScaleRequest(sizes=[pb.PoolSize(pool="decode", size=2)])))
    assert len(controller.asked) == 1
    assert ("look at the status" in str(caught.value)) == comes_back
