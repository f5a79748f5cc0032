"""What a controller leaves to the one that takes its place: noted as it changes, taken over after its death."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Iterable, Mapping

from cluster.autoscaling.decision_log import DecisionLog
from cluster.control.changes import Changes
from cluster.control.controller_journal import ControllerJournal, NotedMember, NotedRouting, pack_journal
from cluster.control.keeper import Keeper
from cluster.control.membership import Membership
from cluster.control.pools import Member, Pools
from cluster.control.services import FRONTEND, ROUTER, Services
from cluster.members import Pool
from octet.ids import WorkerId

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Estate:
    """Belongs to the controller's event loop."""

    keeper: Keeper
    pools: Pools
    membership: Membership
    changes: Changes
    services: Services
    sizes: Mapping[Pool, int]
    decisions: Callable[[], DecisionLog | None]

    def keep(self) -> None:
        """Note everything, now and whenever it changes."""
        self.pools.note = self.membership.note = self.note
        self.changes.log.note = self.changes.standby.note = self.note
        self.note()

    def note(self) -> None:
        """Before anybody else hears of what has changed."""
        try:
            self.keeper.write(pack_journal(self._journal()))
        except Exception:
            # Serving does not depend on it, and the next change is another occasion.
            _log.exception("the controller's journal was not written")

    def take_over(self, journal: ControllerJournal) -> set[WorkerId]:
        """Know what the controller before this one knew; kill whoever it had not come to an end with.

        Returns: ids of those.
        """
        noted = {one.worker_id: one for one in (*journal.members, *journal.standby, *journal.joining)}
        there = self.keeper.groups()
        groups = [group for group in journal.groups if group.group in there]
        found = {m.worker_id: m for m in self.pools.take_over(journal.numbers, groups, list(noted.values()))}
        endpoints = [one.endpoint for one in noted.values()]
        members = [found[one.worker_id] for one in journal.members]
        self.membership.take_over(members, endpoints, journal.next_epoch)
        self.membership.routing = journal.routing.routing()
        if journal.adopting is not None:
            joining = tuple(found[one.worker_id] for one in journal.joining)
            self.membership.adopting = (journal.adopting.routing(), joining)
        self.changes.standby.take_over([found[one.worker_id] for one in journal.standby])
        self.changes.moves.num_redundant = journal.num_redundant
        self.changes.log.take_over(journal.changes)
        # Until this controller has dealt with it: it may be lost as well.
        self.changes.log.under_way = journal.under_way
        known = frozenset({*noted, FRONTEND, ROUTER})
        return {WorkerId(name) for name in self.keeper.sweep(known, frozenset(group.group for group in groups))}

    def _journal(self) -> ControllerJournal:
        membership, changes, decisions = self.membership, self.changes, self.decisions()
        adopting = membership.adopting
        return ControllerJournal(
            port=self.services.port,
            frontends=membership.frontends,
            sizes=dict(self.sizes),
            numbers=self.pools.numbers,
            next_epoch=membership.next_epoch,
            groups=self.pools.groups,
            members=self._noted(membership.all()),
            standby=self._noted(changes.standby.all()),
            routing=NotedRouting.of(membership.routing),
            adopting=None if adopting is None else NotedRouting.of(adopting[0]),
            joining=() if adopting is None else self._noted(adopting[1]),
            num_redundant=changes.moves.num_redundant,
            under_way=changes.log.under_way,
            changes=changes.log.records,
            actions=() if decisions is None else decisions.actions,
            latest=() if decisions is None else decisions.latest,
        )

    def _noted(self, members: Iterable[Member]) -> tuple[NotedMember, ...]:
        noted = []
        for member in members:
            endpoint = self.membership.endpoint(member.worker_id)
            assert endpoint is not None, "a member was reached before it became one"
            noted.append(
                NotedMember(
                    worker_id=member.worker_id,
                    pool=member.pool,
                    group=member.berth.group.id.hex(),
                    index=member.berth.index,
                    endpoint=endpoint,
                )
            )
        return tuple(noted)
