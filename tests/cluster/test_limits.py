"""What a cluster does when it is full, short of pages, or losing a member."""

from __future__ import annotations

import os
import random
import signal
from concurrent.futures import ThreadPoolExecutor

import pytest

from cluster.fault_points import pid_of
from cluster.launch import RunningCluster
from octet.client import CallError, Client
from octet.errors import CheckpointError, ConfigError, StartupError
from tests.clusters import Start, at_baseline, wait_until

_AT_ONCE = 12


@pytest.fixture(scope="module")
def tight(start: Start) -> RunningCluster:
    """Twelve requests at a time, pages for two or three of them."""
    pages = ("kv.decode_pages=24", "kv.prefill_pages=24", "kv.page_size=4")
    return start(f"frontend.max_requests={_AT_ONCE}", "frontend.reserve=0", "pools.experts.size=1", *pages)


def test_a_shortage_of_pages_preempts_and_changes_no_token(tight: RunningCluster) -> None:
    prompts = [[random.randrange(1000) for _ in range(random.randrange(3, 30))] for _ in range(_AT_ONCE)]
    with Client(tight.address, timeout_s=120) as client:

        def answer(prompt: list[int]) -> list[int]:
            return list(client.generate(prompt, max_new_tokens=40, ignore_eos=True).choices[0].token_ids)

        with ThreadPoolExecutor(len(prompts)) as pool:
            together = list(pool.map(answer, prompts))
        preemptions = next(p for p in client.status().pools if p.name == "decode").members[0].preemptions
        assert together == [answer(prompt) for prompt in prompts]
        # Before any answer has ended, answers are expected to be shorter than these; afterwards, to be just as long.
        assert 0 < preemptions < len(prompts)
        wait_until(lambda: at_baseline(client.status()), 10, "pages back to baseline")


def test_a_full_queue_sheds_with_resource_exhausted(tight: RunningCluster) -> None:
    with Client(tight.address, timeout_s=60) as client:
        ids = [f"full-{number}" for number in range(_AT_ONCE)]
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            # They wait for each other's pages, so that all of them are there when the next one comes.
            for request_id in ids:
                pool.submit(client.generate, [1], max_new_tokens=90, ignore_eos=True, request_id=request_id)
            wait_until(lambda: client.status().live_requests == _AT_ONCE, 10, "all are live")
            with pytest.raises(CallError, match=r"RESOURCE_EXHAUSTED.*max_requests"):
                client.generate("one more")
            for request_id in ids:
                client.abort(request_id)
        wait_until(lambda: at_baseline(client.status()), 10, "pages back to baseline")
        assert client.generate("the next", max_new_tokens=2).usage.completion_tokens == 2


def test_a_killed_frontend_is_replaced_on_its_port_and_its_requests_are_freed(tight: RunningCluster) -> None:
    with Client(tight.address, timeout_s=120) as client:
        expected = client.generate("on and on", max_new_tokens=80, ignore_eos=True).choices[0].token_ids
        pid = pid_of(tight.plan.config.ray.namespace, "frontend-0")
        stream = client.stream("on and on", max_new_tokens=80, ignore_eos=True)
        found = list(next(stream).token_ids)
        os.kill(pid, signal.SIGKILL)
        for chunk in stream:
            assert chunk.offset == len(found)
            found += chunk.token_ids
        assert found == list(expected)
        (change,) = client.status().changes
        assert (change.kind, change.succeeded) == ("recovery", True), change
        wait_until(lambda: at_baseline(client.status()), 30, "pages back to baseline")
    assert tight.state() == ("READY", "")


def test_a_broken_checkpoint_is_refused_before_anything_starts(
    start: Start, tmp_path_factory: pytest.TempPathFactory
) -> None:
    empty = tmp_path_factory.mktemp("empty")
    with pytest.raises(CheckpointError, match=r"config\.json"):
        start(f"model.path={empty}")


def test_a_port_that_is_taken_is_a_config_error(start: Start, embedded: RunningCluster) -> None:
    port = embedded.address.rpartition(":")[2]
    with pytest.raises(ConfigError, match=r"frontend\.port"):
        start(f"frontend.port={port}")


def test_pools_that_ray_cannot_place_are_a_startup_error(start: Start) -> None:
    with pytest.raises(StartupError, match="nowhere"):
        start("pools.experts.resources={nowhere: 1}", "ray.start_timeout_s=8")
