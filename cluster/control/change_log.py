"""Changes are carried out one at a time, and stay on record with their reasons and outcomes."""

from __future__ import annotations

import asyncio
import collections
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable
from typing import Any, TypeVar

from cluster.change_record import ChangeRecord
from octet.errors import OctetError

_log = logging.getLogger(__name__)
_T = TypeVar("_T")

_RECORDS = 100


class ChangeLog:
    """Belongs to the controller's event loop."""

    def __init__(self) -> None:
        self._one_at_a_time = asyncio.Lock()
        self._records: collections.deque[ChangeRecord] = collections.deque(maxlen=_RECORDS)
        self._going_through: set[asyncio.Task[Any]] = set()
        self.under_way = ""
        self.note: Callable[[], None] = lambda: None
        """Called when what another controller needs to know has changed."""

    def take_over(self, records: Iterable[ChangeRecord]) -> None:
        """Of a controller before this one."""
        self._records.extend(records)

    @property
    def busy(self) -> bool:
        return self._one_at_a_time.locked()

    @property
    def records(self) -> tuple[ChangeRecord, ...]:
        """The last ones, oldest first."""
        return tuple(self._records)

    @contextlib.asynccontextmanager
    async def change(self, kind: str, reason: str) -> AsyncIterator[list[str]]:
        """Waits for its turn; what is appended becomes the outcome."""
        async with self._one_at_a_time:
            self.under_way = kind
            self.note()
            try:
                async with self.attempt(kind, reason) as outcome:
                    yield outcome
            finally:
                self.under_way = ""
                self.note()

    @contextlib.asynccontextmanager
    async def attempt(self, kind: str, reason: str, only_failure: bool = False) -> AsyncIterator[list[str]]:
        """What goes on beside other changes; what is appended becomes the outcome.

        Args:
            only_failure: is put on record; what succeeds goes on to a change with a record of its own.
        """
        at_s, begun_s, outcome, succeeded = time.time(), time.monotonic(), list[str](), False
        try:
            yield outcome
            succeeded = True
        except OctetError as error:
            outcome.append(str(error))
            raise
        except asyncio.CancelledError:
            outcome.append("it was given up")
            raise
        finally:
            if not (succeeded and only_failure):
                record = ChangeRecord(
                    at_s=at_s,
                    duration_s=time.monotonic() - begun_s,
                    kind=kind,
                    reason=reason,
                    outcome="; ".join(outcome),
                    succeeded=succeeded,
                )
                self._records.append(record)
                self.note()
                _log.log(logging.INFO if succeeded else logging.WARNING, "%s", record)

    async def through(self, change: Coroutine[Any, Any, _T]) -> _T:
        """To its end, also where whoever asked for it waits no longer: of half a change nobody could say what holds."""
        task = asyncio.create_task(change)
        self._going_through.add(task)
        task.add_done_callback(self._going_through.discard)
        return await asyncio.shield(task)
