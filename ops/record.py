"""`octet experts record`: a running cluster's telemetry, window by window, in a file that the simulator reads.

Shapes: `L` mixture-of-experts layers, `E` logical experts.
"""

from __future__ import annotations

import contextlib
import pathlib
import time
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.text import Text

from octet.client import Client
from octet.errors import UnavailableError
from octet.v1 import octet_pb2 as pb
from router.trace.files import TraceWriter
from router.trace.values import MEMBER_NUMBERS, MemberRecord, TraceHeader, TraceWindow


def record(client: Client, file: pathlib.Path, seconds: float, step_s: float, console: Console) -> None:
    """Write a window every `step_s` seconds, for so many seconds or until Ctrl-C. The last one ends when they are over.

    Raises: TraceError, CallError; UnavailableError if the cluster has no telemetry.
    """
    first = client.status()
    if not first.expert_counts:
        raise UnavailableError("the router service tells nothing: `octet status` says more")
    header = _header(client.model_info(), first)
    writer, num_windows = TraceWriter(file, header), 0
    with contextlib.closing(writer), contextlib.suppress(KeyboardInterrupt):
        for window in _windows(client, header, first, seconds, step_s, console):
            writer.add(window)
            num_windows += 1
            console.print(
                f"{window.t_s + window.duration_s:8.1f} s  {window.tokens / window.duration_s:10,.1f} tokens/s  "
                f"balancedness {window.balancedness:.3f}"
            )
    console.print(Text(f"{num_windows} windows are in {file}"))


def _windows(
    client: Client, header: TraceHeader, first: pb.GetStatusResponse, seconds: float, step_s: float, console: Console
) -> Iterator[TraceWindow]:
    start_s = begun_s = now_s = time.monotonic()
    before: pb.GetStatusResponse | None = first
    next_s, end_s = start_s + step_s, start_s + seconds
    while now_s < end_s:
        time.sleep(max(0.0, min(next_s, end_s) - time.monotonic()))
        now_s = time.monotonic()
        # A slow answer makes its window longer, and skips the steps that it took.
        next_s += step_s * max(1, -(-(now_s - next_s) // step_s))
        after = client.status(window_s=now_s - begun_s)
        if not after.expert_counts:
            # The next answer makes up for it, if there is one.
            if now_s >= end_s:
                left_out = f"{now_s - begun_s:.1f} s are left out: the router service tells nothing"
                console.print(f"{now_s - start_s:8.1f} s  {left_out}")
            continue
        if before is None or not _goes_on(before, after):
            left_out = f"{now_s - begun_s:.1f} s are left out: the router service counts anew"
            console.print(f"{now_s - start_s:8.1f} s  {left_out}")
            # What a shard has counted by its first answer is long past: the next window begins after all of them.
            before, begun_s = (after if _all_answered(after) else None), now_s
            continue
        yield window_between(before, after, header, begun_s - start_s, now_s - begun_s)
        before, begun_s = after, now_s


def window_between(
    before: pb.GetStatusResponse, after: pb.GetStatusResponse, header: TraceHeader, t_s: float, duration_s: float
) -> TraceWindow:
    """What happened between two answers. Loads are the difference of what was counted since the start, so that no row
    is lost or counted twice; shares of members are those of the window that the second answer covers."""
    loads_LE = (_total(after) - _total(before)).astype(np.float64)
    return TraceWindow(
        t_s=t_s,
        duration_s=duration_s,
        tokens=float(loads_LE.sum(1).max(initial=0)) / header.experts_per_token,
        balancedness=after.balancedness,
        loads_LE=loads_LE,
        members={
            member.worker_id: MemberRecord(**{number: getattr(member.load, number) for number in MEMBER_NUMBERS})
            for pool in after.pools
            for member in pool.members
            if member.HasField("load")
        },
    )


def _goes_on(before: pb.GetStatusResponse, after: pb.GetStatusResponse) -> bool:
    """Whether the same router service has counted on. Another one does not know what shards that left had counted."""
    same = before.telemetry_incarnation == after.telemetry_incarnation
    return same and bool((_total(after) >= _total(before)).all())


def _all_answered(status: pb.GetStatusResponse) -> bool:
    return all(member.HasField("load") for pool in status.pools if pool.name == "experts" for member in pool.members)


def _header(model: pb.GetModelInfoResponse, status: pb.GetStatusResponse) -> TraceHeader:
    return TraceHeader(
        model=model.model,
        layers=tuple(counts.layer for counts in status.expert_counts),
        num_experts=model.num_experts,
        experts_per_token=model.num_experts_per_tok,
    )


def _total(status: pb.GetStatusResponse) -> npt.NDArray[np.int64]:
    return np.array([counts.tokens for counts in status.expert_counts], dtype=np.int64)
