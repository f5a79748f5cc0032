"""What a request is let in with, and what is left in hand of it when it has ended, however it does."""

from __future__ import annotations

import random
from typing import Literal

import pytest

from cluster.frontend.intake import Intake
from cluster.frontend.live_requests import LiveRequest
from cluster.frontend.record import Outcome
from cluster.frontend.validation import GenerateSpec, Limits, parse_request
from cluster.planning import make_plan
from octet.config import FrontendConfig, load_config
from octet.errors import QueueFullError
from octet.v1 import octet_pb2 as pb
from tests.unit.cluster.played import PROMPT, token

PLAN = make_plan(load_config(None, []))
LIMITS = Limits.of(PLAN)
TTFT_S, TPOT_S, HANDOFF_S = 1.0, 0.5, 1.0
SCALER = PLAN.config.autoscaler.model_copy(update={"target_ttft_s": TTFT_S, "target_tpot_s": TPOT_S})


def spec_of(n: int = 1, max_new_tokens: int = 20, received: list[list[int]] | None = None) -> GenerateSpec:
    message = pb.GenerateRequest(
        token_ids=pb.TokenIds(ids=PROMPT),
        sampling=pb.Sampling(n=n),
        stopping=pb.Stopping(max_new_tokens=max_new_tokens, ignore_eos=True),
        received=[pb.TokenIds(ids=token_ids) for token_ids in received or []],
    )
    return parse_request(message, LIMITS, None)


@pytest.fixture
def intake() -> Intake:
    intake = Intake(FrontendConfig(max_requests=10, reserve=0.2, default_timeout_s=77.0), SCALER)
    intake.closed = ""
    return intake


def accepted(intake: Intake, spec: GenerateSpec, now_s: float = 0.0) -> LiveRequest:
    live = LiveRequest(spec, spec.request, intake.demand(spec, None), None, LIMITS.most_choices)
    intake.accept(live, now_s)
    return live


def count(intake: Intake, live: LiveRequest, index: int, now_s: float, choice: int = 0) -> None:
    assert live.commit(token(live.journal.request, index, 100, choice=choice))
    intake.count(live, choice, now_s)


def in_hand(intake: Intake) -> tuple[int, int, float]:
    backlog = intake._meter.backlog(0)
    return backlog.requests, backlog.prompt_tokens, backlog.new_tokens


def test_a_request_asks_for_the_tokens_of_every_choice_that_its_client_does_not_have() -> None:
    intake = Intake(FrontendConfig(default_timeout_s=77.0), SCALER)
    demand = intake.demand(spec_of(3, 20, [[1, 2], [], [3]]), None)
    assert (demand.prompt_tokens, demand.new_tokens, demand.longest_answer, demand.choices) == (3, 57, 20, 3)


@pytest.mark.parametrize(("asked_s", "timeout_s"), [(None, 77.0), (5.0, 5.0), (0.0, 0.0)])
def test_a_deadline_is_the_clients_if_it_has_one(intake: Intake, asked_s: float | None, timeout_s: float) -> None:
    assert intake.timeout_s(asked_s) == timeout_s


def test_an_unread_request_is_let_in_by_its_priority(intake: Intake) -> None:
    for _ in range(8):
        accepted(intake, spec_of())
    intake.check(intake.unread(-1, None), 0)
    with pytest.raises(QueueFullError):
        intake.check(intake.unread(0, None), 0)
    assert intake.totals.refused == 1


def test_the_pace_of_an_answer_is_that_of_each_choice(intake: Intake) -> None:
    live, gap_s = accepted(intake, spec_of(2)), random.uniform(0.1, 2.0)
    for index in range(5):
        for choice in range(2):
            count(intake, live, index, (index + choice / 2) * gap_s, choice)
    assert intake._meter.rates.tpot_s == pytest.approx(gap_s)


@pytest.mark.parametrize("num_tokens", [0, 1, 5])
@pytest.mark.parametrize("received", [[], [7, 8]])
@pytest.mark.parametrize("kind", ["finished", "failed", "cancelled"])
def test_of_a_request_that_has_ended_nothing_is_in_hand(
    intake: Intake, kind: Literal["finished", "failed", "cancelled"], received: list[int], num_tokens: int
) -> None:
    other = accepted(intake, spec_of(max_new_tokens=9))
    before = in_hand(intake)
    live = accepted(intake, spec_of(received=[received]))
    for index in range(num_tokens):
        count(intake, live, len(received) + index, 1.0 + index)
    intake.end(live, Outcome(kind=kind), 9.0)
    requests, prompt_tokens, new_tokens = in_hand(intake)
    assert (requests, prompt_tokens) == before[:2]
    assert new_tokens == pytest.approx(before[2] * intake._meter.backlog(0).answer_share)
    intake.end(other, Outcome(kind="cancelled"), 9.0)
    assert in_hand(intake) == (0, 0, 0)
    totals = {"finished": 0, "failed": 0, "cancelled": 1}
    totals[kind] += 1
    assert {name: getattr(intake.totals, name) for name in totals} == totals


def test_answers_that_were_broken_off_tell_nothing_of_how_long_answers_get(intake: Intake) -> None:
    for kind in ("failed", "cancelled"):
        live = accepted(intake, spec_of())
        count(intake, live, 0, 1.0)
        intake.end(live, Outcome(kind=kind), 2.0)
        assert intake._meter.backlog(0).answer_share == 1.0
    live = accepted(intake, spec_of())
    count(intake, live, 0, 3.0)
    intake.end(live, Outcome(kind="finished"), 4.0)
    assert intake._meter.backlog(0).answer_share < 1.0


def test_an_answer_is_as_slow_as_its_longest_choice(intake: Intake) -> None:
    live = accepted(intake, spec_of(2))
    count(intake, live, 0, 1.0, choice=1)
    for index in range(4):
        count(intake, live, index, 1.0 + index)
    intake.end(live, Outcome(kind="finished"), 4.0)
    load = intake.request_load(4.0, 0.0, 0)
    assert load.answer_ratio == pytest.approx(3.0 / (3 * TPOT_S + HANDOFF_S))
