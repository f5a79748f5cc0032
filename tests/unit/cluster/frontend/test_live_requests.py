"""Tokens that come before their turn, and what a request counts as its own."""

from __future__ import annotations

import random

import pytest

from cluster.frontend.admission import Demand
from cluster.frontend.live_requests import LiveRequest
from cluster.frontend.validation import Limits, parse_request
from cluster.planning import make_plan
from octet.config import load_config
from octet.ids import WorkerId
from octet.messages import TokenEvent
from octet.request import FinishReason
from octet.v1 import octet_pb2 as pb
from tests.unit.cluster.played import token

PLAN = make_plan(load_config(None, []))
LIMITS = Limits.of(PLAN)
PREFILL, DECODE = WorkerId("prefill-0"), WorkerId("decode-0")


def live_request(max_new_tokens: int, received: tuple[int, ...] = ()) -> LiveRequest:
    message = pb.GenerateRequest(
        token_ids=pb.TokenIds(ids=[7, 8, 9]),
        stopping=pb.Stopping(max_new_tokens=max_new_tokens, ignore_eos=True),
        received=[pb.TokenIds(ids=received)],
    )
    spec = parse_request(message, LIMITS, None)
    demand = Demand(prompt_tokens=3, new_tokens=1, longest_answer=1, priority=0, timeout_s=1.0)
    return LiveRequest(spec, spec.request, demand, None, LIMITS.most_choices)


def take(live: LiveRequest, index: int, worker_id: WorkerId = DECODE) -> list[tuple[int, WorkerId]]:
    """(index, worker) of the tokens whose turn it is when this one has come; they are committed."""
    last: FinishReason | None = "length" if index + 1 == live.journal.request.stopping.max_new_tokens else None
    taken = []
    for event, its_worker in live.in_order(token(live.journal.request, index, 100 + index, last), worker_id):
        live.commit(event)
        taken.append((event.index, its_worker))
    return taken


def test_tokens_that_come_in_any_order_are_taken_in_theirs_with_their_workers() -> None:
    length = random.randint(2, 12)
    live = live_request(length)
    order = random.sample(range(1, length), length - 1)
    assert [take(live, index) for index in order] == [[]] * len(order)
    assert take(live, 0, PREFILL) == [(0, PREFILL), *((index, DECODE) for index in range(1, length))]
    assert live.journal.ended


@pytest.mark.parametrize("beyond", [0, 1, 10**6])
def test_of_tokens_that_come_too_early_those_of_the_answer_are_kept_and_no_others(beyond: int) -> None:
    """A worker that counts on and on would fill the frontend's memory."""
    length = random.randint(2, 12)
    live, kept = live_request(length), length - 1
    assert (take(live, length + beyond), take(live, kept)) == ([], [])
    assert list(live._early[0]) == [kept]
    taken = [index for first in range(kept) for index, _ in take(live, first)]
    assert taken == list(range(length))


def test_what_its_client_had_is_not_generated() -> None:
    live = live_request(10, received=(100, 101))
    assert live.num_generated == 0
    take(live, 2)
    assert (live.num_generated, live.record.usage.completion_tokens) == (1, 3)


def test_a_token_that_came_twice_is_taken_once() -> None:
    live = live_request(10)
    early: list[TokenEvent] = []
    for index in (1, 1, 0, 0, 1):
        event = token(live.journal.request, index, 100 + index)
        early += [each for each, _ in live.in_order(event, DECODE) if live.commit(each)]
    assert [event.index for event in early] == [0, 1]
