from __future__ import annotations

import os
import pathlib

import pytest

from ops.bench.changes.others import Others

TICK_S = 1 / os.sysconf("SC_CLK_TCK")


def machine(folder: pathlib.Path, busy: int, processes: dict[int, tuple[int, int]]) -> None:
    """Ticks of all, half of them of the system; session and ticks by pid."""
    folder.joinpath("stat").write_text(f"cpu  {busy // 2} 0 {busy - busy // 2} 900 50 0 0 0 0 0\ncpu0 1 2 3\n")
    for old in folder.glob("[0-9]*/stat"):
        old.unlink()
    for pid, (session, ticks) in processes.items():
        folder.joinpath(str(pid)).mkdir(exist_ok=True)
        line = f"{pid} (a) b) S 1 1 {session} 0 -1 0 0 0 0 0 {ticks} 0 0 0 20 0 1 0"
        folder.joinpath(str(pid), "stat").write_text(line)


def test_what_other_sessions_take_is_counted_and_what_is_ours_is_not(tmp_path: pathlib.Path) -> None:
    machine(tmp_path, 1000, {7: (70, 100), 8: (80, 100), 9: (90, 500)})
    others = Others({70, 80}, tmp_path)
    machine(tmp_path, 1100, {7: (70, 120), 8: (80, 150), 9: (90, 530)})
    assert others.taken_s() == pytest.approx(30 * TICK_S)


def test_what_has_ended_since_is_counted_as_well(tmp_path: pathlib.Path) -> None:
    machine(tmp_path, 1000, {7: (70, 100), 9: (90, 500)})
    others = Others({70}, tmp_path)
    machine(tmp_path, 1050, {7: (70, 110)})
    assert others.taken_s() == pytest.approx(40 * TICK_S)


def test_nothing_is_said_where_the_system_does_not_tell(tmp_path: pathlib.Path) -> None:
    assert Others({70}, tmp_path).taken_s() == 0.0
