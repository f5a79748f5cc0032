"""Members that are lost: what was there begins again elsewhere, and every request ends once."""

from __future__ import annotations

import dataclasses
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ops.simulate.costs import Costs
from ops.simulate.outcome import Served, summarized
from ops.simulate.simulation import Simulation
from tests.unit.ops.simulate.toy import SHAPE, config, costs, loads, options, poisson, request, run

WORK = costs(
    decode_fixed_s=0.02, prefill_fixed_s=0.02, prefill_per_token_s=0.001, expert_fixed_s=0.001, handoff_fixed_s=0.02,
    worker_start_s=2, shard_start_s=2, slot_fill_s=0.01,
)  # fmt: skip
SLOW = costs(prefill_fixed_s=1.0, decode_fixed_s=0.5, worker_start_s=2.0, shard_start_s=100.0, slot_fill_s=0.1)


def served_though(lost: str, number: int, at_s: float, cost: Costs = SLOW, **sizes: int) -> Served:
    """A request of 64 tokens that gets 5, the first after 1 s and the others 0.5 s apart."""
    simulation = Simulation([request(0.0, prompt=64, new=5)], loads(), SHAPE, cost, config(), options(**sizes))
    lose = {
        "prefill": simulation.lose_prefill,
        "decode": simulation.lose_decode,
        "experts": simulation.lose_shard,
    }[lost]
    simulation.clock.after(at_s, lose, number)
    return simulation.run().served[0]


@settings(max_examples=40, deadline=None)
@given(
    rate=st.floats(0.5, 40),
    sizes=st.tuples(st.integers(1, 4), st.integers(1, 4), st.integers(1, 5)),
    every_s=st.floats(0.2, 5),
    autoscale=st.booleans(),
    seed=st.integers(0, 2**20),
)
def test_every_request_ends_once_whoever_is_lost(
    rate: float, sizes: tuple[int, int, int], every_s: float, autoscale: bool, seed: int
) -> None:
    rng = random.Random(seed)
    requests = [
        dataclasses.replace(one, prompt_tokens=rng.randint(1, 200), new_tokens=rng.randint(1, 60))
        for one in poisson(rate, 60, seed)
    ]
    opts = options(*sizes, decode_pages=30, prefill_pages=20, lose_every_s=every_s, seed=seed, autoscale=autoscale)
    scaler = {name: {"max_replicas": 8, "downscale_delay_s": 10} for name in ("prefill", "decode", "experts")}
    done = run(requests, WORK, config(autoscaler={"metrics_interval_s": 2, **scaler}), opts)
    assert [one.at_s for one in done.served] == [one.at_s for one in requests]
    assert {one.end for one in done.served} <= {"finished", "failed", "shed"}
    assert all(one.ttft_s > 0 for one in done.served if one.end == "finished")
    result = summarized(done, 0)
    assert result.finished + result.failed + result.shed == 60
    assert result.restarts >= result.failed * config().frontend.max_attempts


def test_the_same_seed_loses_the_same_members() -> None:
    requests, seed = poisson(5, 80, seed=random.randrange(1000)), random.randrange(1000)
    opts = options(2, 2, 3, lose_every_s=1.0, seed=seed)
    first, second = (dataclasses.replace(run(requests, WORK, opts=opts), wall_s=0.0) for _ in range(2))
    assert first == second
    assert first.lost > 0


def test_an_answer_goes_on_from_its_tokens_when_its_decode_worker_is_lost() -> None:
    """After three tokens, at 2.2 s: the next worker is there at 4.2 s, and prefill brings the fourth token at 5.2 s."""
    served = served_though("decode", 0, 2.2)
    assert served.end == "finished"
    assert served.ttft_s == pytest.approx(1.0)
    assert served.tpot_s * 4 == pytest.approx(5.7 - 1.0)


def test_with_another_decode_worker_there_it_goes_on_at_once() -> None:
    served = served_though("decode", 0, 2.2, decode=2)
    assert served.tpot_s * 4 == pytest.approx(3.7 - 1.0)


def test_a_prompt_begins_again_when_its_prefill_worker_is_lost() -> None:
    assert served_though("prefill", 0, 0.7, prefill=2).ttft_s == pytest.approx(1.7)


def test_a_prompt_begins_again_when_the_decode_worker_that_waits_for_it_is_lost() -> None:
    assert served_though("decode", 0, 0.7, decode=2).ttft_s == pytest.approx(2.0), "the chunk under way ends first"


def test_a_sequence_that_is_handed_over_begins_again_from_its_first_token_when_its_pages_are_lost() -> None:
    slow = dataclasses.replace(SLOW, handoff_fixed_s=1.0)
    served = served_though("prefill", 0, 1.5, slow, prefill=2)
    assert served.ttft_s == pytest.approx(1.0)
    # The second token after another second of prefill, then another hand-off and three steps.
    assert served.tpot_s * 4 == pytest.approx(1.5 + 1.0 + 1.0 + 3 * 0.5 - 1.0)


def test_steps_wait_until_the_experts_of_a_lost_shard_are_elsewhere() -> None:
    """Four experts on each of two layers, 0.1 s each, on the one shard that is left."""
    assert served_though("experts", 1, 2.2, experts=2).tpot_s * 4 == pytest.approx(2.0 + 0.8)


def test_who_begins_again_too_often_fails() -> None:
    simulation = Simulation([request(0.0, new=500)], loads(), SHAPE, SLOW, config(), options(decode=20))
    for number in range(20):
        simulation.clock.after(3.0 + 2.0 * number, simulation.lose_decode, number)
    done = simulation.run()
    assert done.served[0].end == "failed"
    assert done.restarts == config().frontend.max_attempts, "the last loss is none that it began again for"


def test_idle_shards_stay_as_many_as_hold_every_expert_whoever_is_lost() -> None:
    """A shard has room for two of eight experts; the config would be content with one shard."""
    prompt = {"upscale_delay_s": 0, "downscale_delay_s": 0}
    conf = config(
        autoscaler={"metrics_interval_s": 2, "look_back_period_s": 2, "reversal_cooldown_s": 0, "action_timeout_s": 10}
        | dict.fromkeys(("prefill", "decode", "experts"), prompt)
    )
    least = []
    for seed in range(5):
        opts = options(experts=7, slots_that_fit=2, autoscale=True, lose_every_s=7.0, seed=seed)
        done = run(poisson(0.3, 60, seed), WORK, conf, opts)
        least.append(min(moment.sizes["experts"] for moment in done.moments))
    assert min(least) == 4


def test_all_pools_go_to_zero_in_silence_and_come_back() -> None:
    bounds = {"min_replicas": 0, "max_replicas": 4, "downscale_delay_s": 10, "upscale_delay_s": 5}
    pools = dict.fromkeys(("prefill", "decode", "experts"), bounds)
    conf = config(autoscaler={"metrics_interval_s": 2, "look_back_period_s": 10, "reversal_cooldown_s": 0, **pools})
    requests = [*poisson(2, 20, seed=1), request(200.0)]
    done = run(requests, WORK, conf, options(autoscale=True))
    assert {one.end for one in done.served} == {"finished"}
    assert any(moment.sizes == {"prefill": 0, "decode": 0, "experts": 0} for moment in done.moments)
    # It waits for a look, and for a process.
    assert 2.0 < done.served[-1].ttft_s < 8.0
