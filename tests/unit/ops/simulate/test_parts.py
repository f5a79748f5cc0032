"""The simulator's parts by themselves."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import pathlib
import random
from typing import Any

import numpy as np
import pytest

from experts.shard import PIECE_OPERATIONS
from octet.background import share_behind
from octet.config import load_config
from octet.errors import ConfigError
from ops.simulate.command import SimulateOptions, simulate
from ops.simulate.contention import Contention, SharedCores, contend, layer_s
from ops.simulate.costs import CPU, H100, calibrated, from_rates, read_calibration
from ops.simulate.expert_loads import drawn, recorded
from ops.simulate.load import day, enveloped, read_requests, stacked
from ops.simulate.outcome import Action, _most_reversals
from ops.simulate.shape import GLM_4_6, shape, shape_of
from ops.simulate.shard_times import sample_batches, shard_times
from router.placement import place_evenly
from router.trace.files import TraceWriter
from router.trace.values import TraceHeader, TraceWindow
from tests.unit.ops.simulate.toy import SHAPE, costs, poisson


def contention(
    compute: list[float], peak: list[float], prefill: list[bool], cores: int = 0, shards: int = 1, threads: int = 1,
    others: float = 0.0, behind: list[bool] | None = None, piece_s: float = np.inf, turn_s: float = 0.0,
    weight_behind: float = 0.1,
) -> Contention:  # fmt: skip
    num = len(compute)
    shared = SharedCores(cores, others, np.full(num, float(threads)), weight_behind, turn_s) if cores else None
    return contend(
        np.array(compute), np.zeros(num), np.array(peak), np.array(peak), np.ones(num, np.int64), np.array(prefill),
        np.array(behind or [False] * num), shards, piece_s, shared,
    )  # fmt: skip


def layer(compute_s: float, way_s: float, wait_s: float, peak_s: float, frames: int) -> float:
    arrays = (np.array([value]) for value in (compute_s, way_s, wait_s, peak_s, frames))
    return float(layer_s(*arrays)[0])


def test_a_worker_alone_waits_for_nobody() -> None:
    state = contention([0.3], [0.1], [False])
    assert state.decode_wait_s == pytest.approx(0.0, abs=1e-9)
    assert state.busy_share == pytest.approx(0.25)


def test_many_workers_saturate_a_shard_and_no_more() -> None:
    """A closed network: in the end every worker waits for all others, and the shard is never idle."""
    state = contention([0.1] * 50, [0.1] * 50, [False] * 50)
    assert 0.9 < state.busy_share <= 1.0
    cycle_s = layer(0.1, 0.0, state.decode_wait_s, 0.1, 1)
    assert 50 / cycle_s == pytest.approx(1 / 0.1, rel=0.1)


def test_decode_frames_wait_less_than_prefill_frames() -> None:
    state = contention([0.2] * 6, [0.05] * 6, [False, True] * 3)
    assert 0 < state.decode_wait_s < state.prefill_wait_s


def test_workers_that_take_two_cores_slow_everybody_down_where_cores_are_shared() -> None:
    alone, shared = (contention([0.3] * 2, [0.1] * 2, [False] * 2, cores=2, threads=n) for n in (1, 2))
    assert 1 <= alone.decode_slowdown < shared.decode_slowdown
    assert 1 <= alone.shard_slowdown < shared.shard_slowdown
    assert contention([0.3] * 2, [0.1] * 2, [False] * 2, cores=0, threads=2).decode_slowdown == 1


def test_two_frames_under_way_hide_the_shorter_of_the_two_parts() -> None:
    assert layer(0.2, 0.0, 0.0, 0.1, 2) == pytest.approx(0.4)
    assert layer(0.1, 0.05, 0.0, 0.3, 2) == pytest.approx(0.6)
    assert layer(0.2, 0.05, 0.0, 0.1, 1) == pytest.approx(0.35)


def test_shared_cores_slow_everyone_down_once_they_are_too_few() -> None:
    assert contention([1.0] * 4, [1e-6] * 4, [False] * 4, cores=4).decode_slowdown == pytest.approx(1.0)
    assert contention([1.0] * 4, [1e-6] * 4, [False] * 4, cores=2).decode_slowdown == pytest.approx(2.0, rel=0.05)


def test_who_waits_for_shards_leaves_them_the_cores() -> None:
    """One worker of two threads and two shards, in turn: nobody is slowed down on two cores."""
    state = contention([0.3], [0.3], [False], cores=2, shards=2, threads=2)
    assert (state.decode_slowdown, state.shard_slowdown) == pytest.approx((1.0, 1.0), rel=0.01)


def test_a_worker_that_has_stepped_back_gets_what_the_others_leave() -> None:
    """Where decode computes all the time, on one of two cores, prefill has the other; and not less than its weight."""
    state = contention([1.0, 1.0], [1e-6] * 2, [False, True], cores=2, behind=[False, True])
    assert (state.decode_slowdown, state.behind_slowdown) == pytest.approx((1.0, 1.0), rel=0.01)
    state = contention([1.0] * 3, [1e-6] * 3, [False, False, True], cores=1, behind=[False, False, True])
    assert state.decode_slowdown == pytest.approx(2.1, rel=0.02)
    assert state.behind_slowdown == pytest.approx(2.1 / 0.1, rel=0.02)


def test_what_is_shorter_than_a_turn_waits_for_one_whatever_its_weight() -> None:
    """Half a turn of 0.4 for one thread too many, where the part takes 0.1."""
    state = contention([0.1, 1.0], [1e-6] * 2, [False, True], cores=1, behind=[False, True], turn_s=0.4)
    assert state.decode_slowdown == pytest.approx(1 + 0.4 / 2 / 0.1, rel=0.05)
    assert contention([0.1], [1e-6], [False], cores=1, turn_s=0.4).decode_slowdown == pytest.approx(1.0)


def test_nobody_waits_for_a_turn_of_who_is_done_before_it_ends() -> None:
    """Three threads on one core, each for 0.1 at a time: as fast as by their weights, however long a turn is."""
    short, long = (contention([0.1] * 3, [1e-6] * 3, [False] * 3, cores=1, turn_s=turn_s) for turn_s in (0.0, 4.0))
    assert long.decode_slowdown == pytest.approx(short.decode_slowdown, rel=0.1)
    # A shard waits half of the 0.3 that the one thread keeps the core, and not half a turn.
    state = contention([0.3] * 2, [0.01] * 2, [False, True], cores=1, turn_s=4.0)
    assert state.shard_slowdown < 1 + 2 * 0.3 / 2 / 0.01


def test_where_shards_pause_decode_waits_for_a_piece_and_prefill_for_what_passes() -> None:
    whole, paused = (
        contention([0.01, 1e-6], [0.01, 1.0], [False, True], piece_s=piece_s) for piece_s in (np.inf, 0.01)
    )
    assert paused.decode_wait_s < whole.decode_wait_s / 20
    assert whole.prefill_stretch == 1
    assert paused.prefill_stretch == pytest.approx(1 / (1 - paused.decode_busy_share), rel=0.05)


def test_stepping_back_costs_a_fifth_of_the_share_for_each_step_and_no_more_than_there_are() -> None:
    assert share_behind(0) == 1.0
    assert share_behind(1) == 0.8
    assert share_behind(19) == share_behind(9) == pytest.approx(0.8**9)


def test_other_processes_take_their_part_of_shared_cores() -> None:
    """They go first, and have each of two cores for half of the time: for a quarter both are left, for a half one."""
    one, three = (contention([1.0] * num, [1e-6] * num, [False] * num, cores=2, others=1.0) for num in (1, 3))
    assert one.decode_slowdown == pytest.approx(1 / 0.75, rel=0.02)
    assert three.decode_slowdown == pytest.approx(1 / (0.25 * 2 / 3 + 0.5 / 3), rel=0.02)


def test_an_envelope_keeps_every_request_in_order_and_moves_them_to_the_middle() -> None:
    # So many that a tenth's share does not wander by chance.
    requests = poisson(1.0, 40_000, seed=random.randrange(1000))
    shaped = enveloped(requests, 1000.0, day(0.1))
    times_s = [one.at_s for one in shaped]
    assert times_s == sorted(times_s)
    assert [one.prompt_tokens for one in shaped] == [one.prompt_tokens for one in requests]
    assert times_s[0] >= 0
    assert times_s[-1] <= 1000.0
    per_tenth, _ = np.histogram(times_s, 10, (0, 1000))
    assert per_tenth[4:6].sum() / per_tenth[[0, 9]].sum() == pytest.approx(0.97 / 0.1, rel=0.3)


def test_copies_share_no_prefix_and_keep_the_rate_level() -> None:
    requests = [dataclasses.replace(one, blocks=(n % 7,)) for n, one in enumerate(poisson(2.0, 500, seed=1))]
    three = stacked(requests, 3, np.random.default_rng(0))
    assert len(three) == 1500
    assert len({one.blocks for one in three}) == 21
    halves, _ = np.histogram([one.at_s for one in three], 2, (0, requests[-1].at_s))
    assert halves[0] == pytest.approx(halves[1], rel=0.2)


def test_a_trace_that_is_none_is_refused_with_its_line(tmp_path: pathlib.Path) -> None:
    file = tmp_path / "trace.jsonl"
    file.write_text('{"timestamp": 0, "input_length": 3, "output_length": 4}\n{"timestamp": 5}\n')
    with pytest.raises(ConfigError, match=":2:"):
        read_requests(file)
    file.write_text("")
    with pytest.raises(ConfigError, match="without requests"):
        read_requests(file)
    file.write_bytes(b'{"timestamp": 0, "input_length": 3, "output_length": 4}\n\xff\xfe\n')
    with pytest.raises(ConfigError, match=":2:"):
        read_requests(file)
    file.write_bytes(b"\x89PNG\r\n\x1a\n")
    with pytest.raises(ConfigError, match=":1:"):
        read_requests(file)
    with pytest.raises(ConfigError, match=r"nowhere.*a readable file"):
        read_requests(tmp_path / "nowhere.jsonl")


@pytest.mark.parametrize("fixed", [(0, 1, 1), (1, -1, 1), (1, 1, 0)])
def test_a_pool_without_members_is_refused_before_anything_waits_for_it(fixed: tuple[int, int, int]) -> None:
    options = SimulateOptions(trace=pathlib.Path("no-trace"), fixed=fixed)
    with pytest.raises(ConfigError, match=rf"--fixed.*{','.join(map(str, fixed))}.*at least one member"):
        simulate(load_config(), options)


def test_fewer_shards_than_hold_every_expert_are_refused(tmp_path: pathlib.Path) -> None:
    """A GPU of 80 GB has room for 17 of the 160 experts of each layer."""
    trace = tmp_path / "trace.jsonl"
    trace.write_text('{"timestamp": 0, "input_length": 3, "output_length": 4}\n')
    for options, name in (
        (SimulateOptions(trace=trace, fixed=(1, 1, 9)), "--fixed"),
        (SimulateOptions(trace=trace, gpus=12), "--gpus"),
        (SimulateOptions(trace=trace, autoscale=True), r"pools\.experts\.size"),
    ):
        with pytest.raises(ConfigError, match=rf"{name}.* shards.*at least 10 for 160 experts"):
            simulate(load_config(), options)


@pytest.mark.parametrize("suffix", [".npz", ".jsonl"])
def test_recorded_loads_become_shares_of_tokens(tmp_path: pathlib.Path, suffix: str) -> None:
    counts_WLE = np.random.default_rng().integers(50, 100, (3, 2, 8)).astype(float)
    file = tmp_path / f"trace{suffix}"
    header = TraceHeader(model="toy", layers=(1, 2), num_experts=8, experts_per_token=2)
    with contextlib.closing(TraceWriter(file, header)) as writer:
        for number, counts_LE in enumerate(counts_WLE):
            writer.add(
                TraceWindow(
                    t_s=100.0 + 60 * number,
                    duration_s=60.0,
                    tokens=1.0,
                    balancedness=1.0,
                    loads_LE=counts_LE,
                    members={},
                )
            )
    loads = recorded(file, 2, 8, 2)
    assert loads.starts_s == (0.0, 60.0, 120.0)
    assert loads.index_at(119.0) == 1
    assert np.allclose(loads.windows[1], 2 * counts_WLE[1] / counts_WLE[1].sum(1, keepdims=True))
    with pytest.raises(ConfigError, match="as in --model"):
        recorded(file, 3, 8, 2)


def test_shards_take_longer_for_more_tokens_and_the_fullest_longest() -> None:
    loads = drawn(2, 8, 2, np.random.default_rng(0), (1.0, 1.0)).windows[0]
    cost = costs(expert_per_row_s=1.0, expert_per_read_s=0.1)
    times = shard_times(place_evenly((1, 2), 8, 4), sample_batches(loads, 2, 256, seed=0), cost, 64)
    assert times.peak_s[0] == times.mean_s[0] == 0
    assert (np.diff(times.peak_s) > 0).all()
    assert (times.peak_s[1:] >= times.mean_s[1:]).all()
    assert times.mean_s[256] == pytest.approx(2 * 256 / 4, rel=0.01)
    assert 1 <= times.rows_sent[1] <= 2


def test_glm_4_6_weighs_what_its_makers_say() -> None:
    glm = shape(GLM_4_6, 2)
    assert glm.kv_bytes == 376_832
    assert glm.expert_bytes == pytest.approx(47.2e6, rel=0.01)
    assert len(glm.moe_layers) == 89
    assert glm.worker_bytes == pytest.approx(34e9, rel=0.02)
    with pytest.raises(ConfigError, match=r"glm-4\.6"):
        shape_of("glm-9", 2)


def test_the_embedded_model_has_a_name() -> None:
    assert (len(shape_of("embedded", 4).moe_layers), shape_of("embedded", 4).num_experts) == (3, 32)


def test_costs_follow_from_rates() -> None:
    glm = shape(GLM_4_6, 2)
    cost = from_rates(H100, glm, 16)
    assert cost.decode_fixed_s == pytest.approx(0.012, rel=0.05)
    assert cost.worker_start_s < cost.shard_start_s < 120


def test_what_was_measured_replaces_what_was_assumed(tmp_path: pathlib.Path) -> None:
    report: dict[str, Any] = {
        "schema": "octet.breakdown/1",
        "pools": "1 prefill + 1 decode + 2 shards, threads {}",
        "model": {"moe_layers": 2, "experts": 8},
        "rates": {"decode_worker": {"threads": 2}},
        "turn_s": 0.004,
        "costs": {
            "attention": {"fixed_s": 0.01, "per_sequence_s": 0.002, "per_attended_s": 1e-6},
            "expert": {"fixed_s": 1e-4, "per_expert_s": 3e-4, "per_pair_s": 4e-5},
            "exchange": {"fixed_s": 5e-4, "per_byte_s": 1e-9},
            "handoff": {"fixed_s": 0.006, "per_byte_s": 3e-9},
            "processor": {
                "decode_cores": 1.4,
                "prefill": {"fixed_s": 0.02, "per_token_s": 0.001, "per_attended_s": 1e-8},
                "expert": {"fixed_s": 3e-4, "per_expert_s": 2e-4, "per_pair_s": 3e-5},
            },
        },
    }
    file = tmp_path / "breakdown.json"
    file.write_text(json.dumps(report))
    cost = calibrated(from_rates(CPU, SHAPE, 4), read_calibration(file, SHAPE), SHAPE)
    assert cost.decode_per_sequence_s == 0.002
    assert cost.worker_threads == 2
    assert cost.expert_per_read_s == 2e-4
    assert cost.expert_piece_s == pytest.approx(3e-5 * PIECE_OPERATIONS / SHAPE.expert_flops)
    assert (cost.decode_cores, cost.turn_s, cost.handoff_fixed_s) == (1.4, 0.004, 0.006)
    # Receiving and replying are in a shard's processor time, and were in the way.
    assert cost.exchange_fixed_s == pytest.approx(5e-4 - (3e-4 - 1e-4))
    # On two threads; two MoE layers, and two shards to which each token's row goes and from which its sum returns.
    assert cost.prefill_per_token_s == pytest.approx(0.001 / 2 - 2 * 2 * 2 * 64 * 1e-9)
    assert cost.prefill_fixed_s == pytest.approx(0.02 / 2 - 2 * cost.exchange_fixed_s)
    file.write_text(json.dumps(report | {"model": {"moe_layers": 3, "experts": 8}}))
    with pytest.raises(ConfigError, match="as in --model"):
        read_calibration(file, SHAPE)
    older = {name: costs for name, costs in report["costs"].items() if name != "processor"}
    file.write_text(json.dumps(report | {"costs": older}))
    with pytest.raises(ConfigError, match=r"costs\.processor\.decode_cores None.*write it anew, by this version"):
        read_calibration(file, SHAPE)
    file.write_text(json.dumps(report | {"pools": "1 prefill"}))
    with pytest.raises(ConfigError, match=r"pools '1 prefill'.*a number of shards"):
        read_calibration(file, SHAPE)
    file.write_text(json.dumps(report | {"rates": {"decode_worker": {"threads": 0}}}))
    with pytest.raises(ConfigError, match=r"rates\.decode_worker\.threads 0"):
        read_calibration(file, SHAPE)
    file.write_text("{}")
    with pytest.raises(ConfigError, match="schema"):
        read_calibration(file, SHAPE)


def test_reversals_are_counted_within_ten_minutes() -> None:
    def action(at_s: float, up: bool) -> Action:
        return Action(at_s=at_s, pool="decode", before=2, after=3 if up else 1, reason="")

    calm = tuple(action(at_s, up) for at_s, up in ((0, True), (100, True), (700, False), (1400, True)))
    assert _most_reversals(calm, "decode") == 1
    wild = tuple(action(at_s, up) for at_s, up in ((0, True), (100, False), (200, True), (699, False)))
    assert _most_reversals(wild, "decode") == 3
    assert _most_reversals(wild, "prefill") == 0
