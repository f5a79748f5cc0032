"""The controller's process is killed: streams do not notice, and another one goes on with what it knew."""

from __future__ import annotations

import pytest

from cluster.fault_points import arm, pid_of
from cluster.inventory import inventory
from octet.client import CallError, Client
from octet.faults import Fault
from ops.chaos.schedule import Kill
from tests.chaos.conftest import Chaos
from tests.clusters import members, wait_until


def test_streams_do_not_notice_and_the_next_controller_recovers_and_scales(chaos: Chaos) -> None:
    before = chaos.status()
    verdict = chaos.run(Kill(at_s=0.3, target="controller"), Kill(at_s=0.9, target="experts"), complete=True)
    assert verdict.violations == ()
    status = chaos.status()
    assert status.epoch > before.epoch
    print(
        f"another controller answered {verdict.history.faults[0].until_s - verdict.history.faults[0].at_s:.2f} s later"
    )
    kinds = [(change.kind, change.succeeded) for change in status.changes[len(before.changes) :]]
    assert kinds[:2] == [("recovery", True), ("recovery", True)], status.changes
    assert "the controller" in status.changes[len(before.changes)].reason
    kept = {name: member.pid for name, member in members(before, "decode").items()}
    assert {name: member.pid for name, member in members(status, "decode").items()} == kept
    with Client(chaos.cluster.address, timeout_s=120) as client:
        for size in (2, 3):
            client.scale(experts=size)
            assert len(members(client.status(), "experts")) == size


@pytest.mark.parametrize(("point", "size"), [("change.prepared", 4), ("change.adopted", 4), ("change.adopted", 2)])
def test_a_change_under_way_is_brought_to_its_end_or_given_up(chaos: Chaos, point: str, size: int) -> None:
    wait_until(chaos.whole, 120, "every pool has its size")
    namespace = chaos.cluster.plan.config.ray.namespace
    epoch, pid = chaos.status().epoch, pid_of(namespace, "controller")
    arm(namespace, "controller", Fault(point=point, action="kill"))
    with Client(chaos.cluster.address, timeout_s=120) as client:
        with pytest.raises(CallError, match=r"UNAVAILABLE.*the controller was lost and replaced"):
            client.scale(experts=size)
        verdict = chaos.run()
        assert verdict.violations == ()
        status = client.status()
        assert pid_of(namespace, "controller") != pid
        if point == "change.adopted":
            assert len(members(status, "experts")) == size
            assert status.epoch > epoch
            client.scale(experts=3)
        assert len(members(client.status(), "experts")) == 3
    wait_until(chaos.whole, 60, "nothing is under way")
    held, known = inventory(namespace), {m.worker_id for pool in chaos.status().pools for m in pool.members}
    assert held.actors - known == {"controller", "frontend-0", "router"}
