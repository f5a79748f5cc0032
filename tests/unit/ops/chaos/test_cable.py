"""What is done to the cable between two hosts: packets vanish or take their time, and nothing is left of it."""

from __future__ import annotations

import pathlib
import socket
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

from ops.chaos.cable import ADDRESSES, Cable, Host, Way, cable, why_not

pytestmark = pytest.mark.skipif(bool(why_not()), reason=why_not())
_PORT, _PATIENCE_S = 4000, 0.3
_PACKET = b"x" * 1000


@pytest.fixture(scope="module")
def laid() -> Iterator[Cable]:
    with cable() as laid:
        yield laid


@pytest.fixture
def ends(laid: Cable) -> Iterator[dict[Host, socket.socket]]:
    ends = {}
    for host in ADDRESSES:
        with laid.here(host):
            ends[host] = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
            ends[host].bind((ADDRESSES[host], _PORT))
            ends[host].settimeout(_PATIENCE_S)
    yield ends
    for end in ends.values():
        end.close()
    laid.mend()


def carried(ends: dict[Host, socket.socket], sender: Host, receiver: Host) -> float | None:
    """How long a packet took; None if it did not come."""
    sent_s = time.monotonic()
    ends[sender].sendto(_PACKET, (ADDRESSES[receiver], _PORT))
    try:
        ends[receiver].recv(2000)
    except TimeoutError:
        return None
    return time.monotonic() - sent_s


@pytest.mark.parametrize(
    ("way", "to_far", "from_far"), [("both", False, False), ("to far", False, True), ("from far", True, False)]
)
def test_a_cut_lets_packets_of_one_way_or_both_vanish_until_it_is_mended(
    laid: Cable, ends: dict[Host, socket.socket], way: Way, to_far: bool, from_far: bool
) -> None:
    laid.cut(way)
    assert (carried(ends, "near", "far") is not None) == to_far
    assert (carried(ends, "far", "near") is not None) == from_far
    laid.mend()
    assert carried(ends, "near", "far") is not None
    assert carried(ends, "far", "near") is not None


def test_a_delay_is_that_of_each_direction(laid: Cable, ends: dict[Host, socket.socket]) -> None:
    laid.delay(0.05)
    for sender, receiver in (("near", "far"), ("far", "near")):
        took_s = carried(ends, sender, receiver)  # type: ignore[arg-type]
        assert took_s is not None
        assert 0.05 <= took_s < _PATIENCE_S
    laid.mend()
    assert (carried(ends, "near", "far") or 1.0) < 0.05


def test_a_throttled_cable_carries_no_more_than_its_rate(laid: Cable, ends: dict[Host, socket.socket]) -> None:
    laid.throttle(1.0)
    begin_s, num_packets = time.monotonic(), 40
    for _ in range(num_packets):
        ends["near"].sendto(_PACKET, (ADDRESSES["far"], _PORT))
    received = 0
    while received < num_packets:
        received += len(ends["far"].recv(2000)) // len(_PACKET)
    # 320,000 bits, less what goes at once.
    assert time.monotonic() - begin_s > 0.15


def test_nothing_is_left_also_after_a_failure() -> None:
    # Another process, as names are those of a process.
    failing = (
        "import os, subprocess\n"
        "from ops.chaos.cable import cable\n"
        "with cable() as laid:\n"
        "    child = subprocess.Popen([*laid.command('far'), 'sleep', '60'])\n"
        "    laid.delay(0.01)\n"
        "    print(os.getpid(), child.pid, flush=True)\n"
        "    raise RuntimeError('on purpose')\n"
    )
    done = subprocess.run([sys.executable, "-c", failing], capture_output=True, text=True, timeout=60, check=False)
    assert "on purpose" in done.stderr
    pid, child = done.stdout.split()
    assert not pathlib.Path(f"/proc/{child}").exists()
    assert [path.name for path in pathlib.Path("/run/netns").iterdir() if pid in path.name] == []
