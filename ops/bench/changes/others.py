"""What of the cores went to processes that are not the bench's: whoever shares the machine makes gaps, too."""

from __future__ import annotations

import pathlib
from collections.abc import Collection

from ops.bench.processor_time import PROC, machine_s, process_s, stat_fields

_SESSION = 3
"""Its place in `stat_fields`."""


class Others:
    """Counts from when it is made. Belongs to one thread."""

    def __init__(self, own: Collection[int], proc: pathlib.Path = PROC) -> None:
        """
        Args:
            own: sessions whose processes are the bench's.
        """
        self._own, self._proc = frozenset(own), proc
        self._before_s = self._total_s()

    def taken_s(self) -> float:
        """Seconds of cores since then; to some hundredths, and 0 where the system does not tell."""
        return max(0.0, self._total_s() - self._before_s)

    def _total_s(self) -> float:
        """All that anybody has had of the cores, less what was ours."""
        try:
            return machine_s(self._proc) - sum(map(self._own_s, self._proc.glob("[0-9]*")))
        except OSError:
            return 0.0

    def _own_s(self, process: pathlib.Path) -> float:
        """Of a process, and of its children that have ended: those were ours before."""
        try:
            ours = int(stat_fields(process)[_SESSION]) in self._own
            return process_s(process, ended_children=True) if ours else 0.0
        except OSError:
            return 0.0
