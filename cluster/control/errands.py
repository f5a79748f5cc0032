"""What is asked of Ray's GCS by somebody who must not wait for it: while its host is gone, such calls do not return."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable

_log = logging.getLogger(__name__)

_ATTEMPTS = 5
"""An answer of the GCS may be lost as any other."""


class Errands:
    """Calls that are made one after the other, in a thread of their own, and again where they fail."""

    def __init__(self, patience_s: float = 0.25, retry_s: float = 1.0) -> None:
        """
        Args:
            patience_s: how long whoever asks waits for a call at most. None is waited for behind one that took longer.
            retry_s: between two attempts at a call.
        """
        self._patience_s, self._retry_s = patience_s, retry_s
        self._calls: queue.SimpleQueue[tuple[Callable[[], object], threading.Event]] = queue.SimpleQueue()
        self._last: threading.Event | None = None
        self._lock = threading.Lock()
        self._running = False

    def run(self, call: Callable[[], object]) -> bool:
        """Make a call once those before it are made, so that it may be made twice. What it raises in the end is logged.

        Returns: whether it is done by now.
        """
        done = threading.Event()
        with self._lock:
            behind = self._last is not None and not self._last.is_set()
            self._last = done
            self._calls.put((call, done))
            if not self._running:
                # Not before it is needed: what owns errands may be made in a process that is about to fork.
                self._running = True
                threading.Thread(target=self._make, name="errands", daemon=True).start()
        return done.wait(0.0 if behind else self._patience_s)

    def _make(self) -> None:
        while True:
            call, done = self._calls.get()
            for left in reversed(range(_ATTEMPTS)):
                try:
                    call()
                except Exception:
                    # Nobody waits any more who could be told.
                    _log.exception("a call of Ray's GCS failed; %d attempts are left", left)
                    time.sleep(self._retry_s if left else 0.0)
                else:
                    break
            done.set()
