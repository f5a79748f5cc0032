"""What of the cores went to processes that are not the bench's: whoever shares the machine makes gaps, too."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Collection

_TICKS_PER_S = os.sysconf("SC_CLK_TCK")


class Others:
    """Counts from when it is made. Belongs to one thread."""

    def __init__(self, own: Collection[int], proc: pathlib.Path = pathlib.Path("/proc")) -> None:
        """
        Args:
            own: sessions whose processes are the bench's.
        """
        self._own, self._proc = frozenset(own), proc
        self._before = self._ticks()

    def taken_s(self) -> float:
        """Seconds of cores since then; to some hundredths, and 0 where the system does not tell."""
        return max(0, self._ticks() - self._before) / _TICKS_PER_S

    def _ticks(self) -> int:
        """All that any process has had of the cores, less what was ours."""
        try:
            first = (self._proc / "stat").read_text().partition("\n")[0]
        except OSError:
            return 0
        user, nice, system, _idle, _waiting, *rest = (int(field) for field in first.split()[1:9])
        return user + nice + system + sum(rest) - sum(self._own_ticks(path) for path in self._proc.glob("[0-9]*/stat"))

    def _own_ticks(self, path: pathlib.Path) -> int:
        """Of a process, and of its children that have ended: those were ours before."""
        try:
            # Its name may have anything in it.
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:
            return 0
        return sum(int(field) for field in fields[11:15]) if int(fields[3]) in self._own else 0
