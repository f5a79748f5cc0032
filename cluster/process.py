"""Facts about the process that a member runs in."""

from __future__ import annotations

import os
import pathlib


def resident_bytes() -> int:
    """Resident memory of this process."""
    pages = int(pathlib.Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")
