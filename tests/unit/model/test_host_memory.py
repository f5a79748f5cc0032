from __future__ import annotations

import pathlib
import random
import re
import subprocess
import sys

import pytest

from model.host_memory import StandingArrays

FAULTS = """
import ctypes, resource, sys, threading
import torch
from model.host_memory import keep_freed_memory

if not hasattr(ctypes.CDLL(None), "mallopt"):
    sys.exit("no glibc")
if sys.argv[1] == "keep":
    keep_freed_memory()

def steps():
    for step in range(50):
        if step == 40:
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
    """Of ten times eight tensors, 34 MiB in all, after forty times as many to begin with.

    Small blocks that malloc holds back can lie between the freed large ones, so that for a while a tensor finds no gap
    of its size. Where depends on all that was allocated before: with heaps of random small blocks, one of six had a
    tensor on new pages in the ten steps after the tenth, one of a thousand in the ten after the fortieth.
    """
    done = subprocess.run([sys.executable, "-c", FAULTS, mode], capture_output=True, text=True, timeout=120)
    if "no glibc" in done.stderr:
        pytest.skip("this system's C library is not glibc")
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


def test_freed_tensors_are_taken_again_without_new_pages() -> None:
    assert page_faults("keep") < page_faults("leave") / 10


def flags_at(address: int) -> list[str]:
    """Of the mapping that has this address."""
    here = False
    for line in pathlib.Path("/proc/self/smaps").read_text().splitlines():
        if (bounds := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line)) is not None:
            here = int(bounds[1], 16) <= address < int(bounds[2], 16)
        elif here and line.startswith("VmFlags:"):
            return line.split()[1:]
    return []


def test_standing_arrays_are_zeros_of_their_own_in_huge_pages() -> None:
    arrays = StandingArrays()
    shapes = [(random.randrange(1, 2000), random.randrange(1, 2000)) for _ in range(20)]
    made = [arrays.zeros(shape) for shape in [*shapes, (9000, 1000), (3, 5)]]
    for number, array in enumerate(made):
        assert not array.any()
        array[:] = number
    for number, array in enumerate(made):
        assert (array == number).all()
        assert array.ctypes.data % 64 == 0
        if pathlib.Path("/sys/kernel/mm/transparent_hugepage").exists():
            assert "hg" in flags_at(array.ctypes.data), "as asked for"
