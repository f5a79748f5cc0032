"""Memory of a process on the host: where large arrays are, and what becomes of memory that is given back."""

from __future__ import annotations

import contextlib
import ctypes
import logging
import math
import mmap

import numpy as np
import numpy.typing as npt

_log = logging.getLogger(__name__)

_TRIM_THRESHOLD, _MMAP_THRESHOLD, _ARENA_MAX = -1, -3, -8
"""Of glibc's `malloc.h`."""
_MAPPED_BYTES = 32 * 2**20
"""The most that glibc takes."""
_KEPT_BYTES = 2**30
_PIECE_BYTES = 32 * 2**20
_LINE_BYTES = 64


def map_pages(num_bytes: int) -> mmap.mmap:
    """Zeros that take no memory until they are written; in huge pages, if the system has them for who asks: a stream
    of weights runs through fewer translations, and is fetched ahead without a break every 4 KiB."""
    pages = mmap.mmap(-1, max(1, num_bytes), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        # A kernel may be built without them.
        with contextlib.suppress(OSError):
            pages.madvise(mmap.MADV_HUGEPAGE)
    return pages


class StandingArrays:
    """Makes arrays that stay, one behind the other: most are smaller than a huge page."""

    def __init__(self) -> None:
        self._piece, self._used = map_pages(_PIECE_BYTES), 0

    def zeros(self, shape: tuple[int, ...]) -> npt.NDArray[np.float32]:
        """Beginning with a cache line."""
        size = math.prod(shape)
        begin = -(-self._used // _LINE_BYTES) * _LINE_BYTES
        if begin + 4 * size > len(self._piece):
            self._piece, begin = map_pages(max(_PIECE_BYTES, 4 * size)), 0
        self._used = begin + 4 * size
        return np.frombuffer(self._piece, np.float32, size, begin).reshape(shape)


def keep_freed_memory() -> None:
    """Let freed memory stay this process's, in one place, for the tensors of the next step.

    By itself glibc maps large tensors anew each time, and the system clears their pages at the first touch: 6% of the
    time of two cores that computed prompts. Blocks of 32 MiB and more, as weights and caches are, are still given back.
    Elsewhere than with glibc this does nothing.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError) as error:
        _log.debug("this system's memory is left as it is: %s", error)
        return
    # A thread with an arena of its own would have it unmapped as soon as it is empty.
    for option, value in ((_MMAP_THRESHOLD, _MAPPED_BYTES), (_TRIM_THRESHOLD, _KEPT_BYTES), (_ARENA_MAX, 1)):
        if mallopt(option, value) == 0:
            _log.debug("malloc takes no option %d of %d", option, value)
