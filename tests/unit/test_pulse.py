from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

from octet.pulse import Pulse, Pulses

HOST = "127.0.0.1"
PATIENT_S = 20.0
# Holds the interpreter's lock for as long as it sleeps: no Python thread of the process runs meanwhile.
GREEDY = """
import ctypes, sys
from octet.pulse import Pulse
pulse = Pulse("127.0.0.1")
print(pulse.address, flush=True)
sys.stdin.readline()
ctypes.PyDLL(None).sleep(60)
"""


@pytest.fixture
def greedy() -> Iterator[tuple[subprocess.Popen[str], str]]:
    process = subprocess.Popen([sys.executable, "-c", GREEDY], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    yield process, process.stdout.readline().strip()
    process.kill()
    process.communicate()


def felt(pulses: Pulses, for_s: float = PATIENT_S) -> set[str]:
    """Whoever answers first."""
    deadline_s = time.monotonic() + for_s
    while not (heard := pulses.beat()) and time.monotonic() < deadline_s:
        time.sleep(0.02)
    return heard


def test_a_pulse_beats_though_the_interpreter_is_held_and_stops_with_the_process(
    greedy: tuple[subprocess.Popen[str], str],
) -> None:
    process, address = greedy
    pulses = Pulses()
    pulses.keep({"a": address})
    assert felt(pulses) == {"a"}
    assert process.stdin is not None
    process.stdin.write("\n")
    process.stdin.flush()
    time.sleep(0.5)
    pulses.beat()
    assert felt(pulses) == {"a"}, "it sleeps with the lock held"
    os.kill(process.pid, signal.SIGSTOP)
    time.sleep(0.2)
    pulses.beat()
    assert felt(pulses, 0.5) == set()
    os.kill(process.pid, signal.SIGCONT)
    assert felt(pulses) == {"a"}
    pulses.close()


def test_only_those_that_are_kept_are_felt() -> None:
    a, b, pulses = Pulse(HOST), Pulse(HOST), Pulses()
    pulses.keep({"a": a.address, "b": b.address})
    heard: set[str] = set()
    deadline_s = time.monotonic() + PATIENT_S
    while heard != {"a", "b"} and time.monotonic() < deadline_s:
        heard |= felt(pulses)
    assert heard == {"a", "b"}
    pulses.keep({"b": b.address})
    assert felt(pulses) == {"b"}
    for pulse in (a, b):
        pulse.close()
    pulses.close()
