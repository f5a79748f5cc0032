"""A full disk and a limit of memory, each on a Ray of its own: streams go on to the right tokens."""

from __future__ import annotations

import os
import pathlib
import signal
from collections.abc import Mapping, Sequence

import pytest

from octet.client import Client
from ops.chaos.resources import filled, may_limit_memory, memory_limit, small_disk
from tests.alone import serving
from tests.clusters import Traffic, members, settled, wait_until

pytestmark = [pytest.mark.long, pytest.mark.timeout(300)]
Answers = Mapping[tuple[int, ...], Sequence[int]]
SIZES = ("--prefill", "2", "--decode", "2", "--experts", "3", "--set", "kv.memory_gib=0.05")
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")


@needs_root
def test_a_full_disk_takes_nothing_from_the_streams_and_is_told(
    tmp_path: pathlib.Path, checkpoint: pathlib.Path, answers: Answers
) -> None:
    """Ray's session and logs are on it, and what the frontend writes down of every token."""
    with small_disk(48) as disk:
        audit = disk / "audit"
        with (
            serving(
                tmp_path / "serve.log",
                *(*SIZES, "--set", f"chaos.audit_dir={audit}", str(checkpoint)),
                env={"RAY_TMPDIR": str(disk)},
            ) as address,
            Client(address, timeout_s=60) as client,
            Traffic(address, answers, num_users=3) as traffic,
        ):
            traffic.flow()
            with filled(disk):
                traffic.flow()
                lost, victim = next(iter(members(client.status(), "decode").items()))
                os.kill(victim.pid, signal.SIGKILL)
                wait_until(lambda: lost not in members(client.status(), "decode"), 60, "the loss is dealt with")
                traffic.flow()
                traffic.flow()
            wait_until(lambda: settled(client, decode=2), 120, "with room on the disk, it is replaced")
            traffic.flow()
            (log,) = audit.glob("*.jsonl")
            size = log.stat().st_size
            traffic.flow()
            assert log.stat().st_size == size, "what was given up is not begun again in the middle"
            told = [path for path in disk.rglob("*") if path.is_file() and "not written down" in _text(path)]
            assert told, "the log says that no more is written down"


def _text(path: pathlib.Path) -> str:
    return path.read_text(errors="replace") if path.suffix in (".log", ".err", ".out") else ""


@needs_root
@pytest.mark.skipif(not may_limit_memory(), reason="needs the memory control group, version 1")
@pytest.mark.parametrize("pool", ["decode", "experts"])
def test_a_member_over_its_limit_of_memory_is_killed_and_costs_no_token(
    tmp_path: pathlib.Path, checkpoint: pathlib.Path, answers: Answers, pool: str
) -> None:
    with (
        serving(tmp_path / "serve.log", *SIZES, str(checkpoint)) as address,
        Client(address, timeout_s=60) as client,
        Traffic(address, answers, num_users=3) as traffic,
    ):
        traffic.flow()
        lost, victim = next(iter(members(client.status(), pool).items()))
        with memory_limit(victim.pid, kib=64) as limit:
            wait_until(lambda: lost not in members(client.status(), pool), 90, "it is killed, and done without")
            assert limit.num_killed == 1
        sizes = {"decode": 2, "experts": 3}
        wait_until(lambda: settled(client, **{pool: sizes[pool]}), 120, "it is replaced")
        traffic.flow()
