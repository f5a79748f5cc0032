"""What the rendering of a chat template has used, in bytes and in time."""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from typing import Any

import jinja2.runtime
import jinja2.utils

STEP_BYTES = 64
"""What a turn, a call or a piece of output takes beside its contents, about."""
_MAX_SECONDS = 2.0
_MAX_BYTES = 256 * 2**20
_MAX_BYTES_AT_ONCE = 4 * 2**20

_HOLDERS = (jinja2.utils.Namespace, jinja2.utils.Cycler, jinja2.utils.Joiner, jinja2.runtime.LoopContext)
"""What they hold may be changed, or is not seen from outside; in a list it could be repeated without being counted."""
_VIEWS: tuple[type, ...] = (type({}.keys()), type({}.values()), type({}.items()))

_active = threading.local()


class TemplateLimitError(Exception):
    """Says what the template does, as the end of a sentence that begins with it."""


class Meter:
    """What one rendering has used."""

    def __init__(self, input_bytes: int) -> None:
        """
        Args:
            input_bytes: of the conversation; a long one may take more.
        """
        self.largest = _MAX_BYTES_AT_ONCE + 4 * input_bytes
        self._left = _MAX_BYTES + 64 * input_bytes
        self._started_s = time.thread_time()
        self._until_s = time.monotonic() + _MAX_SECONDS
        self._known: dict[int, tuple[object, int, int]] = {}

    def charge(self, num_bytes: int) -> None:
        """A step that makes so much. Raises: TemplateLimitError."""
        self._left -= num_bytes
        if num_bytes > self.largest:
            raise TemplateLimitError(f"makes {num_bytes} bytes at once, of at most {self.largest}")
        if self._left < 0:
            raise TemplateLimitError("makes more than it may: 256 MiB, and 64 times the conversation")
        if time.monotonic() > self._until_s:
            self._check_time()

    def size(self, value: Any) -> int:
        """Bytes of a value as if nothing in it were shared, about. Raises: TemplateLimitError if that is too much."""
        return self.measure(value)[0]

    def measure(self, value: Any, inside: bool = False) -> tuple[int, int]:
        """Bytes and depth. Containers never change: the sandbox sees to it."""
        if isinstance(value, str | bytes):
            return sys.getsizeof(value) - 32, 0
        if isinstance(value, int):
            return value.bit_length() // 2 + 8, 0
        if isinstance(value, dict | list | tuple | set | frozenset):
            known = self._known.get(id(value))
            if known is None:
                parts = (part for item in value.items() for part in item) if isinstance(value, dict) else value
                size, depth = self._sum(parts)
                known = self.note(value, size, depth)
            return known[1:]
        if isinstance(value, _VIEWS):
            mapping: Any = value.mapping  # type: ignore[attr-defined]
            return self._sum(part for item in mapping.items() for part in item)
        if inside and isinstance(value, _HOLDERS):
            raise TemplateLimitError(f"puts a {type(value).__name__} into a list, which is not allowed here")
        return STEP_BYTES, 0

    def check(self, size: int) -> None:
        """Raises: TemplateLimitError if no value may be as large."""
        if size > self.largest:
            raise TemplateLimitError(f"makes a value of more than {self.largest} bytes")

    def note(self, value: object, size: int, depth: int) -> tuple[object, int, int]:
        self.check(size)
        # It stays alive here, so its id stays its own.
        self._known[id(value)] = known = (value, size, depth)
        return known

    def _sum(self, parts: Iterable[Any]) -> tuple[int, int]:
        size, deepest = STEP_BYTES, 0
        for part in parts:
            more, depth = self.measure(part, inside=True)
            size, deepest = size + more + 8, max(deepest, depth)
            self.check(size)
        return size, deepest + 1

    def _check_time(self) -> None:
        # A process that was stopped, or waits for a core, has not used its time.
        used_s = time.thread_time() - self._started_s
        if used_s >= _MAX_SECONDS:
            raise TemplateLimitError(f"takes more than {_MAX_SECONDS:g} s of a processor")
        self._until_s = time.monotonic() + _MAX_SECONDS - used_s


@contextlib.contextmanager
def metered(input_bytes: int) -> Iterator[None]:
    """Everything that a `BoundedEnvironment` does in this thread meanwhile is counted."""
    _active.meter = Meter(input_bytes)
    try:
        yield
    finally:
        del _active.meter


def active_meter() -> Meter:
    """That of this thread's rendering."""
    meter: Meter = _active.meter
    return meter
