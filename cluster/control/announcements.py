"""Who serves, as the frontend, the router service and the controller's own watch are told."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Sequence

from cluster.actors import answer_of, call
from cluster.control.membership import Membership
from cluster.control.pools import Member
from cluster.control.services import FRONTEND, ROUTER, Services
from octet.errors import UnavailableError
from octet.ids import WorkerId

_log = logging.getLogger(__name__)

_ANSWER_S = 10.0


class Announcements:
    """Belongs to the controller's event loop."""

    def __init__(
        self, membership: Membership, services: Services, on_members: Callable[[Sequence[Member]], None]
    ) -> None:
        """
        Args:
            on_members: told who serves, whenever that has changed and before anybody who left is stopped.
        """
        self._membership, self._services, self._on_members = membership, services, on_members
        self.draining: frozenset[WorkerId] = frozenset()
        """Attention workers on their way out, which are given nothing new."""
        self._untold: set[WorkerId] = set()
        """Services that did not answer when they were told who serves."""

    def tell_watch(self) -> None:
        """Who is to be watched over from here on."""
        self._on_members(self._membership.all())

    async def tell_frontend(self) -> None:
        """Who serves, and who is given nothing new."""

        def set_workers() -> Awaitable[None]:
            prefill, decode = self._membership.mailboxes("prefill"), self._membership.mailboxes("decode")
            told: Awaitable[None] = self._services.frontend.set_workers.remote(prefill, decode, sorted(self.draining))
            return told

        await self._tell(FRONTEND, set_workers)

    async def tell_router(self) -> None:
        """Who serves, and by what routing."""
        self.tell_watch()

        def watch() -> Awaitable[None]:
            actors = {member.worker_id: member.actor for member in self._membership.all()}
            told: Awaitable[None] = self._services.router.watch.remote(self._membership.routing, actors)
            return told

        await self._tell(ROUTER, watch)

    async def tell_again(self) -> None:
        """Services that did not answer the last time."""
        if FRONTEND in self._untold:
            await self.tell_frontend()
        if ROUTER in self._untold:
            await self.tell_router()

    async def _tell(self, service: WorkerId, ask: Callable[[], Awaitable[None]]) -> None:
        """What is so already, and no less so for a service that does not hear it: one that is gone is replaced and the
        next one told all of it, any other is told again. Who is told twice knows no more."""
        self._untold.discard(service)
        try:
            await call(service, answer_of(ask), _ANSWER_S)
        except UnavailableError as error:
            self._untold.add(service)
            _log.warning("%s was not told who serves: %s", service, error)
