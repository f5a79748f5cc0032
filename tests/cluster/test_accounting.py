"""Pages, leases and counts after a thousand requests that end in every possible way."""

from __future__ import annotations

import asyncio
import collections

import pytest

from cluster.launch import RunningCluster
from octet.client import AsyncClient, Client
from octet.v1 import octet_pb2 as pb
from ops.bench.soak import random_prefixes, random_request
from tests.clusters import at_baseline, wait_until

_REQUESTS, _AT_ONCE = 1000, 40


@pytest.mark.timeout(200)
async def test_a_thousand_random_requests_leave_nothing_behind(paired: RunningCluster) -> None:
    ended: collections.Counter[str] = collections.Counter()
    with Client(paired.address, timeout_s=30) as blocking:
        before = blocking.status()
    gate, prefixes = asyncio.Semaphore(_AT_ONCE), random_prefixes()
    async with AsyncClient(paired.address, timeout_s=60) as client:

        async def gated(number: int) -> None:
            async with gate:
                ended[await random_request(client, f"r{number}", prefixes)] += 1

        await asyncio.gather(*map(gated, range(_REQUESTS)))
    with Client(paired.address, timeout_s=30) as blocking:
        wait_until(lambda: at_baseline(blocking.status()), 20, "pages back to baseline")
        status = blocking.status()
    assert status.requests_failed == 0
    # A deadline may pass before the server has heard of the request, which then counts nowhere.
    accounted = ended_of(status) - ended_of(before)
    accepted = _REQUESTS - ended["refused"]
    assert accepted - ended["past their deadline"] <= accounted <= accepted
    assert ended.keys() >= {"whole", "left", "aborted"}
    assert ended["refused"] + ended["past their deadline"] > 0, "no deadline was too short"


def ended_of(status: pb.GetStatusResponse) -> int:
    return status.requests_finished + status.requests_cancelled
