from __future__ import annotations

import dataclasses
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ops.simulate.expert_loads import ExpertLoads
from ops.simulate.outcome import Run, summarized
from ops.simulate.simulation import Simulation
from tests.unit.ops.simulate.toy import SHAPE, config, costs, loads, options, poisson, request, run

WORK = costs(
    decode_fixed_s=0.01, decode_per_sequence_s=0.001, prefill_fixed_s=0.01, prefill_per_token_s=0.001,
    expert_fixed_s=0.001, expert_per_row_s=1e-5, exchange_fixed_s=0.0005, handoff_fixed_s=0.02, worker_start_s=20,
    shard_start_s=20, slot_fill_s=0.01,
)  # fmt: skip


def without_wall(one: Run) -> Run:
    return dataclasses.replace(one, wall_s=0.0)


@settings(max_examples=25, deadline=None)
@given(
    rate=st.floats(0.5, 40),
    sizes=st.tuples(st.integers(1, 4), st.integers(1, 4), st.integers(1, 5)),
    pages=st.integers(8, 40),
    seed=st.integers(0, 2**20),
)
def test_every_request_ends_once(rate: float, sizes: tuple[int, int, int], pages: int, seed: int) -> None:
    rng = random.Random(seed)
    requests = [
        dataclasses.replace(one, prompt_tokens=rng.randint(1, 200), new_tokens=rng.randint(1, 60))
        for one in poisson(rate, 60, seed)
    ]
    done = run(requests, WORK, opts=options(*sizes, decode_pages=pages, prefill_pages=20))
    assert [one.at_s for one in done.served] == [one.at_s for one in requests]
    for one in done.served:
        too_long = -(-(one.prompt_tokens + one.new_tokens) // 16) > min(pages, 20)
        assert one.end == ("refused" if too_long else "finished")
        assert one.end == "refused" or one.ttft_s > 0


def test_the_same_seed_gives_the_same_run() -> None:
    requests = poisson(5, 80, seed=random.randrange(1000))
    assert without_wall(run(requests, WORK)) == without_wall(run(requests, WORK))


def test_a_request_alone_takes_what_its_parts_cost() -> None:
    cost = costs(
        prefill_fixed_s=0.5, prefill_per_token_s=0.01, exchange_fixed_s=0.1, handoff_fixed_s=0.7, decode_fixed_s=0.2
    )
    conf = config(prefill={"chunk_tokens": 32})
    done = run([request(1.0, prompt=64, new=5)], cost, conf).served[0]
    assert done.ttft_s == pytest.approx(2 * (0.5 + 0.32 + 2 * 0.1))
    assert done.tpot_s * 4 == pytest.approx(0.7 + 4 * (0.2 + 2 * 0.1))


def test_sequences_of_one_worker_advance_together() -> None:
    cost = costs(decode_fixed_s=0.1, decode_per_sequence_s=0.05)
    done = run([request(0.0, new=11), request(0.0, new=11)], cost)
    assert [one.tpot_s for one in done.served] == pytest.approx([0.2, 0.2])


@pytest.mark.parametrize("load", [0.3, 0.6, 0.8])
def test_waits_agree_with_the_queue_of_deterministic_service(load: float) -> None:
    """M/D/1, arrival by arrival: who comes waits for what is left of those before (Lindley's recursion)."""
    service_s = 0.1
    requests = poisson(load / service_s, 5_000, seed=random.randrange(10_000), new=1)
    done = run(requests, costs(prefill_fixed_s=service_s), config(prefill={"chunk_tokens": 64}))
    free_at_s, ttfts_s = 0.0, []
    for one in requests:
        free_at_s = max(free_at_s, one.at_s) + service_s
        ttfts_s.append(free_at_s - one.at_s)
    assert [one.ttft_s for one in done.served] == pytest.approx(ttfts_s)


def test_a_known_prefix_is_not_computed_again() -> None:
    blocks = (1, 2, 3)
    requests = [request(at_s, prompt=1600, new=1, blocks=blocks) for at_s in (0.0, 100.0)]
    done = run(requests, costs(prefill_per_token_s=0.01), config(prefill={"chunk_tokens": 2048}))
    assert [one.ttft_s for one in done.served] == pytest.approx([16.0, 0.64])


def test_requests_beyond_the_limit_are_shed() -> None:
    done = run([request(0.0)] * 5, WORK, config(frontend={"max_requests": 2, "reserve": 0}))
    assert [one.end for one in done.served] == ["finished"] * 2 + ["shed"] * 3
    assert summarized(done, 1.0).shed == 3


def test_answers_that_do_not_fit_together_come_one_after_the_other() -> None:
    requests = [request(0.0, prompt=64, new=33)] * 2
    both = run(requests, costs(decode_fixed_s=0.1), opts=options(decode_pages=14))
    one_by_one = run(requests, costs(decode_fixed_s=0.1), opts=options(decode_pages=8))
    assert both.duration_s == pytest.approx(3.2)
    assert one_by_one.duration_s == pytest.approx(6.4)


def test_gpu_hours_are_those_of_every_member_from_its_order_on() -> None:
    done = run([request(0.0, new=1), request(3600.0, new=1)], costs(), opts=options(2, 3, 4))
    assert done.gpu_hours == pytest.approx({"prefill": 2.0, "decode": 3.0, "experts": 4.0}, rel=1e-3)


def test_a_burst_makes_the_pools_grow_and_its_end_makes_them_shrink() -> None:
    bounds = {"max_replicas": 12, "upscale_delay_s": 20, "downscale_delay_s": 120}
    conf = config(
        prefill={"chunk_tokens": 64},
        autoscaler={"target_ttft_s": 2, "target_tpot_s": 1, "prefill": bounds, "decode": bounds, "experts": bounds},
    )
    quiet, busy = poisson(2, 800, seed=1), poisson(40, 16_000, seed=2)
    requests = quiet + [dataclasses.replace(one, at_s=one.at_s + 400) for one in busy]
    requests += [dataclasses.replace(one, at_s=one.at_s + 850) for one in quiet]
    done = run(requests, WORK, conf, options(autoscale=True))
    sizes = {moment.at_s: moment.sizes["prefill"] for moment in done.moments}
    assert sizes[390.0] == 1
    assert max(sizes.values()) >= 4
    assert done.moments[-1].sizes["prefill"] < max(sizes.values())
    assert {one.end for one in done.served} == {"finished"}
    assert all(action.reason for action in done.actions)


def test_an_unbalanced_pool_is_slower_than_a_balanced_one() -> None:
    cost = costs(expert_per_row_s=0.001, prefill_fixed_s=0.001)
    requests = poisson(3, 100, seed=3)
    balanced, numbered = (run(requests, cost, opts=options(experts=4, balance=on)) for on in (True, False))
    assert summarized(balanced, 0).ttft_s.p50 < summarized(numbered, 0).ttft_s.p50


def test_a_shard_that_is_fullest_in_every_layer_is_the_pools_capacity() -> None:
    """Where another shard is fullest in every layer, lanes that do not wait for each other fill them all."""
    hot, cold = [0.9, 0.9], [0.2 / 6] * 6
    tokens_per_s = []
    for second in (hot + cold, cold + hot):
        shares = ExpertLoads(starts_s=(0.0,), windows=(np.array([hot + cold, second]),))
        cost = costs(expert_per_row_s=0.001, prefill_fixed_s=0.001)
        opts = options(prefill=8, experts=4, balance=False, streams=32)
        done = Simulation([request(0.0, new=1)] * 2000, shares, SHAPE, cost, config(), opts).run()
        tokens_per_s.append(64 * 2000 / done.duration_s)
    # In two layers, 64 tokens take 2 × 0.9 rows each of the shard that is fullest in both, half of it otherwise.
    assert tokens_per_s[0] == pytest.approx(1 / (2 * 2 * 0.9 * 0.001), rel=0.15)
    assert tokens_per_s[1] > 1.4 * tokens_per_s[0]


def test_in_a_closed_loop_the_next_request_comes_when_an_answer_is_complete() -> None:
    cost = costs(prefill_fixed_s=1.0, decode_fixed_s=0.5)
    done = run([request(99.0, new=3)] * 5, cost, opts=options(streams=1))
    assert [one.at_s for one in done.served] == pytest.approx([0.0, 2.0, 4.0, 6.0, 8.0])
    assert done.duration_s == pytest.approx(10.0)


def test_on_shared_cores_a_chunk_slows_down_when_another_begins_and_recovers_when_it_ends() -> None:
    """Two workers and one core; the second prompt comes when half of the first is computed."""
    cost = costs(prefill_per_token_s=0.01, cores=1, worker_threads=1, decode_cores=1.0)
    conf = config(pools={"prefill": {"niceness": 0}})
    done = run([request(0.0, prompt=100, new=1), request(0.5, prompt=25, new=1)], cost, conf, options(prefill=2))
    assert [one.ttft_s for one in done.served] == pytest.approx([1.25, 0.5], rel=0.02)


def test_on_shared_cores_a_sequence_joins_when_the_step_under_way_ends() -> None:
    """Steps of a second begin at 0.25; the second sequence is handed over within the third one."""
    cost = costs(decode_fixed_s=1.0, handoff_fixed_s=0.25, cores=4, worker_threads=1, decode_cores=1.0)
    done = run([request(0.0, new=11), request(2.5, new=2)], cost).served
    assert done[0].tpot_s == pytest.approx(10.25 / 10)
    assert done[1].tpot_s == pytest.approx(0.25 + 0.5 + 1.0)


def test_few_prompts_give_way_to_answers_on_shared_cores() -> None:
    cost = costs(prefill_per_token_s=0.01, decode_fixed_s=0.1, cores=1, worker_threads=1, decode_cores=1.0)
    requests = [request(0.0, prompt=10, new=101), request(2.0, prompt=10, new=1)]
    polite, equal = (
        run(requests, cost, config(pools={"prefill": {"niceness": niceness}})).served for niceness in (9, 0)
    )
    assert equal[1].ttft_s == pytest.approx(0.2, rel=0.02)
    assert polite[1].ttft_s > 0.5
    assert polite[0].tpot_s < equal[0].tpot_s


def test_a_worker_that_drains_leaves_also_if_the_last_request_on_its_way_never_comes() -> None:
    """An answer of one token ends at its prefill worker."""
    cost = costs(prefill_fixed_s=1.0, decode_fixed_s=0.5)
    requests = [request(0.0, new=1), request(0.0, new=1), request(50.0, new=1)]
    simulation = Simulation(requests, loads(), SHAPE, cost, config(), options(prefill=2, decode=2))
    simulation.clock.after(0.5, simulation.fleet.drain, "decode", 1)
    done = simulation.run()
    assert done.moments[-1].sizes["decode"] == 1
    assert done.gpu_hours["decode"] * 3600 == pytest.approx(51 + 1, abs=1.0)
