"""What becomes of live requests when attention workers come, go and fail."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from cluster.planning import make_plan
from octet.config import load_config
from octet.errors import UnavailableError
from octet.messages import Abort, PrefillRequest, unpack_ids
from tests.unit.cluster.played import PROMPT, Client, Cluster, abort, failed, playing, token

MAX_ATTEMPTS = 3


@pytest.fixture
async def cluster() -> AsyncIterator[Cluster]:
    async with playing(make_plan(load_config(None, [f"frontend.max_attempts={MAX_ATTEMPTS}"]))) as cluster:
        yield cluster


async def decoding(cluster: Cluster, **fields: int) -> tuple[Client, PrefillRequest]:
    """A request whose decode worker has told its second token."""
    client, request = await cluster.admitted(**fields)
    for choice in request.choices:
        cluster.prefill.tell(token(request, 0, 100, choice=choice))
    await client.heard(1)
    for choice in request.choices:
        cluster.decode.tell(token(request, 1, 101, choice=choice))
    await client.heard(2)
    return client, request


# A worker that leaves.


async def test_when_its_decode_worker_leaves_a_request_goes_on_at_another(cluster: Cluster) -> None:
    client, _ = await decoding(cluster)
    other = cluster.new_worker("decode-1")
    cluster.set_workers([cluster.prefill], [other])
    again = await cluster.prefill.next_request()
    assert (unpack_ids(again.token_ids), again.decode_worker) == ([*PROMPT, 100, 101], "decode-1")
    cluster.prefill.tell(token(again, 2, 102))
    other.tell(token(again, 3, 103, "length"))
    assert (await client.end()).tokens() == [100, 101, 102, 103]


async def test_when_its_prefill_worker_leaves_a_prompt_starts_again_at_another(cluster: Cluster) -> None:
    client, request = await cluster.admitted()
    other = cluster.new_worker("prefill-1")
    cluster.set_workers([other], [cluster.decode])
    again = await other.next_request()
    assert (unpack_ids(again.token_ids), again.attempt > request.attempt) == (PROMPT, True)
    other.tell(token(again, 0, 100, "length"))
    assert (await client.end()).tokens() == [100]


async def test_a_choice_that_is_decoded_does_not_need_its_prefill_worker_any_more(cluster: Cluster) -> None:
    client, request = await decoding(cluster)
    cluster.set_workers([cluster.new_worker("prefill-1")], [cluster.decode])
    cluster.decode.tell(token(request, 2, 102, "length"))
    assert (await client.end()).tokens() == [100, 101, 102]


async def test_a_choice_whose_kv_may_not_have_left_its_prefill_worker_starts_again_without_it(cluster: Cluster) -> None:
    """The first token is told before the pages are offered; a worker may be lost between the two."""
    client, request = await cluster.admitted()
    cluster.prefill.tell(token(request, 0, 100))
    await client.heard(1)
    other = cluster.new_worker("prefill-1")
    cluster.set_workers([other], [cluster.decode])
    again = await other.next_request()
    assert unpack_ids(again.token_ids) == [*PROMPT, 100]
    assert await cluster.decode.next() == abort(request), "should it have the pages after all"
    await client.leave()


async def test_a_prompt_whose_decode_worker_leaves_is_aimed_at_another(cluster: Cluster) -> None:
    client, request = await cluster.admitted()
    other = cluster.new_worker("decode-1")
    cluster.set_workers([cluster.prefill], [other])
    assert await cluster.prefill.next() == abort(request), "before the new attempt comes"
    again = await cluster.prefill.next_request()
    assert again.decode_worker == "decode-1"
    cluster.prefill.tell(token(request, 0, 1), token(again, 0, 100, "length"))
    assert (await client.end()).tokens() == [100]


async def test_choices_that_had_not_begun_share_their_prompt_again(cluster: Cluster) -> None:
    client, _ = await cluster.admitted(n=3)
    cluster.set_workers([cluster.prefill], [cluster.new_worker("decode-1")])
    assert (await cluster.prefill.next_request()).choices == (0, 1, 2)
    await client.leave()


async def test_choices_that_had_begun_go_on_each_from_its_own_tokens(cluster: Cluster) -> None:
    client, request = await cluster.admitted(n=2)
    cluster.prefill.tell(token(request, 0, 100), token(request, 0, 200, choice=1))
    await client.heard(1)
    cluster.decode.tell(token(request, 1, 101))
    await client.heard(2)
    cluster.set_workers([cluster.prefill], [cluster.new_worker("decode-1")])
    requests = [await cluster.prefill.next_request() for _ in range(2)]
    assert [(r.choices, unpack_ids(r.token_ids)) for r in requests] == [
        ((0,), [*PROMPT, 100, 101]),
        ((1,), [*PROMPT, 200]),
    ]
    assert requests[0].attempt != requests[1].attempt
    await client.leave()


async def test_what_a_lost_worker_still_says_is_dropped(cluster: Cluster) -> None:
    client, request = await decoding(cluster)
    other = cluster.new_worker("decode-1")
    cluster.set_workers([cluster.prefill], [other])
    again = await cluster.prefill.next_request()
    cluster.decode.tell(token(request, 2, 1), token(again, 2, 2))
    other.tell(token(again, 2, 102, "length"))
    assert (await client.end()).tokens() == [100, 101, 102]


async def test_a_request_that_is_elsewhere_is_left_alone(cluster: Cluster) -> None:
    client, request = await decoding(cluster)
    cluster.set_workers([cluster.prefill, cluster.new_worker("prefill-1")], [cluster.decode])
    cluster.set_workers([cluster.prefill], [cluster.decode, cluster.new_worker("decode-1")])
    cluster.decode.tell(token(request, 2, 102, "length"))
    assert (await client.end()).tokens() == [100, 101, 102]


# A worker that drains.


async def test_a_draining_worker_is_given_nothing_new(cluster: Cluster) -> None:
    others = cluster.new_worker("prefill-1"), cluster.new_worker("decode-1")
    cluster.set_workers(
        [cluster.prefill, others[0]], [cluster.decode, others[1]], draining=[cluster.prefill, cluster.decode]
    )
    clients = [cluster.ask(request_id=str(number)) for number in range(3)]
    requests = [await others[0].next_request() for _ in clients]
    assert {request.decode_worker for request in requests} == {"decode-1"}
    for client in clients:
        await client.leave()


async def test_what_is_at_a_draining_worker_goes_on_there(cluster: Cluster) -> None:
    client, request = await decoding(cluster)
    cluster.set_workers([cluster.prefill], [cluster.decode, cluster.new_worker("decode-1")], draining=[cluster.decode])
    cluster.decode.tell(token(request, 2, 102, "length"))
    assert (await client.end()).tokens() == [100, 101, 102]


async def test_after_a_migration_aborts_go_where_the_choice_is(cluster: Cluster) -> None:
    client, request = await decoding(cluster)
    other = cluster.new_worker("decode-1")
    cluster.set_workers([cluster.prefill], [cluster.decode, other], draining=[cluster.decode])
    other.tell(token(request, 2, 102))
    await client.heard(3)
    cluster.set_workers([cluster.prefill], [other])
    await client.leave()
    assert await other.next() == abort(request)
    assert client.tokens() == [100, 101, 102]


# Nobody is there.


@pytest.mark.parametrize("pool", ["prefill", "decode"])
async def test_without_workers_of_a_pool_requests_wait_for_one(cluster: Cluster, pool: str) -> None:
    prefill = [] if pool == "prefill" else [cluster.prefill]
    cluster.set_workers(prefill, [] if pool == "decode" else [cluster.decode])
    client = cluster.ask()
    await asyncio.sleep(0.05)
    assert (client.task.done(), cluster.frontend.num_live) == (False, 1)
    cluster.set_workers([cluster.prefill], [cluster.decode])
    request = await cluster.prefill.next_request()
    cluster.prefill.tell(token(request, 0, 100, "length"))
    assert (await client.end()).tokens() == [100]


async def test_what_waits_for_a_worker_fails_at_its_deadline_with_the_reason(cluster: Cluster) -> None:
    cluster.set_workers([cluster.prefill], [])
    client = cluster.ask(timeout_s=0.2)
    with pytest.raises(UnavailableError, match=r"no decode worker is there, and none came within 0\.2 s"):
        await client.end()
    assert cluster.outcomes() == (0, 1, 0)


async def test_a_stream_waits_for_workers_and_goes_on(cluster: Cluster) -> None:
    client, _ = await decoding(cluster)
    cluster.set_workers([], [])
    others = cluster.new_worker("prefill-1"), cluster.new_worker("decode-1")
    cluster.set_workers([others[0]], [others[1]])
    again = await others[0].next_request()
    assert unpack_ids(again.token_ids) == [*PROMPT, 100, 101]
    others[0].tell(token(again, 2, 102, "length"))
    assert (await client.end()).tokens() == [100, 101, 102]


async def test_what_waits_starts_in_order_of_priority(cluster: Cluster) -> None:
    cluster.set_workers([], [cluster.decode])
    clients = [cluster.ask(request_id=name, priority=priority) for name, priority in (("b", 5), ("a", -1), ("c", 5))]
    await asyncio.sleep(0.05)
    cluster.set_workers([cluster.prefill], [cluster.decode])
    assert [(await cluster.prefill.next_request()).request_id for _ in clients] == ["a", "b", "c"]
    for client in clients:
        await client.leave()


async def test_a_request_that_left_while_it_waited_is_never_started(cluster: Cluster) -> None:
    cluster.set_workers([], [cluster.decode])
    gone = cluster.ask(request_id="gone")
    await asyncio.sleep(0.05)
    await gone.leave()
    cluster.set_workers([cluster.prefill], [cluster.decode])
    client, request = await cluster.admitted(request_id="next")
    assert request.request_id == "next"
    await client.leave()


# A worker that fails a request.


async def test_a_retryable_failure_starts_again_at_another_worker(cluster: Cluster) -> None:
    client, request = await decoding(cluster)
    other = cluster.new_worker("decode-1")
    cluster.set_workers([cluster.prefill], [cluster.decode, other])
    cluster.decode.tell(failed(request, "lane broke", retryable=True))
    again = await cluster.prefill.next_request()
    assert (unpack_ids(again.token_ids), again.decode_worker) == ([*PROMPT, 100, 101], "decode-1")
    other.tell(token(again, 2, 102, "length"))
    assert (await client.end()).tokens() == [100, 101, 102]


async def test_where_no_other_worker_is_a_failed_request_is_tried_there_again(cluster: Cluster) -> None:
    client, request = await cluster.admitted()
    cluster.prefill.tell(failed(request, "lane broke", retryable=True))
    assert (await cluster.prefill.next_request()).decode_worker == "decode-0"
    await client.leave()


async def test_a_newcomer_takes_over_what_everybody_else_failed(cluster: Cluster) -> None:
    client, request = await cluster.admitted()
    cluster.prefill.tell(failed(request, "lane broke", retryable=True))
    assert isinstance(await cluster.prefill.next(), Abort)
    other = cluster.new_worker("prefill-1")
    cluster.set_workers([other], [cluster.decode])
    again = await other.next_request()
    other.tell(token(again, 0, 100, "length"))
    assert (await client.end()).tokens() == [100]


async def test_a_request_that_fails_everywhere_is_given_up(cluster: Cluster) -> None:
    client, request = await cluster.admitted()
    for _ in range(MAX_ATTEMPTS):
        cluster.prefill.tell(failed(request, "poison", retryable=True))
        request = await cluster.prefill.next_request()
    cluster.prefill.tell(failed(request, "poison", retryable=True))
    with pytest.raises(UnavailableError, match=r"computed again 3 times \(frontend.max_attempts\), and then: poison"):
        await client.end()
    assert cluster.outcomes() == (0, 1, 0)


async def test_of_choices_that_share_a_prompt_the_one_that_fails_is_aborted_alone(cluster: Cluster) -> None:
    client, request = await decoding(cluster, n=2)
    cluster.decode.tell(failed(request, "out of luck", choice=0, retryable=True))
    assert await cluster.decode.next() == abort(request, 0)
    assert await cluster.prefill.next() == abort(request, 0)
    again = await cluster.prefill.next_request()
    assert again.choices == (0,)
    cluster.decode.tell(token(request, 2, 102, "length", choice=1))
    cluster.decode.tell(token(again, 2, 102, "length", choice=0))
    await client.end()
    assert client.tokens(0) == client.tokens(1) == [100, 101, 102]
