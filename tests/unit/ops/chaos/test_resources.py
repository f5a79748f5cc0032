"""Resources that run out, for small processes: what the harness does to a cluster's."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys

import pytest

from ops.chaos.resources import filled, may_limit_memory, memory_limit, small_disk

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")


@needs_root
def test_a_small_disk_is_full_as_long_as_it_is_meant_to_be() -> None:
    with small_disk(2) as disk:
        file = disk / "log"
        file.write_bytes(b"x" * 1000)
        with filled(disk):
            with pytest.raises(OSError, match="No space left") as caught:
                (disk / "other").write_bytes(b"x" * 5000)
            assert caught.value.errno == errno.ENOSPC
        (disk / "other").write_bytes(b"x" * 5000)
    assert not disk.exists()


_GROW = """
import sys
sys.stdin.readline()
held = []
for _ in range(64):
    held.append(bytearray(b"x" * 2**20))
print("grown")
"""


@needs_root
@pytest.mark.skipif(not may_limit_memory(), reason="needs the memory control group, version 1")
@pytest.mark.parametrize(("kib", "killed"), [(4 * 2**10, 1), (256 * 2**10, 0)])
def test_a_process_over_its_limit_of_memory_is_killed(kib: int, killed: int) -> None:
    with subprocess.Popen([sys.executable, "-c", _GROW], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        with memory_limit(process.pid, kib) as limit:
            told, _ = process.communicate(b"\n", timeout=30)
            assert limit.num_killed == killed
        assert process.returncode == (-signal.SIGKILL if killed else 0)
        assert (b"grown" in told) == (not killed)
    assert not limit.directory.exists()
