"""Schedules: drawn alike by the same seed, read back as they were written, refused by the field that is wrong."""

from __future__ import annotations

import pathlib
from typing import Any, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from octet.errors import ConfigError
from octet.faults import POINTS
from ops.chaos.drawing import draw_schedule
from ops.chaos.schedule import (
    Arm,
    FillDisk,
    JumpClock,
    Kill,
    KillNode,
    LimitMemory,
    PoolName,
    Schedule,
    Stop,
    Target,
    dump_schedule,
    load_schedule,
    parse_schedule,
)


@given(st.integers(0, 2**63), st.floats(0.5, 60))
def test_the_same_seed_is_the_same_schedule(seed: int, duration_s: float) -> None:
    schedule = draw_schedule(seed, duration_s)
    assert draw_schedule(seed, duration_s) == schedule
    assert schedule.events
    assert all(0 <= event.at_s <= duration_s for event in schedule.events)


def test_seeds_draw_every_kind_of_fault_everybody_and_every_step() -> None:
    events = [event for seed in range(400) for event in draw_schedule(seed).events]
    assert {event.do for event in events} == {"kill", "stop", "arm", "scale", "rebalance"}
    assert {event.target for event in events if isinstance(event, Kill)} == set(get_args(Target))
    assert {event.point for event in events if isinstance(event, Arm)} == POINTS.keys()


def test_services_are_hit_only_where_they_are_named() -> None:
    events = [event for seed in range(200) for event in draw_schedule(seed, services=("router",)).events]
    assert {event.target for event in events if isinstance(event, Kill)} == {*get_args(PoolName), "router"}
    assert {event.target for event in events if isinstance(event, Arm)} == set(get_args(PoolName))


@pytest.mark.parametrize("name", ["a.json", "b.yaml"])
def test_a_schedule_is_read_as_it_was_written(tmp_path: pathlib.Path, name: str) -> None:
    schedule = draw_schedule(7)
    file = tmp_path / name
    file.write_text(dump_schedule(schedule))
    assert load_schedule(file) == schedule


def test_a_schedule_in_yaml(tmp_path: pathlib.Path) -> None:
    file = tmp_path / "two.yaml"
    file.write_text(
        "duration_s: 3\n"
        "events:\n"
        "  - {at_s: 0.5, do: kill, target: experts, which: 1}\n"
        "  - {at_s: 1, do: stop, target: decode, for_s: 0.5}\n"
    )
    assert load_schedule(file) == Schedule(
        name="two",
        duration_s=3,
        events=(Kill(at_s=0.5, target="experts", which=1), Stop(at_s=1, target="decode", for_s=0.5)),
    )


@pytest.mark.parametrize(
    ("event", "field"),
    [
        ({"at_s": 1, "do": "explode"}, "events.0"),
        ({"at_s": -1, "do": "rebalance"}, r"events.0.rebalance.at_s"),
        ({"at_s": 9, "do": "rebalance"}, "duration_s"),
        ({"at_s": 1, "do": "kill", "target": "gpu"}, r"events.0.kill.target"),
        ({"at_s": 1, "do": "kill", "target": "decode", "force": 9}, r"events.0.kill.force"),
        ({"at_s": 1, "do": "stop", "target": "decode"}, r"events.0.stop.for_s"),
        ({"at_s": 1, "do": "cut", "way": "sideways"}, r"events.0.cut.way"),
        ({"at_s": 1, "do": "slow", "delay_s": 0.05}, r"events.0.slow.for_s"),
        ({"at_s": 1, "do": "slow", "for_s": 1, "delay_s": 0.05, "mbit_per_s": 1}, "one of delay_s and mbit_per_s"),
        ({"at_s": 1, "do": "limit_memory"}, r"events.0.limit_memory.target"),
        ({"at_s": 1, "do": "fill_disk"}, r"events.0.fill_disk.for_s"),
        ({"at_s": 1, "do": "jump_clock", "by_s": 0}, r"events.0.jump_clock.by_s"),
        ({"at_s": 1, "do": "jump_clock", "by_s": 1e12}, "at most 3.*e.07 s, forward or back"),
        ({"at_s": 1, "do": "kill_node", "target": "far"}, r"events.0.kill_node.target"),
        ({"at_s": 1, "do": "arm", "target": "decode", "point": "nowhere"}, "no step 'nowhere'"),
        ({"at_s": 1, "do": "arm", "target": "decode", "point": "serve"}, "a step of experts, not of decode"),
    ],
)
def test_what_is_wrong_is_named(event: dict[str, Any], field: str) -> None:
    with pytest.raises(ConfigError, match=field):
        parse_schedule({"duration_s": 4, "events": [event]})


def test_two_things_at_a_time_do_not_happen_between_hosts() -> None:
    slow = {"at_s": 3, "do": "slow", "mbit_per_s": 8, "for_s": 1}
    assert parse_schedule({"duration_s": 4, "events": [{"at_s": 1, "do": "cut", "for_s": 2}, slow]})
    for cut in ({"at_s": 1, "do": "cut", "for_s": 2.5}, {"at_s": 1, "do": "cut"}):
        with pytest.raises(ConfigError, match=r"begins before cut is over"):
            parse_schedule({"duration_s": 4, "events": [slow, cut]})


def test_a_disk_is_full_once_at_a_time_and_nothing_happens_between_hosts_of_which_one_is_gone() -> None:
    events: list[dict[str, Any]] = [{"at_s": 1, "do": "fill_disk", "for_s": 2}, {"at_s": 3, "do": "kill_node"}]
    assert parse_schedule({"duration_s": 4, "events": events})
    for late in ({"at_s": 2, "do": "fill_disk", "for_s": 1}, {"at_s": 4, "do": "cut"}):
        with pytest.raises(ConfigError, match=r"begins before (fill disk|kill node) is over"):
            parse_schedule({"duration_s": 4, "events": [*events, late]})


def test_every_event_is_read_as_it_was_written(tmp_path: pathlib.Path) -> None:
    schedule = Schedule(
        name="all",
        events=(
            LimitMemory(at_s=0.5, target="experts", which=1),
            FillDisk(at_s=1, for_s=0.5),
            JumpClock(at_s=1, by_s=-3600),
            JumpClock(at_s=2, by_s=60, for_s=1),
            KillNode(at_s=3),
        ),
    )
    file = tmp_path / "all.json"
    file.write_text(dump_schedule(schedule))
    assert load_schedule(file) == schedule


@pytest.mark.parametrize("text", ["- 1\n- 2\n", "events: [", "just words"])
def test_a_file_that_is_no_schedule_is_refused(tmp_path: pathlib.Path, text: str) -> None:
    file = tmp_path / "broken.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=r"broken\.yaml"):
        load_schedule(file)


def test_a_file_that_is_not_there_is_refused(tmp_path: pathlib.Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        load_schedule(tmp_path / "gone.yaml")
