"""What `octet chaos run` is asked for."""

from __future__ import annotations

import asyncio
import contextlib
import pathlib
from collections.abc import AsyncIterator
from typing import Any

import pytest
from typer.testing import CliRunner

from octet.errors import ConfigError
from ops.chaos import command, rig
from ops.chaos.cli import chaos
from ops.chaos.command import Against, ChaosOptions, run_all, schedules_of
from ops.chaos.drawing import draw_schedule
from ops.chaos.ray_replies import failures
from ops.chaos.run import Load, Verdict
from ops.chaos.schedule import Cut, Event, FillDisk, JumpClock, KillNode, LimitMemory, Schedule, dump_schedule
from tests.unit.ops.chaos.histories import facts, history


def test_seeds_are_counted_up_from_the_first() -> None:
    assert schedules_of((), 5, 3, 2.0) == tuple(draw_schedule(seed, 2.0) for seed in (5, 6, 7))


def runs(monkeypatch: pytest.MonkeyPatch, *options: str) -> list[tuple[str, int]]:
    """The schedules of a command line by name, each with the seed of its users."""
    found: list[tuple[str, int]] = []

    class Still:
        async def facts(self) -> object:
            return facts()

    @contextlib.asynccontextmanager
    async def questioned(*of_what: object) -> AsyncIterator[tuple[Still, list[object]]]:
        yield Still(), []

    async def run_schedule(stage: object, schedule: Schedule, questions: object, load: Load, **rest: Any) -> Verdict:
        found.append((schedule.name, load.seed))
        return Verdict(schedule=schedule, history=history(), violations=())

    def run_chaos(model_dir: object, options: ChaosOptions, *files: object) -> int:
        asyncio.run(run_all(None, options))  # type: ignore[arg-type]
        return 0

    for played in (questioned, run_schedule, run_chaos):
        monkeypatch.setattr(command, played.__name__, played)
    assert CliRunner().invoke(chaos, ["run", *options], catch_exceptions=False).exit_code == 0
    return found


def test_each_schedule_of_a_range_has_the_users_that_it_has_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    together = runs(monkeypatch, "--seed", "5", "--count", "3")
    assert together == [("seed 5", 5), ("seed 6", 6), ("seed 7", 7)]
    assert runs(monkeypatch, "--seed", "7") == together[2:]


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


RUNNING = Against(ray_address="auto", namespace="octet")
MEMORY, DISK, CLOCK = LimitMemory(at_s=1, target="decode"), FillDisk(at_s=1, for_s=1), JumpClock(at_s=1, by_s=5)


@pytest.mark.parametrize(
    ("event", "against", "told"),
    [
        (MEMORY, None, r"limit_memory at 1 s.*no control group of memory.*version 1.*Leave the event out"),
        (DISK, None, r"fill_disk at 1 s.*no mounting here.*Run as root"),
        (CLOCK, None, r"jump_clock at 1 s.*no compiler here.*Install gcc"),
        (KillNode(at_s=1), None, r"kill_node at 1 s.*one host.*--hosts 2"),
        (DISK, RUNNING, r"fill_disk at 1 s.*runs already.*--against"),
        (CLOCK, RUNNING, r"jump_clock at 1 s.*runs already.*--against"),
    ],
)
def test_what_cannot_be_done_here_is_told_before_anything_begins(
    monkeypatch: pytest.MonkeyPatch, event: Event, against: Against | None, told: str
) -> None:
    monkeypatch.setattr(rig, "may_limit_memory", lambda: False)
    monkeypatch.setattr(rig, "why_no_small_disk", lambda: "no mounting here")
    monkeypatch.setattr(rig, "why_no_wall_clock", lambda: "no compiler here")
    with pytest.raises(ConfigError, match=told):
        ChaosOptions(schedules=(Schedule(events=(event,)),), against=against).check()


def test_what_can_be_done_here_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rig, "may_limit_memory", lambda: True)
    monkeypatch.setattr(rig, "why_no_small_disk", str)
    monkeypatch.setattr(rig, "why_no_wall_clock", str)
    ChaosOptions(schedules=(Schedule(events=(MEMORY, DISK, CLOCK, KillNode(at_s=2))),), num_hosts=2).check()


def test_a_cluster_that_runs_already_keeps_its_config() -> None:
    with pytest.raises(ConfigError, match="--set and --against"):
        ChaosOptions(schedules=(Schedule(),), overrides=("decode.max_batch=3",), against=RUNNING).check()


@pytest.mark.parametrize("command", [["draw", "3"], ["run", "--seed", "3"]])
def test_no_schedule_lasts_for_ever(command: list[str]) -> None:
    done = CliRunner().invoke(chaos, [*command, "--duration", "inf"])
    assert done.exit_code == 2
    assert "'--duration'" in done.output


def test_nothing_happens_between_hosts_after_one_is_gone() -> None:
    gone, cut = Schedule(events=(KillNode(at_s=1),)), Schedule(events=(Cut(at_s=1, for_s=1),))
    ChaosOptions(schedules=(cut, gone), num_hosts=2).check()
    with pytest.raises(ConfigError, match=r"cut at 1 s.*no other host"):
        ChaosOptions(schedules=(gone, cut), num_hosts=2).check()


def test_a_ray_of_its_own_loses_replies_in_whole_percent() -> None:
    (fields,) = failures(0.03).values()
    assert (fields["req_failure_prob"], fields["resp_failure_prob"]) == (0, 3)
    with pytest.raises(ConfigError, match="--lose-ray-replies"):
        ChaosOptions(schedules=(Schedule(),), lost_replies=0.01, against=RUNNING).check()


def test_a_ray_of_its_own_loses_calls_to_the_gcs_and_to_raylets_in_each_way() -> None:
    failing = failures(0.0, 0.1)
    assert {tuple(fields.values())[1:] for fields in failing.values()} == {(10, 10, 10)}
    assert not {call for call in failing if "PushTask" in call}
    assert len(failures(0.01, 0.1)) == len(failing) + 1
    with pytest.raises(ConfigError, match="--lose-ray-control"):
        ChaosOptions(schedules=(Schedule(),), lost_control=0.1, against=RUNNING).check()
