"""From counters to signals, and from decisions to the log."""

from __future__ import annotations

import dataclasses
import random

import numpy as np
import pytest

from cluster.autoscaling.autoscaler import State, decide
from cluster.autoscaling.decision_log import DecisionLog
from cluster.autoscaling.prospects import prospects
from cluster.control.observe import observe
from cluster.frontend.request_meter import RequestMeter
from cluster.frontend.scheduler import Assignment
from cluster.frontend.slo import Slo
from cluster.frontend.workload import Workload
from cluster.members import POOLS
from octet.config import TelemetryConfig
from octet.counters import FrameCounters, StepCounters
from octet.errors import UnavailableError
from octet.ids import WorkerId
from octet.messages import WorkerLoad
from router.balancing.skew import skewed_loads
from router.telemetry import Telemetry
from router.telemetry_samples import Sample, ShardSample, WorkerSample
from router.telemetry_window import TelemetryWindow
from tests.unit.cluster.scaling import FLEET, of, scaling, signals

SLO = Slo(ttft_s=2.0, ttft_per_1k_tokens_s=1.0, tpot_s=0.1)


def meter() -> RequestMeter:
    return RequestMeter(SLO, 30.0)


def test_arrivals_are_counted_without_what_is_cached_and_forgotten_after_the_period() -> None:
    one = meter()
    one.arrived(0.0, 1000, 400)
    one.arrived(20.0, 900, 0)
    assert one.load(25.0, 0, 0).arriving_prompt_tokens_per_s == pytest.approx(1500 / 30)
    assert one.load(31.0, 0, 0).arriving_prompt_tokens_per_s == pytest.approx(900 / 30)
    assert one.load(100.0, 0, 0).arriving_prompt_tokens_per_s == 0


def test_answers_are_measured_by_what_their_targets_allow() -> None:
    one = meter()
    assert one.load(0.0, 0, 0).first_ratio is None
    one.first_token(1.0, ttft_s=5.0, prompt_tokens=8000)
    one.finished(2.0, after_s=4.0, new_tokens=31)
    one.finished(2.0, after_s=0.0, new_tokens=1)
    load = one.load(3.0, 7, 2)
    assert load.first_ratio == pytest.approx(5.0 / 10.0)
    assert load.answer_ratio == pytest.approx(4.0 / (0.1 * 30 + 1.0))
    assert (load.queued_prompt_tokens, load.waiting) == (7, 2)


def samples(seconds: float, busy: float, begun: int = 0) -> list[Sample]:
    """Two shards that have computed for `busy` of their time, three quarters of it for decode; and two workers."""
    worked_s = busy * seconds
    shards: list[Sample] = [
        ShardSample(
            worker_id=WorkerId(f"experts-{number}"),
            incarnation=1,
            uptime_s=seconds,
            tokens_LE=np.full((2, 4), int(10 * seconds)),
            activated=1,
            frames=FrameCounters(frames=10, rows=80, busy_s=worked_s, wait_s=0.0),
            lanes={
                "decode-0": FrameCounters(frames=5, rows=40, busy_s=0.75 * worked_s, wait_s=0.0),
                "prefill-0": FrameCounters(frames=5, rows=40, busy_s=0.25 * worked_s, wait_s=0.0),
            },
            waiting=0,
        )
        for number in range(2)
    ]
    load = WorkerLoad(kv_pages_total=100, kv_pages_free=40, running=6, waiting=2, tokens=0)
    steps = StepCounters(steps=10, step_s=0.5 * seconds, combine_s=0.3 * seconds, tokens=int(50 * seconds))
    loads = {"prefill": dataclasses.replace(load, begun_tokens=begun), "decode": load}
    workers: list[Sample] = [
        WorkerSample(
            worker_id=WorkerId(f"{role}-0"), incarnation=1, uptime_s=seconds, role=role, steps=steps, load=loads[role]
        )
        for role in ("prefill", "decode")
    ]
    return shards + workers


def heard(*told: list[Sample]) -> TelemetryWindow:
    """The window after so many seconds, a round of samples in each."""
    telemetry = Telemetry((3, 4), 4, 2, TelemetryConfig(), 0.0)
    for at_s, of_round in enumerate(told, 1):
        telemetry.record(float(at_s), of_round)
    return telemetry.window(float(len(told)))


def ages(prefill: int = 1, decode: int = 1, experts: int = 2) -> dict[WorkerId, float]:
    sizes = {"prefill": prefill, "decode": decode, "experts": experts}
    return {WorkerId(f"{name}-{number}"): 99.0 for name, size in sizes.items() for number in range(size)}


def test_telemetry_becomes_signals() -> None:
    telemetry = Telemetry((3, 4), 4, 2, TelemetryConfig(), 0.0)
    telemetry.record(1.0, samples(1.0, 0.4))
    telemetry.record(11.0, samples(11.0, 0.4))
    ages_s = {WorkerId(name): 99.0 for name in ("prefill-0", "decode-0", "experts-0", "experts-1")}
    seen = observe(telemetry.window(11.0), meter().load(11.0, 5, 1), ages_s, {"decode": 1}, {}, 0, 9)
    assert [member.worker_id for member in seen.experts.members] == ["experts-0", "experts-1"]
    assert seen.experts.members[0].busy_share == pytest.approx(0.4)
    assert seen.experts.decode_share == pytest.approx(0.75)
    assert seen.experts.balancedness == pytest.approx(1.0)
    assert (seen.decode.num_starting, seen.prefill.num_starting) == (1, 0)
    decode = seen.decode.members[0]
    assert decode.kv_occupancy == pytest.approx(0.6)
    assert (decode.ongoing, decode.waiting) == (6, 2)
    assert decode.tokens_per_s == pytest.approx(50, rel=0.1)
    assert seen.prefill.expert_wait_share == pytest.approx(0.6)


def test_members_that_are_about_to_leave_are_no_signal() -> None:
    telemetry = Telemetry((3, 4), 4, 2, TelemetryConfig(), 0.0)
    telemetry.record(1.0, samples(1.0, 0.4))
    ages_s = {WorkerId("experts-0"): 99.0, WorkerId("prefill-0"): 9.0}
    seen = observe(
        telemetry.window(1.0),
        meter().load(1.0, 0, 0),
        ages_s,
        {},
        {"experts": 1, "decode": 1},
        0,
        9,
    )
    assert len(seen.experts.members) == 1
    assert seen.decode.members == ()
    assert seen.decode.num_draining == 1


def test_a_prompt_that_is_being_computed_is_not_queued_and_asks_for_no_other_worker() -> None:
    workload = Workload(16, 10_000)
    workload.set_workers([WorkerId("prefill-0")], [WorkerId("decode-0")], [])
    to = Assignment(prefill=WorkerId("prefill-0"), decode=WorkerId("decode-0"), reason="")
    for number, num_cached in enumerate((0, 400)):
        workload.assign((0,), number, 100_000, num_cached, to)
    targets = {}
    for begun in (0, 100_000, 200_000):
        requests = meter().load(2.0, workload.unanswered_prompt_tokens, 2)
        seen = observe(heard(*(samples(at_s, 0.4, begun) for at_s in (1.0, 2.0))), requests, ages(), {}, {}, 0, 9)
        targets[seen.queued_prompt_tokens] = of(decide(0.0, seen, scaling(), FLEET, State())[0], "prefill").wanted
    assert targets == {199_600: 8, 99_600: 8, 0: 1}


def test_members_that_nobody_has_heard_of_are_counted_and_nothing_is_concluded_from_them() -> None:
    window = heard(samples(1.0, 0.4), samples(2.0, 0.4))
    seen = observe(window, meter().load(2.0, 0, 0), ages(prefill=3, decode=2, experts=4), {}, {}, 0, 9)
    assert [len(pool.members) for pool in (seen.prefill, seen.decode, seen.experts)] == [3, 2, 4]
    assert [member.age_s for member in seen.experts.members] == [99.0, 99.0, 0.0, 0.0]
    assert [member.worker_id for member in seen.experts.members if not member.busy_share] == ["experts-2", "experts-3"]
    assert of(decide(0.0, seen, scaling(), FLEET, State())[0], "decode").current == 2


@pytest.mark.parametrize("name", POOLS)
def test_without_a_word_of_a_pool_that_serves_there_are_no_signals(name: str) -> None:
    told = [[one for one in samples(at_s, 0.4) if not one.worker_id.startswith(name)] for at_s in (1.0, 2.0)]
    with pytest.raises(UnavailableError, match=f"none of the {name} pool was heard of"):
        observe(heard(*told), meter().load(2.0, 0, 0), ages(), {}, {}, 0, 9)
    nobody = observe(heard(*told), meter().load(2.0, 0, 0), ages(**{name: 0}), {}, {}, 0, 9)
    assert getattr(nobody, name).members == ()


def test_the_balancer_promises_more_for_more_replicas_and_no_more_than_fit() -> None:
    loads_LE = skewed_loads(3, 32, 4, np.random.default_rng(), (1.0, 1.0))
    promised = prospects(loads_LE, num_shards=8, slots=4, slots_that_fit=5, max_redundant=32)
    assert [one.num_redundant_experts for one in promised] == [0, 8]
    assert promised[0].balancedness < promised[1].balancedness <= 1
    assert [one.num_redundant_experts for one in prospects(loads_LE, 8, 6, 9, 0)] == [0, 8, 16]


def test_the_log_keeps_actions_and_the_latest_look_at_each_pool() -> None:
    log, state = DecisionLog(most_kept=3), State()
    decision, state = decide(0.0, signals(arriving=3 * 350), scaling(), FLEET, state)
    log.add(decision)
    for number in range(1, 5):
        decision, _ = decide(float(number), signals(), scaling(), FLEET, State())
        log.add(decision)
    # Shards follow the prompts that arrive, too.
    assert {action.pool for action in log.actions} == {"prefill", "experts"}
    action = next(action for action in log.actions if action.pool == "prefill")
    assert (action.current, action.outcome) == (1, "")
    assert {one.pool for one in log.latest} == {"prefill", "decode", "experts", "redundant_experts"}
    assert all(one.at_s == 4.0 for one in log.latest)
    log.end("prefill", action.target, "done")
    assert [one.outcome for one in log.actions if one.pool == "prefill"] == ["done"]


def test_the_log_is_bounded() -> None:
    log = DecisionLog(most_kept=5)
    for number in range(random.randint(6, 30)):
        log.add(decide(float(number), signals(arriving=3 * 350), scaling(), FLEET, State())[0])
    assert len(log.actions) == 5


def test_an_action_whose_controller_was_lost_does_not_go_on_for_ever() -> None:
    before, after = DecisionLog(), DecisionLog()
    decision, _ = decide(0.0, signals(arriving=3 * 350), scaling(), FLEET, State())
    before.add(decision)
    before.end("prefill", of(decision, "prefill").target, "done")
    after.take_over(before.actions, before.latest)
    outcomes = {action.pool: action.outcome for action in after.actions}
    assert outcomes["prefill"] == "done"
    assert "controller was lost" in outcomes["experts"]
