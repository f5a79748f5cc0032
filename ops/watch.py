"""`octet status --watch`: the same page, drawn anew."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable

from rich.console import Console

from octet.resumption import CallError
from octet.v1 import octet_pb2 as pb

Show = Callable[[pb.GetStatusResponse, Console], None]


def watch(
    ask: Callable[[], pb.GetStatusResponse],
    every_s: float,
    show: Show,
    console: Console | None = None,
    pause: Callable[[float], object] = time.sleep,
) -> None:
    """Until Ctrl-C. A cluster that does not answer is told as such, and asked again: it may be on its way back."""
    console = console or Console(highlight=False)
    with contextlib.suppress(KeyboardInterrupt):
        while True:
            # Drawn first and shown at once, so that it does not flicker.
            with console.capture() as drawn:
                try:
                    show(ask(), console)
                except CallError as error:
                    console.print(f"octet: {error}", markup=False, highlight=False)
            console.clear()
            console.out(drawn.get(), end="", highlight=False)
            pause(every_s)
