from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable

import pytest
import torch

from model import threads
from model.threads import in_parts, num_threads, set_num_threads


@pytest.fixture(autouse=True)
def three_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "_own", 3)


def test_every_part_is_computed_once() -> None:
    done: list[int] = []
    in_parts(lambda first, last: done.extend(range(first, last)), 1000, 2**40)
    assert sorted(done) == list(range(1000))


def test_threads_share_the_parts() -> None:
    met = threading.Barrier(3, timeout=30)

    def work(first: int, last: int) -> None:
        met.wait()

    in_parts(work, 3, 2**40)


def test_one_that_is_held_up_leaves_the_rest_to_the_others() -> None:
    done: dict[int, list[int]] = {}
    lock, caller, rest_done = threading.Lock(), threading.get_ident(), threading.Event()

    def work(first: int, last: int) -> None:
        with lock:
            is_first = threading.get_ident() not in done
            done.setdefault(threading.get_ident(), []).extend(range(first, last))
            num_done = sum(map(len, done.values()))
        if num_done == 12:
            rest_done.set()
        if threading.get_ident() != caller and is_first:
            rest_done.wait(30)
        time.sleep(0.001)

    in_parts(work, 12, 2**40)
    assert len(done[caller]) >= 12 - 2 - 1, "all but what each of two others began with"
    assert sorted(first for parts in done.values() for first in parts) == list(range(12))


def test_what_is_too_little_to_be_shared_is_one_part() -> None:
    parts = []
    in_parts(lambda first, last: parts.append((first, last)), 100, 1000)
    assert parts == [(0, 100)]


@pytest.mark.parametrize(("count", "least"), [(1000, 1), (1000, 40), (30, 3)])
def test_parts_shrink_to_the_least_that_is_worth_a_turn(count: int, least: int) -> None:
    parts: list[tuple[int, int]] = []
    in_parts(lambda first, last: parts.append((first, last)), count, threads._PART_OPERATIONS * count // least)
    parts.sort()
    assert [first for first, _ in parts] == [0, *(last for _, last in parts[:-1])]
    sizes = [last - first for first, last in parts]
    assert sizes[0] == max(count // 6, least)
    assert sizes == sorted(sizes, reverse=True)
    assert all(size >= least for size in sizes[:-1])
    assert sizes[-1] <= 2 * least


def test_parts_may_be_fewer() -> None:
    parts = []
    in_parts(lambda first, last: parts.append((first, last)), 100, 2**40, parts_per_thread=1)
    assert sorted(parts) == [(0, 33), (33, 66), (66, 100)]


@pytest.mark.parametrize("on_caller", [True, False])
def test_a_failure_on_any_thread_is_raised(on_caller: bool) -> None:
    met, caller = threading.Barrier(3, timeout=30), threading.get_ident()

    def work(first: int, last: int) -> None:
        # Each thread has a part, or one that is quick would have them all.
        met.wait()
        if (threading.get_ident() == caller) is on_caller:
            raise ValueError(f"{first} to {last}")

    with pytest.raises(ValueError, match=r"\d to \d"):
        in_parts(work, 3, 2**40)


def test_a_failure_is_raised_when_nobody_is_at_work_any_more() -> None:
    """Not before: others may still write to what the caller goes on with."""
    met, written = threading.Barrier(3, timeout=30), list[int]()

    def work(first: int, last: int) -> None:
        met.wait()
        if first == 2:
            time.sleep(0.1)
            written.append(first)
        else:
            raise ValueError("early")

    with pytest.raises(ValueError, match="early"):
        in_parts(work, 3, 2**40)
    assert written == [2]


def test_torch_keeps_one_thread_where_work_is_divided_here(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", told.append)
    for own in (True, False):
        set_num_threads(5, own=own)
        assert num_threads() == 5
    assert told == [1, 5]


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="of Linux")
def test_helpers_keep_off_the_core_of_whoever_calls_them(monkeypatch: pytest.MonkeyPatch) -> None:
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        pytest.skip("there is one core")
    apart, ready, done = threads.Apart(), threading.Event(), threading.Event()

    def help_out() -> None:
        apart.add()
        ready.set()
        done.wait(30)

    helper = threading.Thread(target=help_out)
    helper.start()
    try:
        assert ready.wait(30)
        for core in (cores[0], cores[-1]):
            monkeypatch.setattr(threads, "_core", always(core))
            apart.from_caller()
            assert os.sched_getaffinity(helper.native_id or 0) == set(cores) - {core}
        monkeypatch.setattr(threads, "_core", always(-1))
        apart.from_caller()
        assert os.sched_getaffinity(helper.native_id or 0) == set(cores[:-1]), "nothing is known: nothing changes"
    finally:
        done.set()
        helper.join()
    assert os.sched_getaffinity(0) == set(cores)


def always(core: int) -> Callable[[], int]:
    return lambda: core
