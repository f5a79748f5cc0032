from __future__ import annotations

import os
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
