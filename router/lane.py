"""A lane on CPUs: one attention worker and every expert shard, joined by one link each.

A link is a wire of its own. Shards come and go while a lane is in use, and the loss of one breaks no other link: the
next epoch's lane is made of the links that remain and those formed beside them. Shards that get no row are left out of
a round; nobody waits for them.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import select
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
import torch

from model.threads import in_parts, moving
from octet.errors import ExpertMissingError, LaneError
from octet.ids import Epoch
from router.exchange import Call, Ticket
from router.frames import HEADER_BYTES, OPEN_ROUNDS, SHARED, FrameBuffer, FrameLayout, Header, Kind, new_frames
from router.gate import FEW_TOKENS
from router.handshake import GUEST_SIDE, HOST_SIDE
from router.link import Link, frames_cpu, rounds_cpu, shared_frames
from router.plan import DispatchPlan, StackedPlan
from router.wire import Wire, milliseconds, wire_cpu

WORKER, SHARD = HOST_SIDE, GUEST_SIDE
"""Ranks of a link's wire."""

_FIRST_MS = 1000
"""Longer than a frame takes by far: what is waited for is a core, and what else there is to do can be done without."""

_HEARTBEAT, _REPLY, _REFUSAL = Kind.HEARTBEAT.value, Kind.REPLY.value, Kind.REFUSAL.value


@dataclasses.dataclass(frozen=True, slots=True)
class _Round:
    """One dispatch under way."""

    layer: int
    plan: StackedPlan
    numbers_X: npt.NDArray[np.int64]
    """Of the links' calls; -1 where there is none."""
    broken: dict[int, LaneError]
    """Shards to which nothing could be sent."""


class LaneExchange:
    """The attention worker's end. Belongs to one thread.

    The loss of a shard is raised when its reply is to be received, and leaves the links to the others in order: a lane
    of the next epoch is made of them.
    """

    def __init__(self, links: Sequence[Link], crowded: bool = False) -> None:
        """
        Args:
            links: one per shard, in the order of the placement's.
            crowded: see `Exchange`.
        """
        self._links, self.crowded = tuple(links), crowded
        self._addresses_X = np.array([link.fields.ctypes.data for link in self._links], np.int64)
        self._rounds_cpu, self._adds_compiled = rounds_cpu(), all(link.adds_compiled for link in self._links)
        self.gives_way = False
        self._open: collections.deque[_Round] = collections.deque()
        self._replies = select.poll()
        for link in self._links:
            self._replies.register(link.fd, select.POLLIN)

    @property
    def num_shards(self) -> int:
        return len(self._links)

    def send(self, layer: int, x_TH: torch.Tensor, plan: DispatchPlan) -> Ticket:
        if len(self._open) == OPEN_ROUNDS:
            raise LaneError(f"{OPEN_ROUNDS} rounds are under way: receive one first")
        x_TW = x_TH.view(torch.int32).numpy()
        numbers_X, sent_X = np.empty((2, len(self._links)), np.int64)
        started = _Round(layer, plan.stacked(), numbers_X, {})
        if self._send_to_all(started, x_TW, sent_X) != 0:
            self._send_to_each(started, x_TW, sent_X)
        self._open.append(started)
        return started

    def _send_to_all(self, started: _Round, x_TW: npt.NDArray[np.int32], sent_X: npt.NDArray[np.int64]) -> int:
        """See `router.rounds_cpu.send`."""
        written = len(x_TW) > FEW_TOKENS
        if written:
            write = functools.partial(self._rounds_cpu.write, self._addresses_X, x_TW, *started.plan)
            in_parts(write, int(started.plan.counts_X.max(initial=0)), moving(len(self._links) * x_TW.nbytes))
        args = self._addresses_X, started.layer, self.gives_way, written, x_TW, *started.plan
        num_left: int = self._rounds_cpu.send(*args, started.numbers_X, sent_X)
        return num_left

    def _send_to_each(self, started: _Round, x_TW: npt.NDArray[np.int32], sent_X: npt.NDArray[np.int64]) -> None:
        """What is not sent yet. Raises: RequestLimitError."""
        # All are checked before one is sent: a frame over the limit leaves no round half sent.
        for link, count in zip(self._links, started.plan.counts_X.tolist(), strict=True):
            link.check(count)
        for shard, (link, sent) in enumerate(zip(self._links, sent_X.tolist(), strict=True)):
            part = started.plan.arrays_of(shard)
            if part is None:
                continue
            try:
                if sent == self._rounds_cpu.UNSENT:
                    started.numbers_X[shard] = link.send(started.layer, x_TW, part, self.gives_way)
                else:
                    link.check_status(sent)
                    link.finish_later(int(started.numbers_X[shard]), len(part[0]), sent)
            except LaneError as error:
                started.broken[shard] = _anew(error)

    def await_first(self, ticket: Ticket) -> None:
        # Also when a connection breaks, which `receive` will say.
        self._replies.poll(_FIRST_MS)

    def receive(self, ticket: Ticket, y_TH: torch.Tensor) -> None:
        assert self._open, "no round is under way"
        assert ticket is self._open[0], "rounds are received in the order in which they were sent"
        current = self._open.popleft()
        _raise_first(current.broken)
        num_added = self._add_compiled(current, y_TH.numpy()) if self._adds_compiled else 0
        if num_added < len(self._links):
            self._receive_from_each(current, y_TH, num_added)

    def _add_compiled(self, current: _Round, y_TH: npt.NDArray[np.float32]) -> int:
        """Wait for the replies and add them, up to one that is another than was expected.

        Returns: how many shards' were added. Raises: LaneError.
        """
        if len(y_TH) <= FEW_TOKENS:
            return self._add_few(current, y_TH)
        for shard in range(len(self._links)):
            # While the next ones still compute.
            self._wait_for(shard, current)
            if not self._add_many(shard, current, y_TH):
                return shard
        return len(self._links)

    def _add_few(self, current: _Round, y_TH: npt.NDArray[np.float32]) -> int:
        plan, status_X = current.plan, np.empty_like(current.numbers_X)
        num_added: int = self._rounds_cpu.wait_and_add(
            self._addresses_X, current.numbers_X, status_X, plan.counts_X, plan.rows_XT, y_TH
        )
        if num_added < len(self._links):
            self._check_status(num_added, int(status_X[num_added]))
        return num_added

    def _add_many(self, shard: int, current: _Round, y_TH: npt.NDArray[np.float32]) -> bool:
        """Whether the reply is the one that was expected. Threads share its rows."""
        one, plan, found = slice(shard, shard + 1), current.plan, list[bool]()
        part = self._addresses_X[one], current.numbers_X[one], plan.counts_X[one], plan.rows_XT[one]
        add = functools.partial(self._rounds_cpu.add, *part, y_TH)
        in_parts(lambda first, last: found.append(add(first, last) == 1), len(y_TH), moving(y_TH.nbytes))
        return all(found)

    def _wait_for(self, shard: int, current: _Round) -> None:
        """Raises: LaneError."""
        one, status_1 = slice(shard, shard + 1), np.empty(1, np.int64)
        self._rounds_cpu.wait(self._addresses_X[one], current.numbers_X[one], status_1)
        self._check_status(shard, int(status_1[0]))

    def _check_status(self, shard: int, status: int) -> None:
        """Raises: LaneError for what the wait for a reply ended with."""
        try:
            self._links[shard].check_status(status)
        except LaneError as error:
            _raise_first({shard: error})

    def _receive_from_each(self, current: _Round, y_TH: torch.Tensor, first: int) -> None:
        """From the shards from this one on. Raises: as `receive`."""
        refusals: list[str] = []
        for shard, number in enumerate(current.numbers_X.tolist()):
            part = current.plan.arrays_of(shard)
            if shard < first or part is None:
                continue
            try:
                self._links[shard].receive(number, part[0], y_TH)
            except ExpertMissingError as error:
                refusals.append(f"shard {shard}: {error}")
            except LaneError as error:
                _raise_first({shard: error})
        if refusals:
            raise ExpertMissingError("; ".join(refusals))

    def settle(self) -> None:
        return

    def heartbeat(self) -> None:
        broken: dict[int, LaneError] = {}
        for shard, link in enumerate(self._links):
            try:
                link.announce(Kind.HEARTBEAT)
            except LaneError as error:
                broken[shard] = _anew(error)
        _raise_first(broken)

    def close(self) -> None:
        """Tell every shard, and break the connections."""
        for link in self._links:
            link.close()


def _anew(error: LaneError) -> LaneError:
    """The same without its traceback, which would hold the links and their ports until the next garbage collection, and
    an idle worker seldom has one."""
    return type(error)(str(error))


def _raise_first(broken: Mapping[int, LaneError]) -> None:
    for shard, error in broken.items():
        raise type(error)(f"shard {shard}: {error}") from error


class LanePort:
    """A shard's end. One thread receives and replies."""

    def __init__(self, wire: Wire, layout: FrameLayout, epoch: Epoch, timeout_s: float) -> None:
        """
        Args:
            timeout_s: silence after which the attention worker is given up; it sends heartbeats more often than that.
        """
        self._wire, self._layout, self._epoch, self._timeout_s = wire, layout, epoch, timeout_s
        self._frames_cpu, self._wire_cpu = frames_cpu(), wire_cpu()
        self._inbox, self._outbox = new_frames(layout, OPEN_ROUNDS), new_frames(layout, OPEN_ROUNDS)
        self._calls = [FrameBuffer(layout, words) for words in self._inbox]
        shared = shared_frames(wire, layout)
        self._shares = shared is not None
        self._shared_calls = [] if shared is None else [FrameBuffer(layout, words) for words in shared.calls]
        self._replies = [FrameBuffer(layout, words) for words in (self._outbox if shared is None else shared.replies)]
        self._state, self._timeout_ms = np.zeros(self._wire_cpu.STATE_FIELDS, np.int64), milliseconds(timeout_s)
        self._unsent: tuple[npt.NDArray[np.int32], int, int] | None = None

    def receive(self) -> Call | None:
        # The worker may not have read all of the last reply yet. Now nobody waits for this thread's turn to end.
        self._send_rest()
        row = self._wire_cpu.receive_any_but(self._wire.fd, self._inbox, self._state, _HEARTBEAT, self._timeout_ms)
        self._wire.check(row, self._timeout_s)
        header = Header.read(self._calls[row].memory, self._epoch)
        if header.kind is Kind.CLOSE:
            return None
        self._layout.check_call(header, self._shares)
        num_rows, turn = header.num_rows, header.sequence % OPEN_ROUNDS
        frame, room_UH = (
            self._shared_calls[turn] if header.shared else self._calls[row],
            self._replies[turn].reply(num_rows),
        )
        return Call(header.layer, frame.rows(num_rows), header.sequence, room_UH, header.gives_way)

    def reply(self, call: Call, y_UH: torch.Tensor) -> None:
        """Does not wait until the other end has read it."""
        num_rows = y_UH.shape[0]
        if y_UH is not call.room_UH:
            self._replies[call.sequence % OPEN_ROUNDS].reply(num_rows).copy_(y_UH)
        if self._shares:
            self._send(call, _REPLY, num_rows, HEADER_BYTES, SHARED)
        else:
            self._send(call, _REPLY, num_rows, self._layout.reply_bytes(num_rows), 0)

    def refuse(self, call: Call, error: Exception) -> None:
        room = self._layout.reply_bytes(len(call.rows.x_UH)) - HEADER_BYTES
        text = str(error).encode()[:room]
        self._outbox[call.sequence % OPEN_ROUNDS].view(np.uint8).data[HEADER_BYTES : HEADER_BYTES + len(text)] = text
        self._send(call, _REFUSAL, 0, HEADER_BYTES + len(text), 0)

    def close(self) -> None:
        self._wire.abort()

    def _send(self, call: Call, kind: int, num_rows: int, size: int, flags: int) -> None:
        self._send_rest()
        frame = self._outbox[call.sequence % OPEN_ROUNDS]
        sent = self._frames_cpu.send_reply(
            self._wire.fd, frame, kind, self._epoch, call.sequence, call.layer, num_rows, size, flags
        )
        self._wire.check(sent, 0)
        if sent < size:
            self._unsent = frame, sent, size

    def _send_rest(self) -> None:
        """What there is of the last reply. Raises: LaneError."""
        if self._unsent is not None:
            status = self._wire_cpu.send_rest(self._wire.fd, *self._unsent, milliseconds(self._wire.timeout_s))
            self._wire.check(status, self._wire.timeout_s)
            self._unsent = None
