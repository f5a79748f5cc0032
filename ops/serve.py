"""`octet serve`: start, say so, wait, stop cleanly."""

from __future__ import annotations

import concurrent.futures
import pathlib
import threading
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape

from octet.config import OctetConfig
from ops.stopping import stop_signals

if TYPE_CHECKING:
    from cluster.control.start_progress import StartProgress
    from cluster.launch import RunningCluster

_WATCH_EVERY_S = 0.5
_TAKE_BACK_EVERY_S = 0.02


class _StopAskedError(Exception):
    """Before the cluster served."""


def serve(config: OctetConfig) -> int:
    """Everything but signals is done in a thread of its own: in the main one, where Python handles them, Ray would put
    its own handlers in place of ours, and a handler that raises would do so in the midst of Ray's code.

    Returns: the exit code; 0 after SIGTERM or Ctrl-C, whether the cluster serves or still starts, 1 if it failed.

    Raises: OctetError if the cluster does not start.
    """
    stop, started = threading.Event(), threading.Event()
    result: concurrent.futures.Future[int] = concurrent.futures.Future()

    def work() -> None:
        try:
            result.set_result(_serve(config, stop, started))
        except BaseException as error:
            result.set_exception(error)
        finally:
            started.set()

    with stop_signals(stop) as take_back:
        # There until the end, since Ray's processes end with the thread that started them; nobody who leaves waits for
        # it.
        threading.Thread(target=work, name="serve", daemon=True).start()
        while not started.wait(_TAKE_BACK_EVERY_S):
            # Ray's native code takes SIGTERM for itself in whatever thread it starts, and does not say when.
            take_back()
        take_back()
        return result.result()


def _serve(config: OctetConfig, stop: threading.Event, started: threading.Event) -> int:
    """
    Args:
        stop: set when a stop is asked for.
        started: set here when the cluster is up.
    """
    console = Console(stderr=True)
    try:
        cluster = _start(config, stop, console)
    except _StopAskedError:
        console.print("octet: stopped before it served", highlight=False)
        return 0
    started.set()
    reason = ""
    if not stop.is_set():
        print(f"octet: ready grpc={cluster.address} {_describe(cluster)}", flush=True)
        reason = _wait(cluster, stop, console)
    if reason:
        console.print(f"[bold red]octet:[/] the cluster has failed: {escape(reason)}", highlight=False)
    else:
        console.print("octet: draining; live requests may end", highlight=False)
    cluster.stop(drain=not reason)
    console.print("octet: stopped", highlight=False)
    return 1 if reason else 0


def _start(config: OctetConfig, stop: threading.Event, console: Console) -> RunningCluster:
    """Raises: OctetError; _StopAskedError, with nothing left of what was started."""
    # It takes seconds to import them, in which a stop may be asked for.
    from cluster.launch import launch
    from ops.progress import StartDisplay

    with StartDisplay(console) as display:

        def report(progress: StartProgress) -> None:
            if stop.is_set():
                raise _StopAskedError
            display.show(progress)

        return launch(config, report)


def _describe(cluster: RunningCluster) -> str:
    plan, pools = cluster.plan, cluster.plan.config.pools
    return (
        f"model={pathlib.Path(plan.model_dir).name} prefill={pools.prefill.size} decode={pools.decode.size} "
        f"experts={pools.experts.size} context={plan.max_model_len}"
    )


def _wait(cluster: RunningCluster, stop: threading.Event, console: Console) -> str:
    """Until a stop is asked for (empty string), or the cluster has failed (the reason). Meanwhile, say how it fares."""
    told = ("READY", "")
    while not stop.wait(_WATCH_EVERY_S):
        state, reason = cluster.state()
        if state == "FAILED":
            return reason
        if (state, reason) != told:
            told = state, reason
            console.print(f"octet: {state}{': ' if reason else ''}{escape(reason)}", highlight=False)
    return ""
