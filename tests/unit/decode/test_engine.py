"""The decode engine on the embedded model, behind a real prefill engine; the test carries the messages."""

from __future__ import annotations

import dataclasses
import itertools
import queue
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import pytest
import torch

from cluster.frontend.journal import Journal
from cluster.planning import EMBEDDED_MODEL
from decode.engine import DecodeEngine
from decode.handoff import KvReceiver
from decode.migration import Migration
from experts.shard import ExpertShard
from model.checkpoint import Checkpoint
from model.kv_cache import KvCache
from model.pages import PagePool
from model.runner import ModelRunner
from model.transformer import RoutedLayer, Transformer
from model.weights import AttentionWeights, load_attention_weights
from octet.config import DecodeConfig, PrefillConfig
from octet.errors import ExpertMissingError, LaneError, PeerLostError, WireError
from octet.ids import Epoch, RequestId, WorkerId
from octet.messages import (
    Abort,
    Evicted,
    Failed,
    KvAck,
    KvOffer,
    KvPull,
    KvRenew,
    Message,
    PrefillRequest,
    StepReport,
    TokenEvent,
    pack_ids,
    unpack_ids,
)
from octet.request import Output, Sampling, Stopping
from ops.local import load_slots
from prefill.engine import PrefillEngine
from router.channel import LocalChannel
from router.exchange import LocalExchange
from router.kv_sender import KvSender
from router.leases import LeaseTable
from router.placement import place_evenly
from router.plan import Planner
from router.routed_experts import RoutedExperts

PREFILL, DECODE, FRONTEND = WorkerId("prefill-0"), WorkerId("decode-0"), WorkerId("frontend-0")
PAGE, NUM_PAGES, LEASE_S, PATIENT_S, CONTEXT = 4, 32, 60.0, 20.0, 256
_LONG = 24
"""New tokens of requests that are to run together: the pages of one may come some steps after another's."""
CPU = torch.device("cpu")
T = TypeVar("T")

_random = torch.Generator()
_random.seed()
_numbers = itertools.count()


@dataclasses.dataclass(frozen=True)
class Model:
    checkpoint: Checkpoint
    weights: AttentionWeights
    routed: RoutedExperts

    def runner(self, num_pages: int, routed: RoutedLayer[Any]) -> ModelRunner:
        config = self.checkpoint.config
        cache = KvCache(config, num_pages, PAGE, torch.float32, CPU)
        transformer = Transformer(config, self.weights, cache, CONTEXT)
        return ModelRunner(transformer, routed, PagePool(num_pages, PAGE), cache, CPU)


@pytest.fixture(scope="module")
def model() -> Model:
    checkpoint = Checkpoint.open(EMBEDDED_MODEL)
    config = checkpoint.config
    weights = load_attention_weights(checkpoint, torch.float32, CPU)
    placement = place_evenly(config.moe_layers, config.n_routed_experts, 1)
    shard = ExpertShard(load_slots(checkpoint, placement, 0, torch.float32, CPU))
    gates = {index: layer.gate for index, layer in enumerate(weights.layers) if layer.gate is not None}
    routed = RoutedExperts(config, gates)
    routed.adopt(Planner(placement, CPU), LocalExchange([shard.serve]))
    return Model(checkpoint, weights, routed)


class Faulty:
    """Routed experts that fail once, when and where they are told to."""

    def __init__(self, inner: RoutedExperts) -> None:
        self._inner = inner
        self._fault: tuple[int, LaneError] | None = None

    def fail_once(self, layer: int, error: LaneError) -> None:
        self._fault = layer, error

    def dispatch(self, layer: int, x_TH: torch.Tensor) -> Any:
        return layer, self._inner.dispatch(layer, x_TH)

    def combine(self, pending: Any) -> torch.Tensor:
        layer, dispatched = pending
        if self._fault is not None and self._fault[0] == layer:
            error, self._fault = self._fault[1], None
            raise error
        return self._inner.combine(dispatched)

    def settle(self) -> None:
        self._inner.settle()

    def drain(self) -> None:
        self._inner.drain()


class Pair:
    """A prefill and a decode engine. Messages arrive at once, except pulls while they are held."""

    def __init__(self, model: Model, num_pages: int = NUM_PAGES, max_batch: int = 16, chunk_tokens: int = 512) -> None:
        """On the same cores."""
        self.routed = Faulty(model.routed)
        self._channel, leases = LocalChannel(PATIENT_S), LeaseTable(LEASE_S)
        prefill_runner = model.runner(64, model.routed)
        self.sender = KvSender(prefill_runner.cache, leases, {DECODE: self._channel})
        self.prefill = PrefillEngine(
            PREFILL,
            Epoch(1),
            prefill_runner,
            leases,
            self.sender,
            PrefillConfig(chunk_tokens=chunk_tokens),
            is_beside=lambda worker_id: worker_id == DECODE,
        )
        self._arrived = threading.Event()
        runner = model.runner(num_pages, self.routed)
        self.receiver = KvReceiver(DECODE, runner.cache, {PREFILL: self._channel}, self._ask, self._arrived.set)
        moved = LeaseTable(LEASE_S)
        migration = Migration(DECODE, moved, KvSender(runner.cache, moved, {}))
        config = DecodeConfig(max_batch=max_batch)
        self.decode = DecodeEngine(DECODE, Epoch(1), runner, self.receiver, config, migration=migration)
        self.held: queue.Queue[KvPull] | None = None
        self.journals: dict[str, Journal] = {}
        self.events: list[TokenEvent | Evicted | Failed] = []
        self.acks: list[KvAck] = []
        self.now_s = 0.0

    @property
    def num_free(self) -> tuple[int, int]:
        return self.prefill.load().kv_pages_free, self.decode.load().kv_pages_free

    def submit(self, *requests: PrefillRequest) -> None:
        for request in requests:
            self.journals[request.request_id] = Journal(request)
            self.prefill.handle(request)

    def step_prefill(self) -> None:
        self.deliver(self.prefill.step(self.now_s))

    def step_decode(self) -> None:
        self._arrived.clear()
        self.deliver(self.decode.step(self.now_s))

    def step(self) -> None:
        self.step_prefill()
        self.step_decode()

    def until(self, happened: Callable[[], bool]) -> None:
        until_s = time.monotonic() + PATIENT_S
        while not happened():
            assert time.monotonic() < until_s, "it did not happen"
            self.step()
            if not self.prefill.busy and not self.decode.busy:
                self._arrived.wait(0.02)

    def until_running(self, count: int = 1) -> None:
        self.until(lambda: self.decode.load().running == count)

    def until_free(self) -> None:
        """Pages that were sent come back when the sender's thread has noted the end, maybe after their arrival."""
        self.until(lambda: self.num_free == ALL_FREE)

    def run(self, *requests: PrefillRequest) -> None:
        self.submit(*requests)
        self.until(lambda: all(journal.ended for journal in self.journals.values()))

    def wait_for_arrival(self) -> None:
        assert self._arrived.wait(PATIENT_S)

    def hold_pulls(self) -> None:
        self.held = queue.Queue()

    def release_pull(self) -> None:
        assert self.held is not None
        self.prefill.handle(self.held.get(timeout=PATIENT_S))

    def abort(self, request: PrefillRequest, choice: int | None = None) -> None:
        for engine in (self.prefill, self.decode):
            engine.handle(Abort(request_id=request.request_id, choice=choice))

    def of(self, kind: type[T]) -> list[T]:
        return [event for event in self.events if isinstance(event, kind)]

    def tokens(self) -> dict[tuple[str, int], list[int]]:
        return {
            (name, choice): journal.token_ids(choice)
            for name, journal in self.journals.items()
            for choice in journal.request.choices
        }

    def close(self) -> None:
        self.receiver.close()
        self.sender.close()

    def _ask(self, to: WorkerId, pull: KvPull) -> None:
        if self.held is None:
            self.prefill.handle(pull)
        else:
            self.held.put(pull)

    def deliver(self, outgoing: list[tuple[WorkerId, Message]]) -> None:
        for _, message in outgoing:
            if isinstance(message, KvOffer):
                self.decode.handle(message)
            elif isinstance(message, StepReport):
                for event in message.events:
                    self._hear(event)
            else:
                assert isinstance(message, KvAck | KvRenew)
                self.acks += [message] if isinstance(message, KvAck) else []
                self.prefill.handle(message)

    def _hear(self, event: TokenEvent | Evicted | Failed) -> None:
        self.events.append(event)
        journal = self.journals[event.request_id]
        if isinstance(event, TokenEvent):
            assert journal.commit(event)
            if event.finish_reason is not None:
                journal.end(event.choice)
        elif isinstance(event, Evicted):
            again = journal.restart(event)
            assert again is not None
            self.prefill.handle(again)
        else:
            journal.end(event.choice)


@pytest.fixture
def pairs(model: Model) -> Iterator[Callable[..., Pair]]:
    made: list[Pair] = []

    def make(**arguments: int) -> Pair:
        made.append(Pair(model, **arguments))
        return made[-1]

    yield make
    for pair in made:
        pair.close()


@pytest.fixture
def pair(pairs: Callable[..., Pair]) -> Pair:
    return pairs()


def request(
    num_tokens: int = 6,
    *,
    max_new_tokens: int = 8,
    choices: tuple[int, ...] = (0,),
    sampling: Sampling | None = None,
    output: Output | None = None,
) -> PrefillRequest:
    number = next(_numbers)
    token_ids = torch.randint(0, 1000, (num_tokens,), generator=_random).tolist()
    return PrefillRequest(
        request_id=RequestId(f"r{number}"),
        attempt=0,
        choices=choices,
        token_ids=pack_ids(token_ids),
        num_prompt_tokens=num_tokens,
        sampling=sampling or Sampling(),
        stopping=Stopping(max_new_tokens=max_new_tokens),
        output=output or Output(),
        priority=0,
        arrival_s=float(number),
        decode_worker=DECODE,
        frontend=FRONTEND,
    )


def alone(pairs: Callable[..., Pair], *requests: PrefillRequest) -> dict[tuple[str, int], list[int]]:
    """What each request gets when nobody else is there and nothing goes wrong."""
    tokens: dict[tuple[str, int], list[int]] = {}
    for each in requests:
        undisturbed = pairs(num_pages=64)
        undisturbed.run(each)
        tokens |= undisturbed.tokens()
    return tokens


ALL_FREE = (64, NUM_PAGES)


# Steps.


def test_one_step_gives_every_sequence_one_token(pair: Pair) -> None:
    pair.submit(request(max_new_tokens=_LONG), request(9, max_new_tokens=_LONG))
    pair.until_running(2)
    before = len(pair.of(TokenEvent))
    pair.step_decode()
    assert len(pair.of(TokenEvent)) - before == 2


def test_the_first_of_a_burst_wait_for_the_others(pairs: Callable[..., Pair]) -> None:
    pair = pairs(chunk_tokens=12)
    pair.submit(*(request(6, max_new_tokens=3) for _ in range(5)))
    pair.until(lambda: len(pair.of(TokenEvent)) >= 4)
    assert not pair.decode.busy
    pair.until(lambda: all(journal.ended for journal in pair.journals.values()))
    # What the prefill worker sampled; then all of them at once.
    assert [event.index for event in pair.of(TokenEvent)] == [0] * 5 + [1] * 5 + [2] * 5


def test_the_first_of_a_burst_wait_no_longer_than_they_may(pairs: Callable[..., Pair]) -> None:
    pair = pairs(chunk_tokens=12)
    pair.submit(*(request(6, max_new_tokens=_LONG) for _ in range(3)))
    pair.step_prefill()
    until_s = time.monotonic() + PATIENT_S
    while pair.decode.load().running < 2:
        assert time.monotonic() < until_s
        pair.step_decode()
    pair.step_decode()
    assert [event.index for event in pair.of(TokenEvent)] == [0, 0]
    pair.now_s = 1.0
    pair.step_decode()
    assert [event.index for event in pair.of(TokenEvent)] == [0, 0, 1, 1]


def test_the_first_of_a_burst_do_not_wait_for_one_that_was_aborted(pairs: Callable[..., Pair]) -> None:
    pair = pairs(chunk_tokens=12)
    requests = [request(6, max_new_tokens=_LONG) for _ in range(3)]
    pair.submit(*requests)
    pair.step_prefill()
    until_s = time.monotonic() + PATIENT_S
    while pair.decode.load().running < 2:
        assert time.monotonic() < until_s
        pair.step_decode()
    assert not pair.decode.busy
    pair.abort(requests[2])
    pair.step_decode()
    assert [event.index for event in pair.of(TokenEvent)] == [0, 0, 1, 1]


def test_the_first_of_a_later_burst_wait_as_well(pairs: Callable[..., Pair]) -> None:
    pair = pairs(chunk_tokens=12)
    for _ in range(2):
        pair.events.clear()
        pair.run(*(request(6, max_new_tokens=3) for _ in range(5)))
        pair.step_decode()
        assert [event.index for event in pair.of(TokenEvent)] == [0] * 5 + [1] * 5 + [2] * 5


def test_a_request_gets_as_many_tokens_as_it_asked_for(pair: Pair) -> None:
    asked = request(max_new_tokens=9)
    pair.run(asked)
    assert [event.index for event in pair.of(TokenEvent)] == list(range(9))
    assert pair.of(TokenEvent)[-1].finish_reason == "length"


def test_a_stop_id_ends_a_sequence(pairs: Callable[..., Pair]) -> None:
    asked = request()
    tokens = alone(pairs, asked)[asked.request_id, 0]
    stop = tokens[4]
    pair = pairs()
    pair.run(dataclasses.replace(asked, stopping=Stopping(max_new_tokens=8, stop_token_ids=(stop,))))
    assert pair.tokens()[asked.request_id, 0] == tokens[: tokens.index(stop) + 1]
    assert pair.of(TokenEvent)[-1].finish_reason == "stop"


def test_requests_join_and_leave_between_steps(pairs: Callable[..., Pair]) -> None:
    requests = [request(5, max_new_tokens=12), request(11, max_new_tokens=4), request(2, max_new_tokens=9)]
    pair = pairs()
    for each in requests:
        pair.submit(each)
        for _ in range(3):
            pair.step()
    pair.run()
    assert pair.tokens() == alone(pairs, *requests)


@pytest.mark.parametrize("num_tokens", [6, 8], ids=["partial last page", "full last page"])
def test_choices_go_their_own_ways_from_shared_pages(pairs: Callable[..., Pair], num_tokens: int) -> None:
    asked = request(num_tokens, choices=(0, 1, 2), sampling=Sampling(temperature=1.0, seed=5))
    pair = pairs()
    pair.run(asked)
    expected = alone(pairs, *(dataclasses.replace(asked, choices=(choice,)) for choice in asked.choices))
    assert pair.tokens() == expected


def test_logprobs_are_told_to_those_who_asked(pair: Pair) -> None:
    asked, silent = request(output=Output(logprobs=2)), request()
    pair.run(asked, silent)
    for event in pair.of(TokenEvent):
        if event.request_id == silent.request_id:
            assert event.logprob is None
        else:
            assert event.logprob is not None
            assert (event.logprob.token_id, len(event.logprob.top)) == (event.token_id, 2)


def test_all_pages_are_free_when_all_is_done(pair: Pair) -> None:
    pair.run(request(), request(9, choices=(0, 1, 2)), request(4, max_new_tokens=1))
    pair.until_free()


def test_tokens_are_counted(pair: Pair) -> None:
    pair.run(request(max_new_tokens=5), request(max_new_tokens=4, choices=(0, 1)))
    assert pair.decode.load().tokens == 4 + 2 * 3


# Aborts, in every state.


def test_aborting_a_running_request_frees_its_pages(pair: Pair) -> None:
    asked = request(9, choices=(0, 1))
    pair.submit(asked)
    pair.until_running(2)
    pair.abort(asked)
    pair.until_free()
    assert not pair.decode.busy


def test_aborting_one_running_choice_leaves_the_others(pairs: Callable[..., Pair]) -> None:
    asked = request(6, choices=(0, 1))
    pair = pairs()
    pair.submit(asked)
    pair.until_running(2)
    pair.abort(asked, 0)
    pair.journals[asked.request_id].end(0)
    pair.run()
    assert pair.tokens()[asked.request_id, 1] == alone(pairs, asked)[asked.request_id, 1]


def test_aborting_an_offered_request_frees_its_lease(pairs: Callable[..., Pair]) -> None:
    pair = pairs(max_batch=1)
    running, offered = request(), request()
    pair.submit(running)
    pair.until_running()
    pair.submit(offered)
    pair.step()
    assert pair.decode.load().waiting == 1
    pair.decode.handle(Abort(request_id=offered.request_id))
    pair.step_decode()
    assert pair.decode.load().waiting == 0
    assert len(pair.acks) == 2
    pair.abort(running)
    pair.until_free()


def test_aborting_an_incoming_request_frees_its_pages_when_they_arrive(pair: Pair) -> None:
    pair.hold_pulls()
    asked = request(9)
    pair.submit(asked)
    pair.step()
    assert pair.num_free[1] == NUM_PAGES - 3
    pair.decode.handle(Abort(request_id=asked.request_id))
    pair.step()
    pair.release_pull()
    pair.wait_for_arrival()
    pair.step_decode()
    pair.until_free()
    assert pair.of(Evicted) == []


def test_aborting_an_incoming_request_at_both_workers_frees_its_pages(pair: Pair) -> None:
    pair.hold_pulls()
    asked = request(9)
    pair.submit(asked)
    pair.step()
    pair.abort(asked)
    pair.step()
    pair.release_pull()
    pair.wait_for_arrival()
    pair.step_decode()
    pair.until_free()
    assert pair.of(Evicted) == []


def test_aborting_one_incoming_choice_leaves_the_others(pair: Pair) -> None:
    pair.hold_pulls()
    asked = request(9, choices=(0, 1))
    pair.submit(asked)
    pair.step()
    pair.decode.handle(Abort(request_id=asked.request_id, choice=0))
    pair.journals[asked.request_id].end(0)
    pair.release_pull()
    pair.wait_for_arrival()
    pair.run()
    pair.until_free()
    assert [event.choice for event in pair.of(TokenEvent) if event.index > 0] == [1] * 7


def test_aborting_another_attempt_leaves_what_is_offered_and_what_is_incoming(pairs: Callable[..., Pair]) -> None:
    pair = pairs(max_batch=1)
    pair.hold_pulls()
    incoming, offered = request(), request()
    pair.submit(incoming, offered)
    pair.step()
    assert pair.decode.load().waiting == 2
    for each in (incoming, offered):
        pair.decode.handle(Abort(request_id=each.request_id, attempt=7))
    pair.release_pull()
    pair.held = None
    pair.wait_for_arrival()
    pair.run()
    assert pair.tokens() == alone(pairs, incoming, offered)


def test_aborting_an_unknown_request_does_nothing(pair: Pair) -> None:
    pair.decode.handle(Abort(request_id=RequestId("nobody")))
    pair.step()
    assert (pair.events, pair.acks) == ([], [])


# Leases and preemption.


def test_a_lease_that_was_over_before_the_pull_is_evicted_and_the_request_still_finishes(
    pairs: Callable[..., Pair],
) -> None:
    asked = request(9)
    pair = pairs()
    pair.hold_pulls()
    pair.submit(asked)
    pair.step()
    # It was renewed once, and then nothing was heard.
    for _ in range(2):
        pair.now_s += LEASE_S
        pair.step_prefill()
    assert pair.num_free[0] == 64
    pair.release_pull()
    pair.wait_for_arrival()
    pair.held = None
    pair.run()
    assert [event.reason for event in pair.of(Evicted)] == ["its lease was over before the pages were taken"]
    assert pair.tokens() == alone(pairs, asked)


def test_a_lease_lasts_as_long_as_its_request_waits_for_room(pairs: Callable[..., Pair]) -> None:
    pair = pairs(max_batch=1)
    pair.submit(request(max_new_tokens=40))
    pair.until_running()
    pair.submit(request())
    for _ in range(20):
        pair.step()
        pair.now_s += LEASE_S / 2
    pair.run()
    assert pair.of(Evicted) == []


def test_the_youngest_gives_way_and_everyone_still_finishes(pairs: Callable[..., Pair]) -> None:
    requests = [request(6, max_new_tokens=20), request(6, max_new_tokens=20), request(6, max_new_tokens=20)]
    pair = pairs(num_pages=12)
    pair.run(*requests)
    assert {event.request_id for event in pair.of(Evicted)} >= {requests[-1].request_id}
    assert requests[0].request_id not in {event.request_id for event in pair.of(Evicted)}
    assert pair.tokens() == alone(pairs, *requests)


def test_preemptions_are_counted(pairs: Callable[..., Pair]) -> None:
    pair = pairs(num_pages=12)
    pair.run(*(request(6, max_new_tokens=20) for _ in range(3)))
    assert pair.decode.load().preemptions == len(pair.of(Evicted)) > 0


def test_an_offer_waits_while_the_batch_is_full(pairs: Callable[..., Pair]) -> None:
    pair = pairs(max_batch=2)
    pair.submit(*(request() for _ in range(4)))
    most = 0
    while not all(journal.ended for journal in pair.journals.values()):
        pair.step()
        most = max(most, pair.decode.load().running)
    assert most == 2


def test_of_those_that_wait_the_most_urgent_comes_first(pairs: Callable[..., Pair]) -> None:
    pair = pairs(max_batch=1)
    running, later, urgent = request(), request(), dataclasses.replace(request(), priority=-1)
    pair.submit(running)
    pair.until_running()
    for each in (later, urgent):
        pair.submit(each)
        pair.step_prefill()
    pair.run()
    ends = [event.request_id for event in pair.of(TokenEvent) if event.finish_reason is not None]
    assert ends == [running.request_id, urgent.request_id, later.request_id]


@pytest.mark.parametrize("num_pages", [NUM_PAGES, 64])
@pytest.mark.parametrize("chunk_tokens", [7, 512])
def test_what_is_computed_again_has_the_same_bits(
    pairs: Callable[..., Pair], chunk_tokens: int, num_pages: int
) -> None:
    """The answer's tokens attend one by one again, as they did: else a near tie might end another way."""
    num_prompt, num_new = int(torch.randint(1, 40, (), generator=_random)), 60
    asked = request(num_prompt, max_new_tokens=num_new, output=Output(logprobs=2))
    undisturbed, disturbed = pairs(num_pages=num_pages), pairs(num_pages=num_pages, chunk_tokens=chunk_tokens)
    undisturbed.run(asked)
    disturbed.submit(asked)
    known = int(torch.randint(2, num_new, (), generator=_random))
    disturbed.until(lambda: len(disturbed.of(TokenEvent)) >= known)
    disturbed.abort(asked)
    (again,) = disturbed.journals[asked.request_id].compute_again([0])
    disturbed.prefill.handle(again)
    disturbed.until(lambda: disturbed.journals[asked.request_id].ended)
    told = [[event.logprob for event in pair.of(TokenEvent)] for pair in (undisturbed, disturbed)]
    assert told[0] == told[1]


# Leaving.


def test_who_leaves_hands_every_sequence_over_and_keeps_its_pages_until_they_were_taken(pair: Pair) -> None:
    first, second = request(9, max_new_tokens=_LONG), request(5, max_new_tokens=_LONG)
    pair.submit(first, second)
    pair.until_running(2)
    pair.step_decode()
    tokens, heir = pair.tokens(), WorkerId("decode-1")
    pair.decode.hand_over_to([heir])
    said = pair.decode.step(pair.now_s)
    offers = {
        message.request.request_id: message for to, message in said if to == heir and isinstance(message, KvOffer)
    }
    for each in (first, second):
        (last,) = offers[each.request_id].next_tokens
        assert [*unpack_ids(offers[each.request_id].request.token_ids), last] == [
            *unpack_ids(each.token_ids),
            *tokens[each.request_id, 0],
        ]
    load = pair.decode.load()
    assert (load.running, load.leases) == (0, 2)
    assert load.kv_pages_free == NUM_PAGES - sum(-(-offer.request.num_tokens // PAGE) for offer in offers.values())
    pair.decode.handle(KvAck(lease_id=offers[first.request_id].lease_id))
    pair.decode.handle(Abort(request_id=second.request_id))
    assert pair.decode.step(pair.now_s) == []
    assert (pair.decode.load().leases, pair.decode.load().kv_pages_free) == (0, NUM_PAGES)


def test_a_sequence_that_was_handed_over_is_kept_for_an_heir_that_asks_for_time(pair: Pair) -> None:
    pair.submit(request(9, max_new_tokens=_LONG))
    pair.until_running()
    pair.decode.hand_over_to([WorkerId("decode-1")])
    (offer,) = [message for _, message in pair.decode.step(0.0) if isinstance(message, KvOffer)]
    for now_s in (0.9 * LEASE_S, 1.8 * LEASE_S):
        pair.decode.handle(KvRenew(lease_id=offer.lease_id))
        pair.decode.step(now_s)
        assert pair.decode.load().leases == 1
    pair.decode.step(2.8 * LEASE_S)
    assert (pair.decode.load().leases, pair.decode.load().kv_pages_free) == (0, NUM_PAGES)


def test_where_nobody_takes_over_sequences_are_computed_again(pair: Pair) -> None:
    asked = request(9, max_new_tokens=_LONG, choices=(0, 1))
    pair.submit(asked)
    pair.until_running(2)
    pair.decode.hand_over_to([])
    pair.step_decode()
    assert [(event.choice, event.reason) for event in pair.of(Evicted)] == [
        (choice, "its decode worker leaves") for choice in (0, 1)
    ]
    assert pair.num_free[1] == NUM_PAGES


# Faults.


@pytest.mark.parametrize("layer", [1, 2, 3])
def test_a_step_that_loses_its_lane_may_be_run_again(pairs: Callable[..., Pair], layer: int) -> None:
    requests = [request(6, max_new_tokens=_LONG), request(3, max_new_tokens=_LONG)]
    pair = pairs()
    pair.submit(*requests)
    pair.until_running(2)
    while pair.decode.busy:
        pair.routed.fail_once(layer, PeerLostError("shard 0 is gone"))
        before = pair.tokens(), pair.decode.load().tokens
        with pytest.raises(PeerLostError):
            pair.step_decode()
        assert (pair.tokens(), pair.decode.load().tokens) == before
        pair.step_decode()
    assert pair.tokens() == alone(pairs, *requests)


def test_a_missing_expert_fails_the_requests_of_its_step_retryably_and_says_why(pair: Pair) -> None:
    pair.submit(request(choices=(0, 1), max_new_tokens=_LONG), request(max_new_tokens=_LONG))
    pair.until_running(3)
    pair.routed.fail_once(2, ExpertMissingError("layer 2: no expert in slots [7]"))
    pair.step_decode()
    told = [(event.reason, event.retryable) for event in pair.of(Failed)]
    assert told == [("layer 2: no expert in slots [7]", True)] * 3


def test_a_missing_expert_fails_no_request_that_was_not_in_the_step(pairs: Callable[..., Pair]) -> None:
    pair = pairs(max_batch=1)
    running, offered = request(), request()
    pair.submit(running)
    pair.until_running()
    pair.submit(offered)
    pair.step_prefill()
    pair.routed.fail_once(1, ExpertMissingError("gone"))
    pair.run()
    assert [event.request_id for event in pair.of(Failed)] == [running.request_id]
    assert pair.tokens()[offered.request_id, 0] == alone(pairs, offered)[offered.request_id, 0]


def test_a_missing_expert_yields_no_token(pair: Pair) -> None:
    pair.submit(request())
    pair.until_running()
    before = len(pair.of(TokenEvent))
    pair.routed.fail_once(1, ExpertMissingError("gone"))
    pair.until_free()
    assert len(pair.of(TokenEvent)) == before


def test_a_sequence_whose_numbers_overflow_fails_alone(model: Model) -> None:
    """As where an embedding is damaged: what is written after that token has no logits."""
    embedding = model.weights.embedding
    assert isinstance(embedding, torch.Tensor)
    undisturbed = Pair(model)
    requests = [request(max_new_tokens=_LONG, output=Output(logprobs=2)) for _ in range(3)]
    undisturbed.run(*requests)
    expected = {name: tokens for (name, _), tokens in undisturbed.tokens().items()}
    undisturbed.close()
    others = {token for each in requests[1:] for token in (*unpack_ids(each.token_ids), *expected[each.request_id])}
    unlucky, name = requests[0], requests[0].request_id
    fatal = next((token for token in expected[name] if token not in {*others, *unpack_ids(unlucky.token_ids)}), None)
    if fatal is None:
        pytest.skip("none of its tokens is its own")
    damaged = embedding.clone()
    damaged[fatal] = torch.nan
    pair = Pair(dataclasses.replace(model, weights=dataclasses.replace(model.weights, embedding=damaged)))
    pair.run(*requests)
    (failed,) = pair.of(Failed)
    assert (failed.request_id, failed.retryable) == (name, False)
    assert "no finite numbers" in failed.reason
    told = pair.tokens()
    assert told[name, 0] == expected[name][: expected[name].index(fatal) + 1]
    assert [told[each.request_id, 0] for each in requests[1:]] == [expected[each.request_id] for each in requests[1:]]
    pair.until_free()
    pair.close()


def test_failing_all_ends_running_offered_and_incoming_requests(pairs: Callable[..., Pair]) -> None:
    pair = pairs(max_batch=2)
    running, incoming, offered = request(), request(), request()
    pair.submit(running)
    pair.until_running()
    pair.hold_pulls()
    pair.submit(incoming, offered)
    pair.step()
    assert pair.decode.load().waiting == 2
    pair.decode.fail_all("the lane is gone")
    pair.deliver(pair.decode.flush())
    assert sorted((event.request_id, event.reason) for event in pair.of(Failed)) == sorted(
        (each.request_id, "the lane is gone") for each in (running, incoming, offered)
    )
    pair.release_pull()
    pair.wait_for_arrival()


def test_pages_of_a_failed_incoming_request_come_back_when_they_arrive(pair: Pair) -> None:
    pair.hold_pulls()
    pair.submit(request(9))
    pair.step()
    pair.decode.fail_all("the lane is gone")
    pair.release_pull()
    pair.wait_for_arrival()
    pair.step_decode()
    pair.until_free()


def test_a_failure_is_told_once(pair: Pair) -> None:
    pair.hold_pulls()
    pair.submit(request(9))
    pair.step()
    for _ in range(2):
        pair.decode.fail_all("the lane is gone")
    pair.deliver(pair.decode.flush())
    assert len(pair.of(Failed)) == 1
    pair.release_pull()
    pair.wait_for_arrival()


def test_a_message_for_someone_else_is_an_error(pair: Pair) -> None:
    with pytest.raises(WireError, match="PrefillRequest"):
        pair.decode.handle(request())


#         self.decode = DecodeEngine(DECODE, Epoch(1), runner, self.receiver, config, migration=migration)
