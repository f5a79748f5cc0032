"""What the C library does with memory that is given back."""

from __future__ import annotations

import ctypes
import logging

_log = logging.getLogger(__name__)

_TRIM_THRESHOLD, _MMAP_THRESHOLD, _ARENA_MAX = -1, -3, -8
"""Of glibc's `malloc.h`."""
_MAPPED_BYTES = 32 * 2**20
"""The most that glibc takes."""
_KEPT_BYTES = 2**30


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
