"""What is broken between members that live: lanes and KV channels, which are formed anew."""

from __future__ import annotations

import logging
from collections.abc import Callable, Coroutine
from typing import Any

from cluster.control.changes import Changes
from cluster.control.membership import Membership
from octet.errors import OctetError
from octet.ids import WorkerId

_log = logging.getLogger(__name__)


class Mending:
    """Belongs to the controller's event loop. Whoever finds something broken may say so over and over."""

    def __init__(
        self,
        membership: Membership,
        changes: Callable[[], Changes],
        losses: Callable[[], str],
        spawn: Callable[[Coroutine[Any, Any, None]], None],
    ) -> None:
        """
        Args:
            losses: who is lost and not dealt with yet, which comes first and forms other lanes anyway; or nothing.
            spawn: lets something go on by itself.
        """
        self._membership, self._changes, self._losses, self._spawn = membership, changes, losses, spawn
        self._under_way: set[str] = set()

    def stranded(self, worker_id: WorkerId, reason: str) -> None:
        """A worker has no lane, though no shard is lost."""
        self._mend(worker_id, lambda: self._changes().relink(worker_id, reason))

    def severed(self, worker_id: WorkerId, peer: WorkerId) -> None:
        """The KV channel between two workers is broken. Either end may have noticed."""
        ends = {m.pool: m.worker_id for m in self._membership.all() if m.worker_id in (worker_id, peer)}
        if "prefill" in ends and "decode" in ends:
            source, target = ends["prefill"], ends["decode"]
            self._mend(f"{source}/{target}", lambda: self._changes().reopen(source, target))

    def _mend(self, what: str, work: Callable[[], Coroutine[Any, Any, None]]) -> None:
        if what not in self._under_way and not self._losses():
            self._under_way.add(what)
            self._spawn(self._attempt(what, work))

    async def _attempt(self, what: str, work: Callable[[], Coroutine[Any, Any, None]]) -> None:
        try:
            await work()
        except OctetError as error:
            _log.warning("what is broken at %s is not mended yet: %s", what, error)
        finally:
            self._under_way.discard(what)
