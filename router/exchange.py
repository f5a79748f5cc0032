"""The way of rows between an attention worker and its expert shards, whatever carries it.

`Exchange` is the attention worker's end, `Port` a shard's. Implementations: `LocalExchange` here (one process),
`router.lane` (gloo), `router.nccl_lane` (NCCL). One conformance test holds them all to this contract.

Shapes: `U` rows sent to one shard, `H` hidden, `K` experts per token.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Protocol

import torch


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ExpertRows:
    """One shard's share of one layer's tokens."""

    x_UH: torch.Tensor
    slots_UK: torch.Tensor
    """int32 slots within the shard, negative where the row does not use the shard."""
    weights_UK: torch.Tensor
    """fp32."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """`ExpertRows` as they arrive at a shard."""

    layer: int
    rows: ExpertRows
    sequence: int
    """Counts the frames of a lane, so that a reply finds its question."""


class Ticket(Protocol):
    """Rows on their way: what `Exchange.send` returns and `Exchange.receive` takes."""

    @property
    def layer(self) -> int: ...


class Exchange(Protocol):
    """The attention worker's end. Tickets are received in the order in which they were sent; two may be open."""

    @property
    def num_shards(self) -> int: ...

    def send(self, layer: int, rows: Sequence[ExpertRows | None]) -> Ticket:
        """Start a round: `rows[i]` goes to shard `i`, None sends nothing. Does not wait for replies.

        Raises: LaneError.
        """

    def receive(self, ticket: Ticket) -> list[torch.Tensor | None]:
        """The weighted sums `[U, H]` of each shard's experts, in the dtype of the rows; None where nothing was sent.

        Raises: LaneTimeoutError, PeerLostError, WrongEpochError, ExpertMissingError. After any of them but
        ExpertMissingError the exchange is of no more use.
        """

    def heartbeat(self) -> None:
        """Tell the shards that this end is alive though it has nothing to send."""

    def close(self) -> None: ...


class Port(Protocol):
    """A shard's end of one lane."""

    def receive(self) -> Call | None:
        """The next call; None once the other end has closed. Blocks until then.

        Raises: LaneTimeoutError when the attention worker owes a heartbeat, PeerLostError, WrongEpochError.
        """

    def reply(self, call: Call, y_UH: torch.Tensor) -> None: ...

    def refuse(self, call: Call, error: Exception) -> None:
        """Answer with an error, which the other end raises."""

    def close(self) -> None: ...


Serve = Callable[[int, ExpertRows], torch.Tensor]
"""A shard as a function: layer and rows to weighted sums `[U, H]`."""


@dataclasses.dataclass(frozen=True, slots=True)
class _Answered:
    layer: int
    replies: list[torch.Tensor | None]


class LocalExchange:
    """Shards in the same process, called at once."""

    def __init__(self, shards: Sequence[Serve]) -> None:
        self._shards = shards

    @property
    def num_shards(self) -> int:
        return len(self._shards)

    def send(self, layer: int, rows: Sequence[ExpertRows | None]) -> Ticket:
        replies = [None if part is None else serve(layer, part) for serve, part in zip(self._shards, rows, strict=True)]
        return _Answered(layer, replies)

    def receive(self, ticket: Ticket) -> list[torch.Tensor | None]:
        assert isinstance(ticket, _Answered)
        return ticket.replies

    def heartbeat(self) -> None:
        return

    def close(self) -> None:
        return
