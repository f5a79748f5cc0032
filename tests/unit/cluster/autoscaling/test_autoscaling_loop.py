from __future__ import annotations

import asyncio

import pytest

from cluster.api.status_decisions import add_decisions
from cluster.autoscaling.autoscaler import PoolDecision
from cluster.autoscaling.autoscaling_loop import AutoscalingLoop
from cluster.autoscaling.decision_log import DecisionLog, Logged
from cluster.autoscaling.signals import Signals
from cluster.members import POOLS
from octet.errors import UnavailableError
from octet.v1 import octet_pb2 as pb
from ops.render_decisions import print_decisions
from tests.unit.cluster.scaling import FLEET, experts, member, pool, scaling, signals

BUSY = signals(arriving=3 * 350, shards=experts(member(busy=0.3)))


class Cluster:
    def __init__(self, sees: Signals | Exception, fails: Exception | None = None) -> None:
        self.sees, self._fails = sees, fails
        self.done: list[tuple[str, int]] = []
        self.loop = AutoscalingLoop(scaling(action_timeout_s=0.2), FLEET, self.observe, self.act, lambda: 7.0)

    async def observe(self) -> Signals:
        if isinstance(self.sees, Exception):
            raise self.sees
        return self.sees

    async def act(self, one: PoolDecision) -> None:
        if self._fails is not None:
            raise self._fails
        self.done.append((one.pool, one.target))


async def stepped(cluster: Cluster) -> Cluster:
    await cluster.loop.step()
    await asyncio.sleep(0.01)
    return cluster


async def test_a_decision_is_recorded_and_carried_out() -> None:
    cluster = await stepped(Cluster(BUSY))
    assert cluster.done == [("prefill", 2)]
    assert cluster.loop.log.actions[0].outcome == "done"


async def test_a_refused_action_is_told_with_its_reason_and_ends_nothing() -> None:
    cluster = await stepped(Cluster(BUSY, fails=UnavailableError("no node has room")))
    assert cluster.loop.log.actions[0].outcome == "no node has room"
    # The next decision tries again, and does not wait for the time that an action may take.
    await stepped(cluster)
    assert [action.target for action in cluster.loop.log.actions] == [2, 2]


async def test_without_signals_nothing_is_decided() -> None:
    cluster = await stepped(Cluster(UnavailableError("the router is gone")))
    assert cluster.done == []
    assert cluster.loop.log.latest == ()


async def test_a_cluster_without_members_hears_of_its_first_request_at_once() -> None:
    cluster = Cluster(signals(pool(), pool(), experts(), arriving=0))
    config = scaling(metrics_interval_s=30, **{name: {"min_replicas": 0} for name in POOLS})
    cluster.loop = AutoscalingLoop(config, FLEET, cluster.observe, cluster.act, lambda: 7.0)
    await cluster.loop.step()
    looking = asyncio.create_task(cluster.loop.run())
    cluster.sees = signals(pool(), pool(), experts(), arriving=0, requests_waiting=1)
    await asyncio.sleep(1.0)
    looking.cancel()
    assert [name for name, _ in cluster.done] == ["prefill", "decode", "experts"]


async def test_an_action_that_hangs_is_given_up() -> None:
    cluster = Cluster(BUSY)

    async def hang(one: PoolDecision) -> None:
        await asyncio.sleep(60)

    cluster.loop = AutoscalingLoop(scaling(action_timeout_s=0.05), FLEET, cluster.observe, hang)
    await cluster.loop.step()
    await asyncio.sleep(0.1)
    assert "not complete" in cluster.loop.log.actions[0].outcome


async def test_the_status_tells_what_was_decided_and_why(capsys: pytest.CaptureFixture[str]) -> None:
    status = pb.GetStatusResponse()
    print_decisions(status)
    assert "off" in capsys.readouterr().out
    cluster = await stepped(Cluster(BUSY))
    add_decisions(status, cluster.loop.log, now_s=10.0)
    assert status.decisions[0].age_s == 3.0
    assert len(status.latest_decisions) == 4
    print_decisions(status)
    shown = capsys.readouterr().out
    assert "prefill" in shown
    assert "done" in shown


async def test_actions_under_way_end_with_the_loop() -> None:
    cluster, begun, ended = Cluster(BUSY), asyncio.Event(), asyncio.Event()

    async def hang(one: PoolDecision) -> None:
        begun.set()
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()

    cluster.loop = AutoscalingLoop(scaling(metrics_interval_s=0.01), FLEET, cluster.observe, hang)
    running = asyncio.create_task(cluster.loop.run())
    await asyncio.wait_for(begun.wait(), 20.0)
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    await asyncio.wait_for(ended.wait(), 20.0)


def action(pool: str, target: int, outcome: str = "") -> Logged:
    return Logged(at_s=1.0, pool=pool, current=1, wanted=target, target=target, reason="load", outcome=outcome)


def test_the_outcome_is_that_of_the_last_action_with_the_target() -> None:
    log = DecisionLog()
    log.take_over([action("decode", 2, "done"), action("prefill", 2, "done"), action("decode", 3, "done")], [])
    log.take_over([action("decode", 2, "?"), action("prefill", 2, "?")], [])
    log.end("decode", 2, "refused")
    assert [one.outcome for one in log.actions] == ["done", "done", "done", "refused", "?"]


def test_of_what_another_controller_had_under_way_no_outcome_is_known() -> None:
    log = DecisionLog()
    log.take_over([action("decode", 2, "done"), action("prefill", 2)], [action("decode", 2)])
    assert [one.outcome for one in log.actions] == ["done", "not known, as the controller was lost meanwhile"]
    assert [one.pool for one in log.latest] == ["decode"]
