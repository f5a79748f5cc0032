"""Fault points: nothing happens unless it was allowed and armed, and then once."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

from octet.errors import ConfigError, LaneError
from octet.faults import Fault, FaultPoints


@pytest.fixture
def points() -> FaultPoints:
    points = FaultPoints()
    points.allow(True)
    return points


def test_nothing_is_armed_where_it_is_not_allowed() -> None:
    points = FaultPoints()
    with pytest.raises(ConfigError, match=r"chaos\.enabled"):
        points.arm(Fault(point="serve", action="raise"))
    points.reach("serve")
    assert points.struck() == ()


def test_a_fault_strikes_once_at_its_own_step(points: FaultPoints) -> None:
    points.arm(Fault(point="serve", action="raise"))
    points.reach("dispatch")
    with pytest.raises(LaneError, match="serve"):
        points.reach("serve")
    points.reach("serve")
    assert [struck.fault.point for struck in points.struck()] == ["serve"]


def test_passes_before_it_are_unharmed(points: FaultPoints) -> None:
    points.arm(Fault(point="sampled", action="raise", after=3))
    for _ in range(3):
        points.reach("sampled")
    with pytest.raises(LaneError):
        points.reach("sampled")


def test_a_disarmed_fault_does_not_strike(points: FaultPoints) -> None:
    points.arm(Fault(point="serve", action="raise"))
    points.disarm()
    points.reach("serve")
    assert points.struck() == ()


def test_a_delay_takes_its_time(points: FaultPoints) -> None:
    points.arm(Fault(point="adopt", action="delay", for_s=0.2))
    begun_s = time.monotonic()
    points.reach("adopt")
    assert time.monotonic() - begun_s >= 0.2


@pytest.mark.parametrize(("field", "value"), [("point", "elsewhere"), ("action", "explode")])
def test_what_there_is_not_is_refused_by_name(field: str, value: str) -> None:
    fields = {"point": "serve", "action": "kill"} | {field: value}
    with pytest.raises(ConfigError, match=value):
        Fault(**fields)  # type: ignore[arg-type]


SCRIPT = """
from octet import faults
faults.allow(True)
faults.arm(faults.Fault(point="combine", action="{action}"))
print("armed", flush=True)
faults.reach("combine")
print("went on", flush=True)
"""


def test_a_process_kills_itself() -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT.format(action="kill")], capture_output=True, timeout=60)
    assert (done.returncode, done.stdout) == (-signal.SIGKILL, b"armed\n")


def test_a_process_stops_itself_until_it_is_let_go_on() -> None:
    with subprocess.Popen([sys.executable, "-c", SCRIPT.format(action="stop")], stdout=subprocess.PIPE) as process:
        _, status = os.waitpid(process.pid, os.WUNTRACED)
        assert os.WIFSTOPPED(status)
        process.send_signal(signal.SIGCONT)
        out, _ = process.communicate(timeout=60)
    assert out == b"armed\nwent on\n"
