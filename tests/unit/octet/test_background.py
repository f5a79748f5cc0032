from __future__ import annotations

import os
import subprocess
import sys
import threading

import pytest

from octet.background import step_back

pytestmark = pytest.mark.skipif(not hasattr(os, "getpriority"), reason="this system has no niceness")


def own() -> int:
    return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())


def test_a_thread_steps_back_with_those_that_it_starts_and_no_other() -> None:
    before, found = own(), []

    def run(niceness: int) -> None:
        step_back(niceness)
        child = threading.Thread(target=lambda: found.append(own()))
        child.start()
        child.join()
        found.append(own())

    for niceness in (3, 0, 99):
        thread = threading.Thread(target=run, args=(niceness,))
        thread.start()
        thread.join()
    assert found == [min(before + 3, 19)] * 2 + [before] * 2 + [19] * 2
    assert own() == before


@pytest.mark.skipif(not hasattr(os, "SCHED_IDLE"), reason="of Linux")
def test_a_process_gives_way_in_all_its_threads() -> None:
    script = """
import os, threading
from octet.background import give_way
done = threading.Event()
other = threading.Thread(target=done.wait)
other.start()
give_way()
print([os.sched_getscheduler(thread) == os.SCHED_IDLE for thread in (0, other.native_id)])
done.set()
"""
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "[True, True]"
