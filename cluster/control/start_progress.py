"""How far the start of a cluster is."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from cluster.control.pools import Member, call_all
from model.load_progress import LoadSnapshot
from octet.errors import UnavailableError
from octet.ids import WorkerId

LOADING = "loading weights"
_ANSWER_S = 10.0


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class StartProgress:
    """Where the start is."""

    phase: str
    loading: Mapping[WorkerId, LoadSnapshot] = dataclasses.field(default_factory=dict)


async def start_progress(phase: str, starting: Sequence[Member]) -> StartProgress:
    """With what members that load have to tell; one that is too busy to tell is no reason to give the start up, and one
    that is gone fails its `load`."""
    if phase != LOADING:
        return StartProgress(phase=phase)
    try:
        snapshots = await call_all([(m, m.actor.progress.remote()) for m in starting], _ANSWER_S)
    except UnavailableError:
        return StartProgress(phase=phase)
    return StartProgress(phase=phase, loading={m.worker_id: s for m, s in zip(starting, snapshots, strict=True)})
