from __future__ import annotations

import dataclasses
import itertools
import math
import random
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.autoscaling.autoscaler import Decision, PoolState, State, decide, give_up
from cluster.autoscaling.signals import Signals
from cluster.autoscaling.stabilizer import Stabilizer, act
from cluster.members import POOLS
from octet.autoscaler_config import AutoscalerConfig
from tests.unit.cluster.scaling import FLEET, experts, member, of, once, pool, scaling, signals

EVERY_S = 10.0


class Plant:
    """Pools that have as much to do as `load` says, in members, and do what the autoscaler tells them.

    New members serve after `start_s`, and members that leave do so at once.
    """

    def __init__(self, config: AutoscalerConfig, load: Callable[[float], float], start_s: float = 60.0) -> None:
        self.config, self._load, self._start_s = config, load, start_s
        self.now_s, self.state = 0.0, State()
        self.born: dict[str, list[float]] = {name: [-1e6] for name in POOLS}
        self.history: list[Decision] = []

    def sizes(self) -> dict[str, int]:
        return {name: len(born) for name, born in self.born.items()}

    def tick(self) -> Decision:
        self.now_s += EVERY_S
        decision, self.state = decide(self.now_s, self._signals(), self.config, FLEET, self.state)
        for one in decision.actions:
            if one.pool in self.born:
                born = self.born[one.pool]
                born += [self.now_s + self._start_s] * (one.target - len(born))
                del born[one.target :]
        self.history.append(decision)
        return decision

    def _signals(self) -> Signals:
        load = max(0.0, self._load(self.now_s))
        served, starting = {}, {}
        for name, born in self.born.items():
            ages = [self.now_s - at_s for at_s in born if at_s <= self.now_s]
            share = load / max(len(ages), 1)
            done, rest = min(1.0, share), max(0.0, share - 1)
            served[name] = [
                member(
                    n,
                    busy=min(1.0, share * 0.7),
                    tokens_per_s=1000 * min(1.0, share * 0.7),
                    kv=done * 0.8,
                    ongoing=8 * done,
                    waiting=8 * rest,
                    age_s=age_s,
                )
                for n, age_s in enumerate(ages)
            ]
            starting[name] = len(born) - len(ages)
        return signals(
            pool(*served["prefill"], starting=starting["prefill"]),
            pool(*served["decode"], starting=starting["decode"]),
            experts(*served["experts"], starting=starting["experts"]),
            arriving=load * 700,
        )


def reversals(history: list[Decision], name: str) -> list[float]:
    """When the pool's direction changed."""
    moves = [(d.now_s, math.copysign(1, of(d, name).target - of(d, name).current)) for d in history if of(d, name).acts]
    return [at_s for (_, before), (at_s, after) in itertools.pairwise(moves) if before != after]


def patient(**more: object) -> AutoscalerConfig:
    """The delays of the defaults, and room."""
    bounds = {"max_replicas": 64}
    return AutoscalerConfig.model_validate(dict.fromkeys(POOLS, bounds) | more)


def test_pools_at_their_targets_are_left_alone() -> None:
    assert once(signals(), scaling()).actions == ()


@pytest.mark.parametrize("name", POOLS)
def test_the_pool_that_has_too_much_to_do_grows_and_no_other(name: str) -> None:
    busy = {
        "prefill": signals(arriving=3 * 350, shards=experts(member(busy=0.3))),
        "decode": signals(decode=pool(member(kv=1.0, ongoing=10, waiting=20))),
        "experts": signals(shards=experts(member(busy=0.98), member(busy=0.98))),
    }[name]
    decision = once(busy, scaling())
    assert [one.pool for one in decision.actions] == [name]
    assert of(decision, name).target > of(decision, name).current


def test_a_burst_does_not_keep_a_pool_from_shrinking() -> None:
    """The load of one look is twice that of the others, once in two minutes."""
    bounds = {"max_replicas": 64, "downscale_delay_s": 300}
    config = AutoscalerConfig.model_validate(dict.fromkeys(POOLS, bounds))
    sizes = {}
    for often_s in (120.0, 1e9):

        def load(now_s: float, often_s: float = often_s) -> float:
            return (20.0 if now_s < 1000 else 8.0) * (2 if now_s % often_s == 0 else 1)

        plant = Plant(config, load)
        while plant.now_s < 3000:
            plant.tick()
        sizes[often_s] = plant.sizes()
    for name in POOLS:
        assert sizes[120][name] <= 1.3 * sizes[1e9][name]


@pytest.mark.parametrize("grows", [False, True])
def test_a_pool_that_is_too_large_gives_members_back_unless_its_load_grows(grows: bool) -> None:
    bounds = {"max_replicas": 64, "downscale_delay_s": 300}
    config = AutoscalerConfig.model_validate(dict.fromkeys(POOLS, bounds) | {"forecast_horizon_s": 0})
    plant = Plant(config, lambda now_s: 3 + now_s / 120 if grows else 3.0)
    plant.born = {name: [-1e6] * 16 for name in POOLS}
    while plant.now_s < 900:
        plant.tick()
    for name in POOLS:
        assert (plant.sizes()[name] == 16) is grows


def test_every_decision_says_why_with_its_numbers() -> None:
    for one in once(signals(arriving=3 * 350), scaling()).pools:
        assert any(letter.isdigit() for letter in one.reason), one.reason


def test_a_burst_shorter_than_the_delay_moves_nothing() -> None:
    plant = Plant(patient(), lambda now_s: 8.0 if 1000 <= now_s < 1020 else 1.0)
    for _ in range(300):
        plant.tick()
    assert all(decision.actions == () for decision in plant.history)


def test_a_pool_follows_a_step_up_and_after_the_delay_back_down() -> None:
    plant = Plant(patient(), lambda now_s: 6.0 if 1000 <= now_s < 4000 else 1.0)
    sizes = {}
    while plant.now_s < 6000:
        plant.tick()
        sizes[plant.now_s] = plant.sizes()
    for name in POOLS:
        assert sizes[900][name] == 1
        assert 6 <= sizes[2500][name] <= 9
        assert sizes[4300][name] >= 6, "the pool may not shrink before its delay"
        assert sizes[6000][name] == 1


def test_without_a_forecast_a_load_that_is_over_holds_nothing() -> None:
    plant = Plant(scaling(), lambda now_s: 4.0 if now_s < 1000 else 0.1)
    while plant.now_s < 1000 + EVERY_S:
        plant.tick()
    assert {of(plant.history[-1], name).wanted for name in POOLS} == {1}


def test_a_growing_load_is_met_before_it_comes() -> None:
    """Members take 120 s to start while the load grows by one every 100 s."""
    behind = {}
    for horizon_s in (0.0, 180.0):
        plant = Plant(patient(forecast_horizon_s=horizon_s), lambda now_s: 2 + now_s / 100, start_s=120.0)
        plant.born = {name: [-1e6] * 2 for name in POOLS}
        late = 0.0
        while plant.now_s < 2500:
            plant.tick()
            serving = sum(at_s <= plant.now_s for at_s in plant.born["decode"])
            late += max(0.0, 2 + plant.now_s / 100 - serving / 0.8)
        behind[horizon_s] = late
    assert behind[180.0] < 0.9 * behind[0.0]


@settings(max_examples=15, deadline=None)
@given(
    level=st.floats(0.2, 20),
    noise=st.floats(0, 0.3),
    seed=st.integers(0, 2**32),
    delays=st.tuples(st.floats(10, 60), st.floats(120, 900)),
)
def test_a_constant_or_noisy_load_makes_no_pool_flap(
    level: float, noise: float, seed: int, delays: tuple[float, float]
) -> None:
    rng = random.Random(seed)
    bounds = {"max_replicas": 64, "upscale_delay_s": delays[0], "downscale_delay_s": delays[1]}
    config = AutoscalerConfig.model_validate(dict.fromkeys(POOLS, bounds))
    plant = Plant(config, lambda _: level * rng.uniform(1 - noise, 1 + noise))
    for _ in range(700):
        plant.tick()
    for name in POOLS:
        turns = reversals(plant.history, name)
        gaps = [after - before for before, after in itertools.pairwise(turns)]
        assert all(gap >= config.reversal_cooldown_s for gap in gaps)
        if noise == 0:
            # Shards that have grown step by step, and once too far, shrink after the longest delay.
            assert not any(of(decision, name).acts for decision in plant.history[400:])


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_targets_keep_bounds_and_budget_and_one_action_per_pool_at_a_time(data: st.DataObject) -> None:
    bounds = {}
    for name in POOLS:
        least = data.draw(st.integers(1, 3))
        bounds[name] = {
            "min_replicas": least,
            "max_replicas": least + data.draw(st.integers(0, 12)),
            "upscale_delay_s": data.draw(st.sampled_from([0, 20])),
            "downscale_delay_s": data.draw(st.sampled_from([0, 60])),
        }
    least_gpus = sum(one["min_replicas"] for one in bounds.values())
    max_gpus = data.draw(st.integers(least_gpus, least_gpus + 20))
    config = AutoscalerConfig.model_validate(bounds | {"max_gpus": max_gpus, "reversal_cooldown_s": 0})
    rng = random.Random(data.draw(st.integers(0, 2**32)))
    plant = Plant(config, lambda _: rng.uniform(0, 25), start_s=data.draw(st.sampled_from([5.0, 45.0])))
    plant.born = {name: [-1e6] * bounds[name]["min_replicas"] for name in POOLS}
    for _ in range(60):
        moving = {name for name in POOLS if any(at_s > plant.now_s + EVERY_S for at_s in plant.born[name])}
        decision = plant.tick()
        assert sum(plant.sizes().values()) <= max_gpus
        for name in POOLS:
            assert bounds[name]["min_replicas"] <= of(decision, name).target <= bounds[name]["max_replicas"]
            assert not (name in moving and of(decision, name).acts)


def test_nothing_is_concluded_from_members_that_have_just_started() -> None:
    cold = pool(member(busy=1.0, tokens_per_s=1.0, age_s=5.0), member(busy=0.5, tokens_per_s=500))
    warm_only = pool(member(busy=0.5, tokens_per_s=500), member(busy=0.5, tokens_per_s=500))
    config = scaling(cold_start_s=30)
    assert of(once(signals(cold), config), "prefill").target == of(once(signals(warm_only), config), "prefill").target


def test_a_change_that_never_completes_is_given_up_and_said_so() -> None:
    config = scaling(action_timeout_s=100)
    first, state = decide(0.0, signals(arriving=3 * 350), config, FLEET, State())
    assert of(first, "prefill").acts
    second, state = decide(50.0, signals(arriving=3 * 350), config, FLEET, state)
    assert not of(second, "prefill").acts
    assert "not complete" in of(second, "prefill").reason
    third, _ = decide(101.0, signals(arriving=3 * 350), config, FLEET, state)
    assert of(third, "prefill").acts
    assert "given up" in of(third, "prefill").reason


def test_pools_go_to_zero_when_nothing_is_asked_for_and_come_back_at_once() -> None:
    config = scaling(**{name: {"min_replicas": 0, "downscale_delay_s": 60, "upscale_delay_s": 30} for name in POOLS})
    idle = experts(member(0, busy=0), member(1, busy=0), fit=16)
    quiet = signals(pool(member(busy=0, tokens_per_s=0)), pool(member()), idle, arriving=0)
    state, now_s = State(), 0.0
    while now_s <= 60:
        decision, state = decide(now_s, quiet, config, FLEET, state)
        now_s += EVERY_S
    assert [(one.pool, one.target) for one in decision.actions] == [("prefill", 0), ("decode", 0)]
    assert "after the workers" in of(decision, "experts").reason
    decision, state = decide(now_s, signals(pool(), pool(), idle, arriving=0), config, FLEET, state)
    assert [(one.pool, one.target) for one in decision.actions] == [("experts", 0)]
    gone = signals(pool(), pool(), experts(redundant=8, fit=16), arriving=0)
    decision, state = decide(now_s + EVERY_S, gone, config, FLEET, state)
    assert decision.actions == ()
    asked = dataclasses.replace(gone, requests_waiting=1)
    decision, _ = decide(now_s + 2 * EVERY_S, asked, config, FLEET, state)
    # A shard has 16 slots, and there are 32 experts.
    assert [(one.pool, one.target) for one in decision.actions] == [("prefill", 1), ("decode", 1), ("experts", 2)]


def test_shards_stay_as_long_as_a_worker_is_on_its_way_in_or_out() -> None:
    config = scaling(**{name: {"min_replicas": 0} for name in POOLS})
    idle = experts(*(member(number, busy=0) for number in range(5)), fit=16)
    for workers in (pool(starting=1), dataclasses.replace(pool(), num_draining=1)):
        decision = once(signals(pool(), workers, idle, arriving=0), config)
        assert of(decision, "experts").target == 2


@pytest.mark.parametrize("limit", [{}, {"max_gpus": 3}, {"experts": {"min_replicas": 1, "max_replicas": 2}}])
def test_there_are_always_as_many_shards_as_hold_every_expert(limit: dict[str, object]) -> None:
    idle = experts(*(member(number, busy=0.01) for number in range(8)), fit=6)
    decision = once(signals(shards=idle), scaling(**limit))
    assert (of(decision, "experts").wanted, of(decision, "experts").target) == (6, 6)


@pytest.mark.parametrize("load", [0.6, 1.9, 3.8])
def test_what_a_pool_was_asked_for_before_it_was_empty_does_not_count_when_it_wakes(load: float) -> None:
    """It grew by a member every 100 s when all requests ended; six hours later others come."""
    bounds: dict[str, object] = {name: {"min_replicas": 0, "max_replicas": 64} for name in POOLS}
    plant = Plant(scaling(forecast_horizon_s=180, **bounds), lambda now_s: 1 + now_s / 100 if now_s < 900 else load)
    while plant.now_s < 900:
        plant.tick()
    state = plant.state
    nobody = signals(pool(), pool(), experts(), arriving=0)
    for now_s in (900.0, 6 * 3600.0):
        _, state = decide(now_s, nobody, plant.config, FLEET, state)
    plant.now_s, plant.state, plant.born = 6 * 3600.0, state, {name: [-1e6] for name in POOLS}
    assert of(plant.tick(), "decode").wanted <= math.ceil(load)


def test_the_budget_holds_while_members_leave_that_somebody_else_has_sent_away() -> None:
    two = dataclasses.replace(pool(member(0, kv=1.0, ongoing=10, waiting=20), member(1, kv=1.0)), num_draining=3)
    assert once(signals(decode=two), scaling(max_gpus=7)).actions == ()
    assert of(once(signals(decode=two), scaling(max_gpus=8)), "decode").target == 3


@pytest.mark.parametrize("num_starting", range(4))
def test_growth_that_was_decided_keeps_its_part_of_the_budget_while_its_members_are_still_to_come(
    num_starting: int,
) -> None:
    """Three of them, of which so many have been started when another pool asks for some, too."""
    patient, busy = pool(member(kv=0.8, ongoing=8)), pool(member(kv=1.0, ongoing=10, waiting=40))
    prefill = pool(member(busy=0.35, tokens_per_s=350))
    targets = {}
    for max_gpus in (6, 7):
        state = State(prefill=PoolState(stabilizer=act(Stabilizer(), 0.0, 1, 4)))
        starting = dataclasses.replace(prefill, num_starting=num_starting)
        seen = signals(starting, patient, experts(member(busy=0.3)), arriving=3 * 350)
        decision, state = decide(EVERY_S, seen, scaling(max_gpus=max_gpus), FLEET, state)
        assert not decision.actions
        decision, _ = decide(
            2 * EVERY_S, dataclasses.replace(seen, decode=busy), scaling(max_gpus=max_gpus), FLEET, state
        )
        targets[max_gpus] = of(decision, "decode").target
        assert not of(decision, "prefill").acts
    assert targets == {6: 1, 7: 2}


def test_members_that_somebody_else_has_asked_for_count_against_the_budget_before_they_serve() -> None:
    prefill = pool(member(busy=0.35, tokens_per_s=350), starting=2)
    busy = pool(member(kv=1.0, ongoing=10, waiting=40))
    targets = [
        of(once(signals(prefill, busy, experts(member(busy=0.3))), scaling(max_gpus=max_gpus)), "decode").target
        for max_gpus in (5, 6)
    ]
    assert targets == [1, 2]


@pytest.mark.parametrize("num_draining", range(3))
def test_gpus_that_are_to_be_given_back_are_nobody_elses_before_they_are(num_draining: int) -> None:
    """Two prefill workers are to leave, of which so many have begun to."""
    serving = [member(number, busy=0.35, tokens_per_s=350) for number in range(3 - num_draining)]
    prefill = dataclasses.replace(pool(*serving), num_draining=num_draining)
    busy = pool(member(kv=1.0, ongoing=10, waiting=40))
    state = State(prefill=PoolState(stabilizer=act(Stabilizer(), 0.0, 3, 1)))
    decision, state = decide(EVERY_S, signals(prefill, busy), scaling(max_gpus=5), FLEET, state)
    assert not decision.actions
    gone = pool(member(busy=0.35, tokens_per_s=350))
    decision, _ = decide(2 * EVERY_S, signals(gone, busy), scaling(max_gpus=5), FLEET, state)
    assert [(one.pool, one.target) for one in decision.actions] == [("decode", 3)]


def test_a_pool_whose_members_are_still_leaving_does_not_turn_back_before_they_have() -> None:
    busy = pool(member(kv=1.0, ongoing=10, waiting=40))
    state, config = State(decode=PoolState(stabilizer=act(Stabilizer(), 0.0, 3, 1))), scaling()
    for num_draining in (2, 1):
        seen = signals(decode=dataclasses.replace(busy, num_draining=num_draining))
        decision, state = decide(EVERY_S, seen, config, FLEET, state)
        assert not of(decision, "decode").acts
    assert of(decide(2 * EVERY_S, signals(decode=busy), config, FLEET, state)[0], "decode").target > 1


def test_replicas_that_the_shards_that_stay_have_no_room_for_go_before_the_others_leave() -> None:
    """A shard has 16 slots, and there are 32 experts."""
    state = State(experts=PoolState(stabilizer=act(Stabilizer(), 0.0, 4, 3)))
    four = experts(*(member(number, busy=0.6) for number in range(4)), redundant=30, fit=16)
    decision, _ = decide(EVERY_S, signals(shards=four), scaling(), FLEET, state)
    assert [(one.pool, one.target) for one in decision.actions] == [("redundant_experts", 16)]


def test_shrinking_that_was_refused_is_no_reversal_and_keeps_no_pool_from_growing() -> None:
    config = scaling(reversal_cooldown_s=600)
    before = Stabilizer(wanted=((-700.0, 1, 1),), last_direction=1, last_action_s=-700.0, last_reversal_s=-2000.0)
    quiet = signals(decode=pool(*(member(number, kv=0.2, ongoing=2) for number in range(2))))
    decision, state = decide(0.0, quiet, config, FLEET, State(decode=PoolState(stabilizer=before)))
    assert of(decision, "decode").target == 1
    state = give_up(state, "decode")
    assert dataclasses.replace(state.decode.stabilizer, wanted=before.wanted) == before
    busy = signals(decode=pool(*(member(number, kv=1.0, ongoing=10) for number in range(2))))
    assert of(decide(10.0, busy, config, FLEET, state)[0], "decode").target == 3


def test_a_pool_turns_back_within_the_cooldown_once_requests_have_missed_their_target_for_long() -> None:
    config = scaling(reversal_cooldown_s=600, urgent_delay_s=60)
    state = State(decode=PoolState(stabilizer=Stabilizer(last_direction=-1, last_action_s=0.0, last_reversal_s=0.0)))
    slow = signals(decode=pool(member(kv=0.5, ongoing=5), slo=1.3, wait=0.1))
    grows = []
    for look in range(15):
        # It is well again for one look in between.
        seen = signals() if look == 5 else slow
        decision, state = decide(look * EVERY_S, seen, config, FLEET, state)
        grows += [look] if of(decision, "decode").acts else []
    assert grows == [12]


def test_growth_is_shared_by_need_when_the_budget_is_short() -> None:
    busy = signals(arriving=5 * 350, decode=pool(member(kv=1.0, ongoing=10, waiting=30)))
    decision = once(busy, scaling(max_gpus=6))
    assert sum(of(decision, name).target for name in POOLS) == 6
    assert of(decision, "prefill").target > 1
    assert of(decision, "decode").target > 1
    assert "budget" in of(decision, "prefill").reason


def test_the_same_signals_and_state_give_the_same_decision() -> None:
    assert once(signals(arriving=3000), scaling()) == once(signals(arriving=3000), scaling())
