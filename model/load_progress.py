"""How far the loading of tensors is. Without torch, since those who only ask for it do without."""

from __future__ import annotations

import dataclasses
import threading


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class LoadSnapshot:
    """How far a load is. Bytes are counted as the checkpoint stores them."""

    tensors_done: int
    tensors_total: int
    bytes_done: int
    bytes_total: int
    elapsed_s: float
    rate_bytes_s: float
    """Mean since the start; 0 while nothing is known."""
    eta_s: float | None
    """Seconds to go at that rate; none while it is unknown."""


class LoadProgress:
    """Counts what `Checkpoint.read` does, over any number of reads and threads, for another thread to look at."""

    def __init__(self, started_s: float) -> None:
        """
        Args:
            started_s: the time on the clock that `snapshot` is asked with.
        """
        self._started_s = started_s
        self._lock = threading.Lock()
        self._tensors_done = self._tensors_total = self._bytes_done = self._bytes_total = 0

    def expect(self, num_tensors: int, num_bytes: int) -> None:
        """Add to the totals."""
        with self._lock:
            self._tensors_total += num_tensors
            self._bytes_total += num_bytes

    def advance(self, num_tensors: int, num_bytes: int) -> None:
        """Add to what is done."""
        with self._lock:
            self._tensors_done += num_tensors
            self._bytes_done += num_bytes

    def snapshot(self, now_s: float) -> LoadSnapshot:
        """All counts at one moment. Rate and estimate are means since the start."""
        with self._lock:
            elapsed_s = max(now_s - self._started_s, 0.0)
            rate_bytes_s = self._bytes_done / elapsed_s if elapsed_s > 0 else 0.0
            left_bytes = self._bytes_total - self._bytes_done
            return LoadSnapshot(
                tensors_done=self._tensors_done,
                tensors_total=self._tensors_total,
                bytes_done=self._bytes_done,
                bytes_total=self._bytes_total,
                elapsed_s=elapsed_s,
                rate_bytes_s=rate_bytes_s,
                eta_s=left_bytes / rate_bytes_s if rate_bytes_s > 0 else None,
            )
