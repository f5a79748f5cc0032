"""How commands that run until they are stopped hear of it."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def stop_signals(stop: threading.Event) -> Iterator[Callable[[], None]]:
    """SIGTERM and SIGINT set the event instead of ending the process; a second SIGINT interrupts as usual.

    Yields: what makes it so again, where others have set handlers.
    """

    def handle(number: int, frame: object) -> None:
        if stop.is_set() and number == signal.SIGINT:
            raise KeyboardInterrupt
        stop.set()

    def take_back() -> None:
        for number in before:
            signal.signal(number, handle)

    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    take_back()
    try:
        yield take_back
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
