"""The choice of workers: a pure function of what the frontend knows."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Sequence

from octet.ids import WorkerId


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class PrefillView:
    """A prefill worker: tokens that it was sent and has not answered yet."""

    worker_id: WorkerId
    queued_tokens: int
    cached_tokens: int = 0
    """Of the request at hand: the prefix that this worker probably has in its cache."""

    @property
    def advantage(self) -> int:
        """What the cached prefix saves, less what is queued in front: the larger, the sooner the first token."""
        return self.cached_tokens - self.queued_tokens


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class DecodeView:
    """A decode worker: pages that its last report called free, and those promised to requests on the way to it."""

    worker_id: WorkerId
    free_pages: int
    promised_pages: int
    live_sequences: int


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Assignment:
    prefill: WorkerId
    decode: WorkerId
    reason: str


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Wait:
    """No worker may take it now."""

    reason: str


def schedule(
    prefill: Sequence[PrefillView], decode: Sequence[DecodeView], avoid: Collection[WorkerId] = ()
) -> Assignment | Wait:
    """The prefill worker with the least work before the first token, the decode worker with the most pages to spare.

    The work is what is queued and the part of the prompt that is not cached, so the longest prefix wins unless the
    queue in front of it is worse.

    Ties go to the smaller batch, then to the lower worker id, so that the same state gives the same decision.

    Args:
        avoid: workers that could not go on with this request; it waits where there is no other.
    """
    missing = [name for name, views in (("prefill", prefill), ("decode", decode)) if not views]
    if missing:
        return Wait(reason=f"no {missing[0]} worker is there")
    sources = [view for view in prefill if view.worker_id not in avoid]
    targets = [view for view in decode if view.worker_id not in avoid]
    if not sources or not targets:
        pool = "prefill" if not sources else "decode"
        return Wait(reason=f"every {pool} worker has failed it: {', '.join(sorted(avoid))}")
    source = min(sources, key=lambda view: (-view.advantage, view.worker_id))
    target = min(
        targets,
        key=lambda view: (view.promised_pages - view.free_pages, view.live_sequences, view.worker_id),
    )
    return Assignment(
        prefill=source.worker_id,
        decode=target.worker_id,
        reason=(
            f"{source.worker_id} has {source.queued_tokens} tokens queued, "
            f"{source.cached_tokens} of the prompt cached; "
            f"{target.worker_id} has {target.free_pages - target.promised_pages} pages to spare"
        ),
    )
