"""`octet serve`: start, say so, wait, stop cleanly."""

from __future__ import annotations

import contextlib
import pathlib
import signal
import threading
from collections.abc import Iterator

from rich.console import Console
from rich.markup import escape

from cluster.launch import RunningCluster, launch
from octet.config import OctetConfig
from ops.progress import StartDisplay

_WATCH_EVERY_S = 0.5


def serve(config: OctetConfig) -> int:
    """Returns: the exit code; 0 after SIGTERM or Ctrl-C, 1 if the cluster failed.

    Raises: OctetError if the cluster does not start.
    """
    console = Console(stderr=True)
    with _stop_signals() as stop:
        with StartDisplay(console) as display:
            cluster = launch(config, display.show)
        # Ray installs handlers of its own when it starts.
        with _stop_signals(stop):
            print(f"octet: ready grpc={cluster.address} {_describe(cluster)}", flush=True)
            reason = _wait(cluster, stop)
            if reason:
                console.print(f"[bold red]octet:[/] the cluster has failed: {escape(reason)}", highlight=False)
            else:
                console.print("octet: draining; live requests may end", highlight=False)
            cluster.stop(drain=not reason)
    console.print("octet: stopped", highlight=False)
    return 1 if reason else 0


def _describe(cluster: RunningCluster) -> str:
    plan, pools = cluster.plan, cluster.plan.config.pools
    return (
        f"model={pathlib.Path(plan.model_dir).name} prefill={pools.prefill.size} decode={pools.decode.size} "
        f"experts={pools.experts.size} context={plan.max_model_len}"
    )


def _wait(cluster: RunningCluster, stop: threading.Event) -> str:
    """Until a stop is asked for (empty string), or the cluster has failed (the reason)."""
    while not stop.wait(_WATCH_EVERY_S):
        state, reason = cluster.state()
        if state == "FAILED":
            return reason
    return ""


@contextlib.contextmanager
def _stop_signals(stop: threading.Event | None = None) -> Iterator[threading.Event]:
    """SIGTERM and SIGINT set the event instead of ending the process; a second SIGINT interrupts as usual."""
    event = stop or threading.Event()

    def handle(number: int, frame: object) -> None:
        if event.is_set() and number == signal.SIGINT:
            raise KeyboardInterrupt
        event.set()

    before = {number: signal.signal(number, handle) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield event
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
