"""Clients that come back, ask again, or read slowly."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import AsyncIterator

import pytest

from cluster.frontend.record import Reader
from cluster.planning import make_plan
from octet.config import load_config
from octet.errors import (
    RequestCancelledError,
    RequestError,
    RequestExistsError,
    RequestFailedError,
    RequestUnknownError,
    SlowReaderError,
)
from octet.ids import RequestId
from octet.messages import PrefillRequest, unpack_ids
from tests.unit.cluster.leaving_nothing import nothing_left_of
from tests.unit.cluster.played import PROMPT, TOKENIZER, Client, Cluster, abort, failed, playing, token

GRACE_S, MAX_UNREAD = 0.3, 20


@pytest.fixture
async def cluster() -> AsyncIterator[Cluster]:
    settings = f"frontend={{resume_grace_s: {GRACE_S}, max_unread_tokens: {MAX_UNREAD}}}"
    async with playing(make_plan(load_config(None, [settings]))) as cluster:
        yield cluster


# A client that lost its connection.


async def test_a_resumed_stream_goes_on_at_its_offset(cluster: Cluster) -> None:
    client, request = await cluster.admitted(resumable=True)
    cluster.prefill.tell(token(request, 0, 100))
    await client.heard(1)
    await client.leave()
    cluster.decode.tell(token(request, 1, 101), token(request, 2, 102))
    resumed = cluster.resume(1)
    await resumed.heard(2)
    cluster.decode.tell(token(request, 3, 103, "length"))
    await resumed.end()
    assert (resumed.tokens(), resumed.increments[0].piece.offset) == ([101, 102, 103], 1)
    assert cluster.outcomes() == (1, 0, 0)


async def test_text_goes_on_where_the_tokens_do(cluster: Cluster) -> None:
    assert TOKENIZER is not None
    client, request = await cluster.admitted(resumable=True)
    ids = [token_id for letter in "abcd" for token_id in TOKENIZER.encode(letter)]
    cluster.prefill.tell(*(token(request, index, token_id) for index, token_id in enumerate(ids[:3])))
    await client.heard(2)
    await client.leave()
    cluster.prefill.tell(token(request, 3, ids[3], "length"))
    assert (await cluster.resume(2).end()).text() == "cd"


async def test_the_end_of_a_choice_is_told_again_when_every_token_was_read(cluster: Cluster) -> None:
    client, request = await cluster.admitted(resumable=True, n=2)
    cluster.prefill.tell(token(request, 0, 100, "stop"), token(request, 0, 200, choice=1))
    await client.heard(1)
    await client.leave()
    resumed = cluster.resume(1, 0)
    cluster.decode.tell(token(request, 1, 201, "length", choice=1))
    await resumed.end()
    assert (resumed.tokens(0), resumed.tokens(1)) == ([], [200, 201])
    assert sorted(resumed.finish_reasons()) == ["length", "stop"]
    assert [increment.usage is not None for increment in resumed.increments][-1]


async def test_without_a_client_a_resumable_request_runs_for_the_grace_period(cluster: Cluster) -> None:
    client, request = await cluster.admitted(resumable=True)
    await client.leave()
    assert cluster.frontend.num_live == 1
    assert await cluster.prefill.next() == abort(request)
    assert cluster.outcomes() == (0, 0, 1)
    with pytest.raises(RequestCancelledError, match="nobody reads it"):
        await cluster.resume().end()


async def test_a_client_that_came_back_in_time_ends_the_grace_period(cluster: Cluster) -> None:
    client, request = await cluster.admitted(resumable=True)
    await client.leave()
    resumed = cluster.resume()
    await asyncio.sleep(GRACE_S * 1.5)
    cluster.prefill.tell(token(request, 0, 100, "length"))
    assert (await resumed.end()).tokens() == [100]


async def test_any_other_request_ends_with_its_client(cluster: Cluster) -> None:
    client, _ = await cluster.admitted()
    await client.leave()
    assert (cluster.frontend.num_live, cluster.outcomes()) == (0, (0, 0, 1))


async def test_a_request_runs_as_long_as_one_of_its_clients_stays(cluster: Cluster) -> None:
    client, request = await cluster.admitted()
    other = cluster.resume()
    await asyncio.sleep(0)
    await client.leave()
    cluster.prefill.tell(token(request, 0, 100, "length"))
    assert (await other.end()).tokens() == [100]


async def test_a_kept_answer_is_read_after_the_request_has_ended(cluster: Cluster) -> None:
    client, request = await cluster.admitted()
    cluster.prefill.tell(token(request, 0, 100), token(request, 1, 101, "length"))
    await client.end()
    assert (await cluster.resume(1).end()).tokens() == [101]


async def test_a_failed_request_tells_a_late_client_what_was_committed_and_why(cluster: Cluster) -> None:
    client, request = await cluster.admitted(resumable=True)
    await client.leave()
    cluster.prefill.tell(token(request, 0, 100), failed(request, "broken"))
    await asyncio.sleep(GRACE_S / 2)
    assert cluster.outcomes() == (0, 1, 0)
    resumed = cluster.resume()
    with pytest.raises(RequestFailedError, match="broken"):
        await resumed.end()
    assert resumed.tokens() == [100]


async def test_a_kept_failure_keeps_nothing_of_the_clients_that_heard_it(cluster: Cluster) -> None:
    client, request = await cluster.admitted(resumable=True)
    cluster.prefill.tell(failed(request, "broken"))
    with pytest.raises(RequestFailedError, match="broken"):
        await client.end()
    with nothing_left_of(Reader):
        for late in (cluster.resume(), cluster.resume()):
            with pytest.raises(RequestFailedError, match="broken"):
                await late.end()
        del late


async def test_an_unknown_request_cannot_be_resumed(cluster: Cluster) -> None:
    with pytest.raises(RequestUnknownError, match="'r'"):
        await cluster.resume().end()


@pytest.mark.parametrize("offsets", [(1,), (0, 0)], ids=["a token that is not there", "a choice that is not there"])
async def test_offsets_beyond_the_answer_are_refused(cluster: Cluster, offsets: tuple[int, ...]) -> None:
    client, _ = await cluster.admitted()
    with pytest.raises(RequestError, match="offsets"):
        await cluster.resume(*offsets).end()
    await client.leave()


async def test_a_deadline_is_the_latest_of_the_clients(cluster: Cluster) -> None:
    client, request = await cluster.admitted(timeout_s=0.3)
    other = cluster.resume(timeout_s=20.0)
    await asyncio.sleep(0.5)
    cluster.prefill.tell(token(request, 0, 100, "length"))
    assert (await client.end()).tokens() == (await other.end()).tokens() == [100]


# A client that asks again.


async def test_the_same_request_again_reads_the_one_that_is_live(cluster: Cluster) -> None:
    client, request = await cluster.admitted()
    again = cluster.ask()
    cluster.prefill.tell(token(request, 0, 100), token(request, 1, 101, "length"))
    assert (await client.end()).tokens() == (await again.end()).tokens() == [100, 101]
    assert cluster.outcomes() == (1, 0, 0)


async def test_the_same_request_again_reads_the_one_that_was_kept(cluster: Cluster) -> None:
    client, request = await cluster.admitted()
    cluster.prefill.tell(token(request, 0, 100, "length"))
    await client.end()
    assert (await cluster.ask().end()).tokens() == [100]
    assert cluster.outcomes() == (1, 0, 0)


async def test_another_body_with_a_kept_id_is_refused(cluster: Cluster) -> None:
    client, request = await cluster.admitted()
    cluster.prefill.tell(token(request, 0, 100, "length"))
    await client.end()
    with pytest.raises(RequestExistsError, match="'r'"):
        await cluster.ask(n=2).end()


@pytest.mark.parametrize("ending", ["failed", "aborted", "left"])
async def test_a_request_that_did_not_finish_is_begun_anew(cluster: Cluster, ending: str) -> None:
    client, request = await cluster.admitted()
    if ending == "failed":
        cluster.prefill.tell(failed(request, "broken"))
        with pytest.raises(RequestFailedError):
            await client.end()
    elif ending == "aborted":
        cluster.frontend.abort(request.request_id)
        await client.end()
    else:
        await client.leave()
    again, request = await cluster.admitted()
    cluster.prefill.tell(token(request, 0, 100, "length"))
    assert (await again.end()).tokens() == [100]


# A client that has tokens of a request that this frontend does not know.


async def test_a_request_goes_on_after_the_tokens_that_its_client_has(cluster: Cluster) -> None:
    client, request = await cluster.admitted(received=[[100, 101]])
    assert (unpack_ids(request.token_ids), request.num_prompt_tokens) == ([*PROMPT, 100, 101], 3)
    cluster.prefill.tell(token(request, 2, 102, "length"))
    await client.end()
    assert (client.tokens(), client.increments[0].piece.offset) == ([102], 2)
    last = client.increments[-1].usage
    assert last is not None
    assert last.completion_tokens == 3


async def test_each_choice_goes_on_after_its_own_tokens(cluster: Cluster) -> None:
    client, first = await cluster.admitted(n=3, received=[[100], [], [100]])
    second = await cluster.prefill.next_request()
    assert {(r.choices, tuple(unpack_ids(r.token_ids))) for r in (first, second)} == {
        ((0, 2), (*PROMPT, 100)),
        ((1,), tuple(PROMPT)),
    }
    await client.leave()


async def test_what_its_client_has_is_read_by_others_too(cluster: Cluster) -> None:
    client, request = await cluster.admitted(received=[[100, 101]])
    other = cluster.resume()
    cluster.prefill.tell(token(request, 2, 102, "length"))
    await client.end()
    assert (await other.end()).tokens() == [100, 101, 102]


async def test_a_request_of_which_everything_was_received_ends_at_once(cluster: Cluster) -> None:
    client = cluster.ask(received=[[100] * 50])
    assert (await client.end()).finish_reasons() == ["length"]
    assert (client.tokens(), cluster.outcomes()) == ([], (1, 0, 0))


async def test_what_its_client_has_is_not_counted_as_cached(cluster: Cluster) -> None:
    client, request = await cluster.admitted(received=[[100, 101]])
    cluster.prefill.tell(dataclasses.replace(token(request, 2, 102, "length"), cached_tokens=4))
    await client.end()
    last = client.increments[-1].usage
    assert last is not None
    assert (last.prompt_tokens, last.cached_tokens) == (3, 0)


async def test_more_than_an_answer_cannot_have_been_received(cluster: Cluster) -> None:
    with pytest.raises(RequestError, match=r"received\[0\].*at most 50"):
        await cluster.ask(received=[[100] * 51]).end()
    assert cluster.frontend.num_live == 0


async def test_tokens_of_another_answer_are_refused(cluster: Cluster) -> None:
    client, request = await cluster.admitted()
    cluster.prefill.tell(token(request, 0, 100))
    await client.heard(1)
    with pytest.raises(RequestError, match=r"received\[0\]"):
        await cluster.ask(received=[[7]]).end()
    await client.leave()


# A client that reads slowly.


async def tell_slowly(cluster: Cluster, keeping_up: Client, request: PrefillRequest, num_tokens: int) -> None:
    """Up to so many tokens, each of which a client reads that keeps up."""
    for index in range(len(keeping_up.tokens()), num_tokens):
        cluster.decode.tell(token(request, index, 100))
        await keeping_up.heard(index + 1)


async def test_a_client_that_lets_too_much_wait_is_cut_off(cluster: Cluster) -> None:
    client, request = await cluster.admitted(request_id="slow")
    with cluster.frontend.resume(RequestId("slow"), []) as reader:
        await tell_slowly(cluster, client, request, MAX_UNREAD + 1)
        increments = reader.increments()
        assert len((await anext(increments)).piece.token_ids) == MAX_UNREAD + 1
        with pytest.raises(SlowReaderError, match="21 tokens wait to be read"):
            await anext(increments)
    cluster.decode.tell(token(request, MAX_UNREAD + 1, 100, "length"))
    await client.end()


async def test_a_client_that_comes_back_far_behind_is_not_taken_for_a_slow_one(cluster: Cluster) -> None:
    client, request = await cluster.admitted(n=2)
    await tell_slowly(cluster, client, request, MAX_UNREAD + 5)
    with cluster.frontend.resume(RequestId("r"), []) as reader:
        cluster.decode.tell(token(request, MAX_UNREAD + 5, 100, "length"), token(request, 0, 200, "stop", choice=1))
        await client.heard(MAX_UNREAD + 6)
        told = [len(increment.piece.token_ids) async for increment in reader.increments()]
        assert told == [MAX_UNREAD + 6, 1]
    await client.end()


async def test_a_client_that_comes_back_far_behind_and_takes_nothing_is_cut_off(cluster: Cluster) -> None:
    client, request = await cluster.admitted()
    await tell_slowly(cluster, client, request, MAX_UNREAD + 5)
    with cluster.frontend.resume(RequestId("r"), [2]) as reader:
        await tell_slowly(cluster, client, request, 2 * MAX_UNREAD + 6)
        increments = reader.increments()
        assert len((await anext(increments)).piece.token_ids) == 2 * MAX_UNREAD + 4
        with pytest.raises(SlowReaderError, match=f"{MAX_UNREAD + 1} tokens"):
            await anext(increments)
    await client.leave()


async def test_what_a_client_has_caught_up_with_counts_no_more(cluster: Cluster) -> None:
    client, request = await cluster.admitted()
    await tell_slowly(cluster, client, request, MAX_UNREAD - 5)
    with cluster.frontend.resume(RequestId("r"), []) as reader:
        increments = reader.increments()
        assert len((await anext(increments)).piece.token_ids) == MAX_UNREAD - 5
        await tell_slowly(cluster, client, request, 2 * MAX_UNREAD - 4)
        with pytest.raises(SlowReaderError, match=f"{MAX_UNREAD + 1} tokens"):
            async for _ in increments:
                pass
    await client.leave()


async def test_a_client_that_is_stuck_is_interrupted(cluster: Cluster) -> None:
    client, request = await cluster.admitted(request_id="slow")
    with cluster.frontend.resume(RequestId("slow"), []) as reader:

        async def read() -> None:
            with reader.interruptible():
                async for _ in reader.increments():
                    await asyncio.Event().wait()

        stuck = asyncio.create_task(read())
        await tell_slowly(cluster, client, request, MAX_UNREAD + 8)
        with pytest.raises(SlowReaderError):
            await asyncio.wait_for(stuck, 10)
    await client.leave()


async def test_a_client_that_is_cancelled_is_not_taken_for_a_slow_one(cluster: Cluster) -> None:
    client, _ = await cluster.admitted()
    with cluster.frontend.resume(RequestId("r"), []) as reader:

        async def read() -> None:
            with reader.interruptible():
                await asyncio.Event().wait()

        reading = asyncio.create_task(read())
        await asyncio.sleep(0)
        reading.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reading
    await client.leave()


async def test_a_reader_with_less_time_takes_none_from_the_others(cluster: Cluster) -> None:
    client, request = await cluster.admitted(resumable=True, timeout_s=100.0)
    live = cluster.frontend._live.get(request.request_id)
    assert live is not None
    before_s, timer = live.deadline_s, live.timers["deadline"]
    resumed = cluster.resume(0, timeout_s=1.0)
    cluster.prefill.tell(token(request, 0, 100))
    await resumed.heard(1)
    assert (live.deadline_s, live.timers["deadline"]) == (before_s, timer)
    longer = cluster.resume(0, timeout_s=200.0)
    await longer.heard(1)
    assert live.deadline_s > before_s + 50
    for each in (client, resumed, longer):
        await each.leave()
