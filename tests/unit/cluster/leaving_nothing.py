"""Objects that have to be gone with whatever made them."""

from __future__ import annotations

import contextlib
import gc
import time
import weakref
from collections.abc import Iterator

import pytest

_LOOK_AGAIN_S = 0.1


@contextlib.contextmanager
def nothing_left_of(*types: type, within_s: float = 5.0) -> Iterator[None]:
    """What is made meanwhile of these types is gone after it, soon. What was there before is not asked about: other
    tests of the process may keep it, or it may wait to be collected."""
    before = weakref.WeakSet(_found(types))
    yield
    deadline_s = time.monotonic() + within_s
    while left := [found for found in _found(types) if found not in before]:
        if time.monotonic() >= deadline_s:
            pytest.fail(f"{len(left)} objects are left: " + "; ".join(_holders(left)))
        # This list must not be what keeps them.
        del left
        time.sleep(_LOOK_AGAIN_S)


def _found(types: tuple[type, ...]) -> list[object]:
    gc.collect()
    return [found for found in gc.get_objects() if type(found) in types]


def _holders(left: list[object]) -> list[str]:
    told = []
    for item in left:
        holders = [holder for holder in gc.get_referrers(item) if holder is not left]
        told.append(f"{type(item).__name__}, held by " + ", ".join(sorted({_named(holder) for holder in holders})))
    return told


def _named(holder: object) -> str:
    """Its type; of a namespace, whose it is."""
    owners = [owner for owner in gc.get_referrers(holder) if getattr(owner, "__dict__", None) is holder]
    return type(owners[0]).__name__ if owners else type(holder).__name__
