"""The frontend against workers that are real mailboxes, played by the tests."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
from collections.abc import AsyncIterator, Iterator

import pytest

from cluster.frontend.audit import Audit
from cluster.frontend.frontend import Frontend
from cluster.frontend.validation import parse_request
from cluster.planning import make_plan
from octet import faults
from octet.config import load_config
from octet.errors import (
    DeadlineExceededError,
    QueueFullError,
    RequestExistsError,
    RequestFailedError,
    UnavailableError,
)
from octet.faults import Fault
from octet.ids import LeaseId, RequestId
from octet.mailbox import AsyncMailbox
from octet.messages import Abort, KvAck, Message, TokenLogprob, unpack_ids
from octet.v1 import octet_pb2 as pb
from tests.unit.cluster.played import (
    DECODE,
    FRONTEND,
    HOST,
    MAX_REQUESTS,
    PATIENT_S,
    PLAN,
    PROMPT,
    TOKENIZER,
    Client,
    Cluster,
    abort,
    evicted,
    failed,
    playing,
    soon,
    token,
)


@pytest.fixture
async def cluster() -> AsyncIterator[Cluster]:
    async with playing() as cluster:
        yield cluster


# Streaming.


async def test_a_request_goes_to_the_prefill_worker_with_its_decode_worker(cluster: Cluster) -> None:
    _, request = await cluster.admitted()
    assert (unpack_ids(request.token_ids), request.frontend, request.decode_worker) == (PROMPT, FRONTEND, DECODE)


async def test_tokens_are_streamed_in_order(cluster: Cluster) -> None:
    client, request = await cluster.admitted()
    cluster.prefill.tell(token(request, 0, 100))
    await client.heard(1)
    cluster.decode.tell(token(request, 1, 101), token(request, 2, 102))
    cluster.decode.tell(token(request, 3, 103, "length"))
    assert (await client.end()).tokens() == [100, 101, 102, 103]


async def test_offsets_continue_from_piece_to_piece(cluster: Cluster) -> None:
    client, request = await cluster.admitted()
    for index in range(5):
        cluster.decode.tell(token(request, index, 100 + index, "length" if index == 4 else None))
    await client.end()
    expected = 0
    for increment in client.increments:
        assert increment.piece.offset == expected
        expected += len(increment.piece.token_ids)


async def test_a_decode_workers_token_may_overtake_the_first(cluster: Cluster) -> None:
    client, request = await cluster.admitted()
    cluster.decode.tell(token(request, 2, 102, "length"), token(request, 1, 101))
    await asyncio.sleep(0.1)
    cluster.prefill.tell(token(request, 0, 100))
    assert (await client.end()).tokens() == [100, 101, 102]


async def test_duplicates_gaps_and_stale_attempts_are_dropped(cluster: Cluster) -> None:
    client, request = await cluster.admitted()
    cluster.decode.tell(
        token(request, 0, 100),
        token(request, 0, 1),
        token(request, 999, 2),
        token(request, 1, 3, attempt=request.attempt - 1),
        token(request, 1, 4, attempt=request.attempt + 1),
        token(request, 1, 101),
        token(request, 1, 5, "stop"),
        token(request, 2, 102, "length"),
    )
    assert (await client.end()).tokens() == [100, 101, 102]


async def test_events_of_a_choice_that_the_request_does_not_have_are_dropped(cluster: Cluster) -> None:
    client, request = await cluster.admitted()
    cluster.decode.tell(token(request, 0, 1, choice=5), evicted(request, choice=6), token(request, 0, 100, "length"))
    assert (await client.end()).tokens() == [100]


async def test_choices_end_on_their_own(cluster: Cluster) -> None:
    client, request = await cluster.admitted(n=2)
    cluster.prefill.tell(token(request, 0, 100, "stop"), token(request, 0, 200, choice=1))
    await client.heard(1)
    cluster.decode.tell(token(request, 1, 201, "length", choice=1))
    await client.end()
    assert (client.tokens(0), client.tokens(1)) == ([100], [200, 201])


async def test_usage_comes_with_the_last_increment_alone(cluster: Cluster) -> None:
    client, request = await cluster.admitted(n=2)
    cluster.prefill.tell(dataclasses.replace(token(request, 0, 100), cached_tokens=2))
    await client.heard(1)
    cluster.decode.tell(token(request, 0, 200, "stop", choice=1))
    cluster.decode.tell(token(request, 1, 101, "length"))
    await client.end()
    usages = [increment.usage for increment in client.increments]
    assert usages[:-1] == [None] * (len(usages) - 1)
    last = usages[-1]
    assert last is not None
    assert (last.prompt_tokens, last.completion_tokens, last.cached_tokens) == (3, 3, 2)


def cached_tokens(client: Client) -> int:
    usage = client.increments[-1].usage
    assert usage is not None
    return usage.cached_tokens


async def test_what_a_restarted_choice_finds_in_the_cache_is_not_counted(cluster: Cluster) -> None:
    """It is what was committed, and what the first computation has put there."""
    client, request = await cluster.admitted()
    cluster.decode.tell(token(request, 0, 100), token(request, 1, 101), evicted(request))
    again = await cluster.prefill.next_request()
    cluster.prefill.tell(dataclasses.replace(token(again, 2, 102, "length"), cached_tokens=5))
    await client.end()
    assert cached_tokens(client) == 0


async def test_the_first_token_of_all_says_what_was_cached(cluster: Cluster) -> None:
    """Also where another choice has none yet, and starts again with its prompt alone."""
    client, request = await cluster.admitted(n=2)
    cluster.prefill.tell(token(request, 0, 100, "stop"), evicted(request, 1))
    again = await cluster.prefill.next_request()
    cluster.prefill.tell(dataclasses.replace(token(again, 0, 200, "stop", choice=1), cached_tokens=2))
    await client.end()
    assert cached_tokens(client) == 0


async def test_prompt_logprobs_come_with_the_first_increment_alone(cluster: Cluster) -> None:
    client, request = await cluster.admitted()
    reported = (TokenLogprob(token_id=7, logprob=None), TokenLogprob(token_id=8, logprob=-1.0))
    cluster.prefill.tell(dataclasses.replace(token(request, 0, 100), prompt_logprobs=reported))
    await client.heard(1)
    cluster.decode.tell(token(request, 1, 101, "length"))
    await client.end()
    assert [increment.prompt_logprobs for increment in client.increments] == [reported, ()]


async def test_a_message_that_is_none_stops_no_stream(cluster: Cluster) -> None:
    client, request = await cluster.admitted()
    cluster.decode.mailbox.send(FRONTEND, KvAck(lease_id=LeaseId("x")))
    cluster.decode.tell(token(request, 0, 100, "length"))
    assert (await client.end()).tokens() == [100]


# Eviction and failure.


async def test_an_evicted_request_is_computed_again_from_what_was_committed(cluster: Cluster) -> None:
    client, request = await cluster.admitted()
    cluster.decode.tell(token(request, 0, 100), token(request, 1, 101), evicted(request))
    again = await cluster.prefill.next_request()
    assert (unpack_ids(again.token_ids), again.num_prompt_tokens) == ([*PROMPT, 100, 101], 3)
    cluster.prefill.tell(token(request, 2, 1), token(again, 2, 102, "length"))
    assert (await client.end()).tokens() == [100, 101, 102]


async def test_only_the_evicted_choice_is_computed_again(cluster: Cluster) -> None:
    client, request = await cluster.admitted(n=2)
    cluster.prefill.tell(token(request, 0, 100), token(request, 0, 200, choice=1), evicted(request, choice=1))
    again = await cluster.prefill.next_request()
    assert (again.choices, unpack_ids(again.token_ids)) == ((1,), [*PROMPT, 200])
    await client.leave()


async def test_an_evicted_request_is_not_shed_by_a_full_frontend(cluster: Cluster) -> None:
    clients = [cluster.ask(request_id=str(number)) for number in range(MAX_REQUESTS)]
    request = await cluster.prefill.next_request()
    cluster.decode.tell(evicted(request))
    requests = [await cluster.prefill.next_request() for _ in range(MAX_REQUESTS)]
    assert requests[-1].request_id == request.request_id
    for client in clients:
        await client.leave()


async def test_choices_that_are_computed_again_share_a_request_as_far_as_a_decode_worker_has_pages_for_them() -> None:
    settings = "kv={page_size: 4, prefill_pages: 8, decode_pages: 8}"
    async with playing(make_plan(load_config(None, [settings]))) as cluster:
        client = cluster.send(
            pb.GenerateRequest(
                token_ids=pb.TokenIds(ids=range(18)),
                sampling=pb.Sampling(n=4),
                stopping=pb.Stopping(max_new_tokens=14, ignore_eos=True),
            )
        )
        request = await cluster.prefill.next_request()
        alike = [token(request, index, 100 + index, choice=choice) for choice in range(4) for index in range(7)]
        cluster.decode.tell(*alike)
        await client.heard(7)
        cluster.set_workers([cluster.prefill], [cluster.new_worker("decode-1")])
        again = [await cluster.prefill.next_request() for _ in range(2)]
        # Together they would take seven pages for what they share, and three for its last one.
        assert [(each.choices, each.num_tokens) for each in again] == [((0, 1), 25), ((2, 3), 25)]
        await client.leave()


async def test_a_failed_request_is_unavailable_with_the_reason(cluster: Cluster) -> None:
    client, request = await cluster.admitted()
    cluster.decode.tell(failed(request, "layer 3: no expert in slots [1]"))
    with pytest.raises(UnavailableError, match="no expert in slots"):
        await client.end()


async def test_a_failure_of_a_stale_attempt_is_dropped(cluster: Cluster) -> None:
    client, request = await cluster.admitted()
    cluster.decode.tell(evicted(request), failed(request, "late"))
    again = await cluster.prefill.next_request()
    cluster.prefill.tell(token(again, 0, 100, "length"))
    assert (await client.end()).tokens() == [100]


async def test_when_one_choice_fails_the_work_of_the_others_is_freed(cluster: Cluster) -> None:
    client, request = await cluster.admitted(n=2)
    cluster.decode.tell(failed(request, "broken"))
    with pytest.raises(UnavailableError):
        await client.end()
    assert await cluster.decode.next() == abort(request)


async def test_a_request_that_waits_for_its_next_try_is_not_tried_with_anothers(cluster: Cluster) -> None:
    clients = [cluster.ask(request_id="first")]
    for _ in range(3):
        # It waits for twice as long each time.
        cluster.decode.tell(failed(await cluster.prefill.next_request(), "broken", retryable=True))
    client, request = await cluster.admitted(request_id="second")
    cluster.decode.tell(failed(request, "broken", retryable=True))
    again = [(await cluster.prefill.next_request()).request_id for _ in range(2)]
    assert again == ["second", "first"]
    for each in (*clients, client):
        await each.leave()


# Faults of the frontend's own.


@pytest.fixture
def chaos() -> Iterator[None]:
    faults.allow(True)
    yield
    faults.disarm()
    faults.allow(False)


@pytest.mark.usefixtures("chaos")
async def test_what_goes_wrong_at_an_event_ends_its_request_alone(
    cluster: Cluster, caplog: pytest.LogCaptureFixture
) -> None:
    (unlucky, first), (client, second) = [await cluster.admitted(request_id=name) for name in ("unlucky", "other")]
    faults.arm(Fault(point="commit", action="raise"))
    cluster.decode.tell(token(first, 0, 100), token(second, 0, 200))
    with pytest.raises(RequestFailedError, match="internal error of the frontend: InjectedError: a fault was armed"):
        await unlucky.end()
    cluster.decode.tell(token(second, 1, 201, "length"))
    assert (await client.end()).tokens() == [200, 201]
    assert cluster.outcomes() == (1, 1, 0)
    assert await cluster.decode.next() == abort(first)
    assert not cluster.frontend.deaf
    (logged,) = [record for record in caplog.records if record.levelno >= logging.ERROR]
    assert "request unlucky" in logged.getMessage()
    assert logged.exc_info


@pytest.mark.usefixtures("chaos")
async def test_a_request_that_cannot_even_be_given_up_holds_up_no_other(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def end(self: Audit, request_id: RequestId, outcome: str) -> None:
        raise RuntimeError("worse")

    (unlucky, first), (client, second) = [await cluster.admitted(request_id=name) for name in ("unlucky", "other")]
    faults.arm(Fault(point="commit", action="raise"))
    with monkeypatch.context() as patched:
        patched.setattr(Audit, "end", end)
        cluster.decode.tell(token(first, 0, 100), token(second, 0, 200))
        await client.heard(1)
    cluster.decode.tell(token(second, 1, 201, "length"))
    assert (await client.end()).tokens() == [200, 201]
    assert ["worse" in (record.exc_text or "") for record in caplog.records] == [False, True]
    await unlucky.leave()


class BrokenMailbox(AsyncMailbox):
    """Receives nothing, and says so."""

    async def receive(self) -> Message:
        raise OSError("no such socket")


async def test_a_frontend_that_reads_no_reports_any_more_knows_it(caplog: pytest.LogCaptureFixture) -> None:
    frontend = Frontend(FRONTEND, PLAN, TOKENIZER, BrokenMailbox(HOST, PLAN.secret))
    assert not frontend.deaf
    frontend.serve({}, {})
    await asyncio.sleep(0.01)
    assert frontend.deaf
    assert "not read any more" in caplog.text
    assert "no such socket" in caplog.text
    frontend.close()


async def test_a_frontend_that_is_closed_is_not_taken_for_a_deaf_one(caplog: pytest.LogCaptureFixture) -> None:
    async with playing() as cluster:
        pass
    await asyncio.sleep(0.01)
    assert not cluster.frontend.deaf
    assert "not read any more" not in caplog.text


# Endings.


async def test_leaving_early_aborts_at_both_workers(cluster: Cluster) -> None:
    client, request = await cluster.admitted()
    cluster.prefill.tell(token(request, 0, 100))
    await client.heard(1)
    await client.leave()
    assert await cluster.prefill.next() == await cluster.decode.next() == abort(request)


async def test_a_finished_request_is_aborted_nowhere(cluster: Cluster) -> None:
    client, request = await cluster.admitted()
    cluster.decode.tell(token(request, 0, 100, "stop"))
    await client.end()
    following, request = await cluster.admitted(request_id="following")
    await following.leave()
    assert await cluster.decode.next() == abort(request)


async def test_an_abort_ends_the_stream_with_its_reason(cluster: Cluster) -> None:
    client, request = await cluster.admitted(n=2)
    cluster.prefill.tell(token(request, 0, 100), token(request, 0, 200, "stop", choice=1))
    await client.heard(1)
    cluster.frontend.abort(request.request_id)
    await client.end()
    assert sorted(client.finish_reasons()) == ["aborted", "stop"]
    assert await cluster.decode.next() == abort(request)


async def test_an_abort_of_an_unknown_request_does_nothing(cluster: Cluster) -> None:
    cluster.frontend.abort(RequestId("nobody"))
    assert cluster.outcomes() == (0, 0, 0)


async def test_a_stop_string_ends_the_choice_at_its_decode_worker(cluster: Cluster) -> None:
    assert TOKENIZER is not None
    client, request = await cluster.admitted(stop=("b",))
    ids = [token_id for letter in "ab" for token_id in TOKENIZER.encode(letter)]
    cluster.decode.tell(*(token(request, index, token_id) for index, token_id in enumerate(ids)))
    await client.end()
    assert (client.text(), client.finish_reasons()) == ("a", ["stop"])
    assert await cluster.decode.next() == abort(request, 0)


async def test_an_abort_that_overtook_the_hand_off_is_said_again(cluster: Cluster) -> None:
    client, request = await cluster.admitted()
    await client.leave()
    assert await cluster.decode.next() == abort(request)
    cluster.decode.tell(token(request, 1, 100))
    assert await cluster.decode.next() == abort(request, 0)


async def test_an_abort_of_a_choice_that_overtook_the_hand_off_is_said_again(cluster: Cluster) -> None:
    assert TOKENIZER is not None
    client, request = await cluster.admitted(n=2, stop=("b",))
    cluster.prefill.tell(token(request, 0, TOKENIZER.encode("b")[0]))
    assert await cluster.decode.next() == abort(request, 0)
    cluster.decode.tell(token(request, 1, 100))
    assert await cluster.decode.next() == abort(request, 0)
    await client.leave()


async def test_what_is_late_of_an_earlier_request_of_the_same_id_is_dropped(cluster: Cluster) -> None:
    gone, before = await cluster.admitted()
    await gone.leave()
    assert await cluster.prefill.next() == abort(before)
    client, request = await cluster.admitted()
    cluster.decode.tell(token(before, 0, 1), evicted(before), failed(before, "late"), token(request, 0, 100, "length"))
    assert (await client.end()).tokens() == [100]


async def test_a_request_ends_at_its_deadline(cluster: Cluster) -> None:
    client, request = await cluster.admitted(timeout_s=0.3)
    cluster.prefill.tell(token(request, 0, 100))
    with pytest.raises(DeadlineExceededError, match=r"within 0\.3 s"):
        await client.end()
    assert (client.tokens(), cluster.outcomes()) == ([100], (0, 0, 1))
    assert await cluster.prefill.next() == await cluster.decode.next() == abort(request)


# Admission.


async def test_before_it_serves_it_is_unavailable() -> None:
    frontend = Frontend(FRONTEND, PLAN, TOKENIZER, AsyncMailbox(HOST, PLAN.secret))
    spec = parse_request(pb.GenerateRequest(token_ids=pb.TokenIds(ids=PROMPT)), frontend.limits, None)
    client = Client(frontend.generate(spec))
    with pytest.raises(UnavailableError, match="starting"):
        await client.end()
    frontend.close()


async def test_one_request_too_many_is_shed(cluster: Cluster) -> None:
    clients = [cluster.ask(request_id=str(number)) for number in range(MAX_REQUESTS)]
    for _ in clients:
        await cluster.prefill.next_request()
    with pytest.raises(QueueFullError, match="limit"):
        await cluster.ask(request_id="more").end()
    for client in clients:
        await client.leave()


async def test_a_live_id_with_another_body_is_refused(cluster: Cluster) -> None:
    client, _ = await cluster.admitted()
    with pytest.raises(RequestExistsError, match="'r' belongs to a request with another body"):
        await cluster.ask(n=2).end()
    await client.leave()


async def test_work_is_spread_over_the_workers(cluster: Cluster) -> None:
    prefills = [cluster.prefill, cluster.new_worker("prefill-1")]
    cluster.set_workers(prefills, [cluster.decode, cluster.new_worker("decode-1")])
    clients = [cluster.ask(request_id=str(number)) for number in range(2)]
    requests = [await worker.next_request() for worker in prefills]
    assert {request.decode_worker for request in requests} == {"decode-0", "decode-1"}
    for client in clients:
        await client.leave()


# Draining and the end of the cluster.


async def test_a_drain_waits_for_what_is_live(cluster: Cluster) -> None:
    client, request = await cluster.admitted()
    cluster.frontend.stop_admitting("draining")
    drain = asyncio.create_task(cluster.frontend.drain(PATIENT_S))
    cluster.decode.tell(token(request, 0, 100, "length"))
    await soon(drain)
    assert (await client.end()).finish_reasons() == ["length"]


async def test_a_drain_aborts_what_is_left_at_its_deadline(cluster: Cluster) -> None:
    client, _ = await cluster.admitted()
    await soon(cluster.frontend.drain(0.05))
    assert (await client.end()).finish_reasons() == ["aborted"]


async def test_a_draining_frontend_admits_nothing(cluster: Cluster) -> None:
    cluster.frontend.stop_admitting("the cluster is draining")
    with pytest.raises(UnavailableError, match="draining"):
        await cluster.ask().end()


async def test_when_the_cluster_fails_every_live_request_does(cluster: Cluster) -> None:
    clients = [(await cluster.admitted(request_id=name, n=2))[0] for name in ("a", "b")]
    cluster.frontend.fail("experts-1 is gone")
    for client in clients:
        with pytest.raises(UnavailableError, match="experts-1 is gone"):
            await client.end()
    with pytest.raises(UnavailableError, match="experts-1 is gone"):
        await cluster.ask().end()


# Accounts.


async def test_every_accepted_request_is_counted_once(cluster: Cluster) -> None:
    client, request = await cluster.admitted()
    cluster.decode.tell(token(request, 0, 100, "stop"))
    await client.end()
    assert cluster.outcomes() == (1, 0, 0)

    client, request = await cluster.admitted(request_id="failing")
    with pytest.raises(RequestExistsError):
        await cluster.ask(request_id="failing", n=2).end()
    cluster.decode.tell(failed(request, "broken"))
    with pytest.raises(UnavailableError):
        await client.end()
    assert cluster.outcomes() == (1, 1, 0)

    client, _ = await cluster.admitted(request_id="left")
    await client.leave()
    assert cluster.outcomes() == (1, 1, 1)

    client, _ = await cluster.admitted(request_id="aborted")
    cluster.frontend.abort(RequestId("aborted"))
    await client.end()
    assert cluster.outcomes() == (1, 1, 2)

    cluster.frontend.stop_admitting("draining")
    with pytest.raises(UnavailableError):
        await cluster.ask(request_id="late").end()
    assert cluster.outcomes() == (1, 1, 2)


async def test_only_committed_tokens_are_counted(cluster: Cluster) -> None:
    client, request = await cluster.admitted()
    cluster.decode.tell(token(request, 0, 100), token(request, 0, 100), token(request, 1, 101, "length"))
    await client.end()
    assert cluster.frontend.totals.tokens == 2


async def test_nothing_is_live_after_every_ending(cluster: Cluster) -> None:
    client, _ = await cluster.admitted()
    assert cluster.frontend.num_live == 1
    await client.leave()
    assert cluster.frontend.num_live == 0


async def test_a_request_that_has_ended_is_no_work_of_its_workers_any_more(cluster: Cluster) -> None:
    """Or whoever it was sent to would be taken for busy for ever."""
    cluster.set_workers([cluster.prefill, cluster.new_worker("prefill-1")], [cluster.decode])
    for number in range(3):
        client, request = await cluster.admitted(request_id=f"r{number}", n=2)
        assert cluster.frontend.request_load().queued_prompt_tokens == request.num_tokens
        await client.leave()
        assert cluster.frontend.request_load().queued_prompt_tokens == 0


async def test_nothing_is_kept_for_a_worker_that_has_left(cluster: Cluster) -> None:
    cluster.set_workers([cluster.prefill], [cluster.new_worker("decode-1")])
    with pytest.raises(UnavailableError, match="no such peer: decode-0"):
        cluster.frontend._mailbox.send(DECODE, Abort(request_id=RequestId("r")))


async def test_a_request_that_has_ended_leaves_no_timer(cluster: Cluster) -> None:
    """Each would hold its request in memory up to its deadline."""
    client, request = await cluster.admitted(resumable=True)
    live = cluster.frontend._live.get(request.request_id)
    assert live is not None
    assert list(live.timers) == ["deadline"]
    cluster.prefill.tell(token(request, 0, 100, "length"))
    await client.end()
    assert live.timers == {}


async def test_a_prompt_counts_as_queued_while_nobody_may_take_it_and_no_longer(cluster: Cluster) -> None:
    """It is what wakes an empty pool; and one that has ended must keep none awake."""
    served, request = await cluster.admitted(request_id="s")
    cluster.prefill.tell(token(request, 0, 100))
    await served.heard(1)
    load = cluster.frontend.request_load()
    assert (load.queued_prompt_tokens, load.waiting) == (0, 0), "it has its first token"
    cluster.set_workers([], [cluster.decode])
    waiting = cluster.ask(request_id="w")
    await asyncio.sleep(0.05)
    assert cluster.frontend.num_live == 2
    load = cluster.frontend.request_load()
    # The first one is to be computed again, with the token that it has.
    assert (load.queued_prompt_tokens, load.waiting) == (2 * len(PROMPT) + 1, 1)
    await waiting.leave()
    await served.leave()
    load = cluster.frontend.request_load()
    assert (load.queued_prompt_tokens, load.waiting) == (0, 0)
