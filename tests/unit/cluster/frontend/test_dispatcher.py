"""What workers are taken to have in hand and in their caches, and when a request is tried again."""

from __future__ import annotations

import asyncio
import random
from typing import cast

import pytest

from cluster.frontend.frontend import Frontend
from cluster.frontend.record import Reader
from cluster.frontend.validation import parse_request
from cluster.planning import make_plan
from octet.config import load_config
from octet.ids import WorkerId
from octet.mailbox import AsyncMailbox
from octet.messages import unpack_ids
from octet.v1 import octet_pb2 as pb
from tests.unit.cluster.played import PROMPT, Client, Cluster, evicted, failed, playing, token
from tests.unit.cluster.pools import Pools, PoolsMailbox, VirtualLoop, Worker

PAGE = 4


def plan_of(*settings: str) -> list[str]:
    return [f"kv.page_size={PAGE}", *settings]


def ask(cluster: Cluster, token_ids: list[int], name: str) -> Client:
    return cluster.send(
        pb.GenerateRequest(
            request_id=name,
            token_ids=pb.TokenIds(ids=token_ids),
            stopping=pb.Stopping(max_new_tokens=50, ignore_eos=True),
        )
    )


def prompt(num_tokens: int) -> list[int]:
    return [random.randrange(1000) for _ in range(num_tokens)]


def queued(cluster: Cluster) -> float:
    return cluster.frontend.request_load().queued_prompt_tokens


# What is counted as in a worker's hands.


@pytest.mark.parametrize("how", ["evicted", "failed", "left"])
async def test_a_prompt_that_starts_again_is_queued_once(how: str) -> None:
    async with playing() as cluster:
        client, request = await cluster.admitted()
        other = cluster.new_worker("decode-1")
        if how == "left":
            cluster.set_workers([cluster.prefill], [other])
        else:
            cluster.set_workers([cluster.prefill], [cluster.decode, other])
            lost = evicted(request) if how == "evicted" else failed(request, "lane broke", retryable=True)
            cluster.decode.tell(lost)
        again = await cluster.prefill.next_request()
        assert again.attempt != request.attempt
        assert queued(cluster) == len(PROMPT)
        cluster.prefill.tell(token(again, 0, 100))
        await client.heard(1)
        assert queued(cluster) == 0
        await client.leave()


async def test_a_choice_that_has_ended_takes_no_place_in_a_batch() -> None:
    async with playing() as cluster:
        most, found = cluster.frontend._dispatcher.free_places(1), list[int]()
        client, request = await cluster.admitted(n=2)
        found.append(cluster.frontend._dispatcher.free_places(1))
        cluster.decode.tell(token(request, 0, 100, "stop"), token(request, 0, 200, choice=1))
        await client.heard(1)
        found.append(cluster.frontend._dispatcher.free_places(1))
        cluster.decode.tell(token(request, 1, 201, "length", choice=1))
        await client.end()
        found.append(cluster.frontend._dispatcher.free_places(1))
        assert found == [most - 2, most - 1, most]


# What a worker is taken to have in its cache.


async def test_a_prompt_goes_where_its_beginning_was_computed() -> None:
    async with playing(make_plan(load_config(None, plan_of()))) as cluster:
        other = cluster.new_worker("prefill-1")
        cluster.set_workers([cluster.prefill, other], [cluster.decode])
        begin = prompt(3 * PAGE)
        first = ask(cluster, prompt(PAGE), "first")
        held = await cluster.prefill.next_request()
        second = ask(cluster, begin, "second")
        request = await other.next_request()
        other.tell(token(request, 0, 100, "length"))
        cluster.prefill.tell(token(held, 0, 100, "length"))
        await first.end()
        await second.end()
        third = ask(cluster, [*begin, *prompt(2)], "third")
        assert (await other.next_request()).request_id == "third"
        assert queued(cluster) == 2, "of what it is taken to have nothing is queued"
        await third.leave()


async def test_what_is_cached_does_not_count_as_arriving() -> None:
    async with playing(make_plan(load_config(None, plan_of()))) as cluster:
        begin, more = prompt(3 * PAGE), prompt(2)
        first = ask(cluster, begin, "first")
        await cluster.prefill.next_request()
        second = ask(cluster, [*begin, *more], "second")
        await cluster.prefill.next_request()
        load = cluster.frontend.request_load()
        assert load.arriving_prompt_tokens_per_s * load.period_s == pytest.approx(3 * PAGE + 2)
        for client in (first, second):
            await client.leave()


async def test_an_answer_that_was_computed_again_is_not_taken_for_cached() -> None:
    async with playing(make_plan(load_config(None, plan_of()))) as cluster:
        begin, answer = prompt(PAGE), prompt(PAGE)
        client = ask(cluster, begin, "first")
        request = await cluster.prefill.next_request()
        cluster.decode.tell(*(token(request, *each) for each in enumerate(answer)), evicted(request))
        again = await cluster.prefill.next_request()
        assert unpack_ids(again.token_ids) == [*begin, *answer]
        cluster.prefill.tell(token(again, PAGE, 100, "length"))
        await client.end()
        following = ask(cluster, [*begin, *answer, 5], "following")
        await cluster.prefill.next_request()
        assert queued(cluster) == PAGE + 1
        await following.leave()


async def test_without_prefix_caches_nothing_is_taken_for_cached() -> None:
    async with playing(make_plan(load_config(None, plan_of("prefill.prefix_cache=false")))) as cluster:
        same = prompt(3 * PAGE)
        for name in ("first", "second"):
            client = ask(cluster, same, name)
            request = await cluster.prefill.next_request()
            assert queued(cluster) == len(same)
            cluster.prefill.tell(token(request, 0, 100, "length"))
            await client.end()


# What every worker has failed.


def test_what_fails_everywhere_is_tried_later_each_time_up_to_two_seconds() -> None:
    loop, pools = VirtualLoop(), Pools()
    plan = make_plan(load_config(None, ["frontend.max_attempts=100"]))
    worker = pools.prefill[WorkerId("prefill-0")] = Worker(WorkerId("prefill-0"))
    pools.decode[WorkerId("decode-0")] = Worker(WorkerId("decode-0"))
    waits: list[float] = []

    async def settle() -> None:
        for _ in range(10):
            await asyncio.sleep(0)

    async def play() -> None:
        mailbox = PoolsMailbox(pools)
        frontend = Frontend(WorkerId("frontend-0"), plan, None, cast(AsyncMailbox, mailbox))
        frontend.serve({worker.worker_id: ""}, {WorkerId("decode-0"): ""})
        asked = pb.GenerateRequest(token_ids=pb.TokenIds(ids=PROMPT), stopping=pb.Stopping(max_new_tokens=2))
        with frontend.generate(parse_request(asked, frontend.limits, None), 1000.0) as reader:
            assert isinstance(reader, Reader)
            for _ in range(8):
                assert len(worker.prompts) == 1
                pools.fail(worker)
                mailbox.inbound.put_nowait(pools.reports[worker.worker_id].popleft())
                await settle()
                failed_s = loop.now_s
                while not worker.prompts:
                    loop.now_s += 0.05
                    await settle()
                waits.append(loop.now_s - failed_s)
        frontend.close()
        await settle()

    loop.run_until_complete(play())
    loop.close()
    assert waits == pytest.approx([0.1, 0.2, 0.4, 0.8, 1.6, 2.0, 2.0, 2.0], abs=0.06)
