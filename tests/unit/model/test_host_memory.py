from __future__ import annotations

import subprocess
import sys

import pytest

FAULTS = """
import ctypes, resource, sys, threading
import torch
from model.host_memory import keep_freed_memory

if not hasattr(ctypes.CDLL(None), "mallopt"):
    sys.exit("no glibc")
if sys.argv[1] == "keep":
    keep_freed_memory()

def steps():
    for step in range(20):
        if step == 10:
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        alive = [torch.empty(size * 2**18).fill_(step) for size in (3, 7, 1, 6, 2, 7, 3, 5)]
        while alive:
            alive.pop()
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)

# As an engine does, in a thread that is not the first.
thread = threading.Thread(target=steps)
thread.start()
thread.join()
"""


def page_faults(mode: str) -> int:
    """Of ten times eight tensors, 34 MiB in all, after as many to begin with."""
    done = subprocess.run([sys.executable, "-c", FAULTS, mode], capture_output=True, text=True, timeout=120)
    if "no glibc" in done.stderr:
        pytest.skip("this system's C library is not glibc")
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


def test_freed_tensors_are_taken_again_without_new_pages() -> None:
    # Of some hundred runs, one took 24 MiB anew within a step, for a reason that is not known.
    left_alone, kept = page_faults("leave"), min(page_faults("keep") for _ in range(2))
    assert kept < left_alone / 100
