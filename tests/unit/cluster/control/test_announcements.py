"""Services that do not hear who serves."""

from __future__ import annotations

import pytest

from cluster.control.services import FRONTEND
from octet.errors import UnavailableError
from tests.unit.cluster.played import soon
from tests.unit.cluster.played_actors import Played
from tests.unit.cluster.played_cluster import Router, cluster_of


async def test_who_has_left_is_ended_where_the_router_service_does_not_hear_of_it() -> None:
    router = Router("router", refuses=("watch",))
    cluster = await cluster_of(router=router)
    await soon(cluster.changes.sizes.scale("prefill", 1, "for a test"))
    assert cluster.pools.ended == ["prefill-1"]
    assert "stop" in cluster.actors["prefill-1"].calls
    assert "prefill-1" not in cluster.watched
    router.refuses = ()
    router.calls.clear()
    await soon(cluster.changes.announcements.tell_again())
    await soon(cluster.changes.announcements.tell_again())
    assert router.calls == ["watch"], "once it hears, it is told no more"


async def test_a_frontend_that_was_not_told_is_told_again_who_serves_by_then() -> None:
    frontend = Played("frontend-0", refuses=("set_workers",))
    cluster = await cluster_of(frontend=frontend)
    await soon(cluster.changes.sizes.scale("prefill", 1, "for a test"))
    frontend.refuses = ()
    frontend.calls.clear()
    await soon(cluster.changes.announcements.tell_again())
    assert frontend.calls == ["set_workers"]
    await soon(cluster.changes.announcements.tell_again())
    assert frontend.calls == ["set_workers"]


async def test_a_frontend_that_does_not_hear_that_it_is_to_serve_makes_way_for_another() -> None:
    cluster = await cluster_of(frontend=Played("frontend-0", refuses=("serve",)))
    with pytest.raises(UnavailableError):
        await soon(cluster.changes.replace_frontend("for a test"))
    assert cluster.services.given_up == 1
    assert cluster.membership.frontends[FRONTEND] == "tcp://h:9"
