"""NCCL's id, on its way from the rank that draws it to those that join it.

torch hands the id on by itself, through whatever store it is given, and believes what it finds there. So it gets one of
this process alone, and the id goes by the cluster's, signed.
"""

from __future__ import annotations

import contextlib
import datetime
import threading
from collections.abc import Iterator
from typing import Any

from torch._C._distributed_c10d import HashStore
from torch.distributed import DistError

from octet.errors import LaneTimeoutError
from router.group_store import GroupStore

KEY = "0"
"""Of a group's first communicator, in the store that torch is given."""
_DRAWS = 0
"""The rank that draws the id."""


@contextlib.contextmanager
def store_with_id(store: GroupStore, name: str, rank: int) -> Iterator[Any]:
    """The store (a `torch.distributed.Store`) to give to torch, whose first exchange happens within.

    Args:
        name: the same on every rank, and of no other group that is formed through `store`.

    Raises: LaneTimeoutError if no member says what the id is.
    """
    own: Any = HashStore()
    own.set_timeout(datetime.timedelta(seconds=store.timeout_s))
    if rank != _DRAWS:
        try:
            own.set(KEY, store.look_up(name, store.timeout_s))
        except (OSError, RuntimeError, DistError) as error:
            raise LaneTimeoutError(f"NCCL group {name}: rank {rank} was told no id: {error}") from None
        yield own
        return
    # It is drawn in the midst of the exchange, which then waits for those who are told.
    telling = threading.Thread(target=_tell, args=(own, store, name), name="nccl-id", daemon=True)
    telling.start()
    try:
        yield own
    finally:
        if not own.check([KEY]):
            own.set(KEY, b"")
        telling.join()


def _tell(own: Any, store: GroupStore, name: str) -> None:
    # Without an id, or a store, there is no group, and the exchange says so.
    with contextlib.suppress(RuntimeError, DistError):
        drawn = own.get(KEY)
        if drawn:
            store.publish(name, drawn)
