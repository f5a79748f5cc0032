"""A time of day that jumps for Python, by whatever call; waits take their time, and other programs are left alone."""

from __future__ import annotations

import os
import pathlib
import shutil
import subprocess
import sys
import time

import pytest

from ops.chaos.wall_clock import WallClock, why_no_wall_clock

REASON = why_no_wall_clock()
pytestmark = pytest.mark.skipif(bool(REASON), reason=REASON)

_TELL = """
import sys, time
for _ in sys.stdin:
    time.sleep(0.01)
    print(time.time(), time.monotonic(), flush=True)
"""


@pytest.mark.parametrize("jump_s", [3600.0, -3600.0])
def test_the_time_of_day_jumps_and_no_other_clock(tmp_path: pathlib.Path, jump_s: float) -> None:
    clock = WallClock(tmp_path)
    env = {**os.environ, **clock.env}
    command = [sys.executable, "-c", _TELL]
    with subprocess.Popen(command, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:

        def ask() -> tuple[float, float]:
            assert process.stdin is not None
            assert process.stdout is not None
            print(file=process.stdin, flush=True)
            wall_s, steady_s = map(float, process.stdout.readline().split())
            return wall_s - time.time(), steady_s - time.monotonic()

        off_s, steady_off_s = ask()
        assert abs(off_s) < 5
        assert abs(steady_off_s) < 5
        clock.jump(jump_s)
        off_s, steady_off_s = ask()
        assert abs(off_s - jump_s) < 5
        assert abs(steady_off_s) < 5
        assert clock.followers() == [process.pid]
        process.communicate(timeout=10)
    assert clock.followers() == []


_WAIT = """
import ctypes, time
libc = ctypes.CDLL(None, use_errno=True)

class Timespec(ctypes.Structure):
    _fields_ = [("tv_sec", ctypes.c_long), ("tv_nsec", ctypes.c_long)]

def soon():
    at_s = time.time() + 0.1
    return ctypes.byref(Timespec(int(at_s), int(at_s % 1 * 1e9)))

def took(name, *args):
    begin_s = time.monotonic()
    getattr(libc, name)(*args)
    print(name, time.monotonic() - begin_s)

room = ctypes.create_string_buffer(256)
condition, mutex, held, semaphore = (ctypes.byref(room, at) for at in (0, 64, 128, 192))
libc.pthread_mutex_lock(mutex)
libc.pthread_mutex_lock(held)
took("pthread_cond_timedwait", condition, mutex, soon())
took("pthread_cond_clockwait", condition, mutex, 0, soon())
took("pthread_mutex_timedlock", held, soon())
took("sem_timedwait", semaphore, soon())
took("sem_clockwait", semaphore, 0, soon())
took("clock_nanosleep", 0, 1, soon(), None)
wait, of_day = 9, 256
took("syscall", ctypes.c_long(202), semaphore, wait | of_day, 0, soon(), None, ctypes.c_long(0xFFFFFFFF))
"""


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="knows the number of one call on x86-64 only")
@pytest.mark.parametrize("jump_s", [3600.0, -3600.0])
def test_waits_until_a_time_of_day_take_as_long_as_they_are_meant_to(tmp_path: pathlib.Path, jump_s: float) -> None:
    clock = WallClock(tmp_path)
    clock.jump(jump_s)
    command = [sys.executable, "-c", _WAIT]
    told = subprocess.run(command, env={**os.environ, **clock.env}, capture_output=True, text=True, timeout=60)
    waits = {name: float(took_s) for name, took_s in map(str.split, told.stdout.splitlines())}
    assert len(waits) == 7, told.stderr
    assert all(0.08 < took_s < 2 for took_s in waits.values()), waits


def test_who_is_no_python_process_has_the_right_time(tmp_path: pathlib.Path) -> None:
    clock = WallClock(tmp_path)
    clock.jump(7200)
    date = shutil.which("date")
    assert date is not None
    told = subprocess.run([date, "+%s"], env={**os.environ, **clock.env}, capture_output=True, text=True, timeout=10)
    assert abs(float(told.stdout) - time.time()) < 5


def test_what_a_process_says_of_when_something_was_is_put_right(tmp_path: pathlib.Path) -> None:
    clock = WallClock(tmp_path)
    before_s = time.time()
    for off_s in (3600.0, -3600.0, 0.0):
        clock.jump(off_s)
        now_s = time.time()
        assert clock.off_s == off_s
        assert clock.right_s(now_s + off_s) == pytest.approx(now_s)
        assert clock.right_s(before_s) == before_s, "it was told before the first jump"
    assert clock.right_s(before_s - 60) == before_s - 60
