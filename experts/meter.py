"""What a shard notes about each frame it serves."""

from __future__ import annotations

from octet.counters import FrameCounters


class FrameMeter:
    """Written by whoever has the turn, so that no lock is needed; read by anybody."""

    __slots__ = ("busy_s", "frames", "rows", "wait_s")

    def __init__(self) -> None:
        self.frames = self.rows = 0
        self.busy_s = self.wait_s = 0.0

    def note(self, rows: int, wait_s: float, busy_s: float) -> None:
        self.frames += 1
        self.rows += rows
        self.wait_s += wait_s
        self.busy_s += busy_s

    def read(self) -> FrameCounters:
        return FrameCounters(frames=self.frames, rows=self.rows, busy_s=self.busy_s, wait_s=self.wait_s)
