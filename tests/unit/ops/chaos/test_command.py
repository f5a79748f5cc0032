"""What `octet chaos run` is asked for."""

from __future__ import annotations

import pathlib

import pytest

from octet.errors import ConfigError
from ops.chaos.command import Against, ChaosOptions, schedules_of
from ops.chaos.drawing import draw_schedule
from ops.chaos.schedule import Cut, Schedule, dump_schedule


def test_seeds_are_counted_up_from_the_first() -> None:
    assert schedules_of((), 5, 3, 2.0) == tuple(draw_schedule(seed, 2.0) for seed in (5, 6, 7))


def test_files_are_taken_in_their_order(tmp_path: pathlib.Path) -> None:
    files = [tmp_path / name for name in ("b.json", "a.json")]
    for number, file in enumerate(files):
        file.write_text(dump_schedule(draw_schedule(number)))
    assert schedules_of(files, None, 1, 4.0) == (draw_schedule(0), draw_schedule(1))


@pytest.mark.parametrize(("files", "seed"), [((), None), ((pathlib.Path("a.json"),), 3)])
def test_it_takes_either_files_or_a_seed(files: tuple[pathlib.Path, ...], seed: int | None) -> None:
    with pytest.raises(ConfigError, match="--schedule"):
        schedules_of(files, seed, 1, 4.0)


def test_a_cut_between_hosts_takes_hosts_and_those_a_cluster_of_their_own() -> None:
    cutting = (Schedule(events=(Cut(at_s=1.0),)),)
    ChaosOptions(schedules=cutting, num_hosts=2).check()
    with pytest.raises(ConfigError, match="--hosts 2"):
        ChaosOptions(schedules=cutting).check()
    with pytest.raises(ConfigError, match="--against"):
        ChaosOptions(schedules=cutting, num_hosts=2, against=Against(ray_address="auto", namespace="octet")).check()
