"""A time of day that jumps, for the processes of a cluster and not for the harness. Takes a C compiler."""

from __future__ import annotations

import pathlib
import shutil
import struct
import subprocess
import sys
import time

_SOURCE = pathlib.Path(__file__).with_suffix(".c")
_COMPILE_S = 60.0


def why_no_wall_clock() -> str:
    """Why no time of day can jump here; empty where it can."""
    if not sys.platform.startswith("linux"):
        return f"the clock is replaced on Linux only, and this is {sys.platform}"
    return "" if shutil.which("cc") else "there is no C compiler (cc) here"


class WallClock:
    """The time of day of the Python processes that are started with `env`; their other clocks go on as they are.

    Of Ray's own code only what is written in Python is told the time that is off; see `wall_clock.c`.
    """

    def __init__(self, directory: pathlib.Path) -> None:
        """
        Args:
            directory: to be there as long as those processes.

        Raises: CalledProcessError if it cannot be compiled.
        """
        self._file, self._library = directory / "wall_clock", directory / "wall_clock.so"
        command = ["cc", "-O2", "-shared", "-fPIC", "-o", str(self._library), str(_SOURCE), "-ldl"]
        subprocess.run(command, check=True, timeout=_COMPILE_S, capture_output=True)
        self._jumps: list[tuple[float, float]] = []
        self.jump(0)

    @property
    def off_s(self) -> float:
        """How far it is from the right time."""
        return self._jumps[-1][1]

    def jump(self, off_s: float) -> None:
        """So far from the right time, from now on."""
        self._jumps.append((time.time(), off_s))
        # In place, and at once: processes have it mapped.
        with self._file.open("r+b" if self._file.exists() else "wb", buffering=0) as file:
            file.write(struct.pack("=q", round(off_s * 1e9)))

    def followers(self) -> list[int]:
        """Pids of the processes that are told its time."""
        return [int(entry.name) for entry in pathlib.Path("/proc").iterdir() if self._is_told(entry)]

    def right_s(self, told_s: float) -> float:
        """When it was, by the right time, that one of those processes says so: some time between two jumps."""
        ends = [*(at_s for at_s, _ in self._jumps[1:]), time.time()]
        for (begin_s, off_s), end_s in reversed(list(zip(self._jumps, ends, strict=True))):
            if begin_s <= told_s - off_s <= end_s:
                return told_s - off_s
        return told_s

    def _is_told(self, entry: pathlib.Path) -> bool:
        try:
            return entry.name.isdigit() and f" {self._file}\n" in (entry / "maps").read_text(errors="replace")
        except OSError:
            # It has just ended.
            return False

    @property
    def env(self) -> dict[str, str]:
        return {"LD_PRELOAD": str(self._library), "OCTET_WALL_CLOCK": str(self._file)}
