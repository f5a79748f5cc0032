"""The way of rows between an attention worker and its expert shards, whatever carries it.

`Exchange` is the attention worker's end, `Port` a shard's. Implementations: `LocalExchange` here (one process),
`router.lane` (wires), `router.nccl_lane` (NCCL). One conformance test holds them all to this contract.

Shapes: `T` tokens, `U` rows sent to one shard, `H` hidden, `K` experts per token.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch

from router.plan import DispatchPlan, ShardPlan


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExpertRows:
    """One shard's share of one layer's tokens."""

    x_UH: torch.Tensor
    slots_UK: torch.Tensor
    """int32 slots within the shard, negative where the row does not use the shard."""
    weights_UK: torch.Tensor
    """fp32."""

    @functools.cached_property
    def arrays(self) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int32], npt.NDArray[np.float32]]:
        """The same on an fp32 CPU."""
        return self.x_UH.numpy(), self.slots_UK.numpy(), self.weights_UK.numpy()


class Call(NamedTuple):
    """`ExpertRows` as they arrive at a shard."""

    layer: int
    rows: ExpertRows
    sequence: int
    """Counts the frames of a lane, so that a reply finds its question."""
    room_UH: torch.Tensor | None = None
    """Where the answer may be written, so that `Port.reply` has nothing to copy."""
    gives_way: bool = False
    """Whether those who sent it would rather wait than keep decode frames from the cores."""


class Ticket(Protocol):
    """Rows on their way: what `Exchange.send` returns and `Exchange.receive` takes."""

    @property
    def layer(self) -> int: ...


class Exchange(Protocol):
    """The attention worker's end. Tickets are received in the order in which they were sent; two may be open."""

    gives_way: bool
    """Of the rows sent from now on; see `Call`. On GPUs nobody asks."""

    @property
    def crowded(self) -> bool:
        """Whether its shards keep every core of this machine at work, so that who has many rows had better wait."""

    @property
    def num_shards(self) -> int: ...

    def send(self, layer: int, x_TH: torch.Tensor, plan: DispatchPlan) -> Ticket:
        """Start a round: each shard is sent the rows that are planned for it. Does not wait for replies.

        `x_TH` may change afterwards. Raises: LaneError, RequestLimitError and then nothing was sent.
        """

    def await_first(self, ticket: Ticket) -> None:
        """Wait until a shard of the round may be done, and a core with it; not for long, and nothing is received."""

    def receive(self, ticket: Ticket, y_TH: torch.Tensor) -> None:
        """Add the weighted sums of each shard's experts, which come in the dtype of the rows, shard by shard.

        Args:
            y_TH: fp32.

        Of a dense plan the sums need not have come yet: `settle` waits for them.

        Raises: LaneTimeoutError, PeerLostError, WrongEpochError, ExpertMissingError. After any of them but
        ExpertMissingError the exchange is of no more use.
        """

    def settle(self) -> None:
        """Wait until all that was received is there, or never will be. Raises: as `receive`."""

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


def rows_of(x_TH: torch.Tensor, part: ShardPlan) -> ExpertRows:
    """What a shard is sent."""
    x_UH = x_TH if part.rows_U is None else x_TH[part.rows_U]
    return ExpertRows(x_UH=x_UH, slots_UK=part.slots_UK, weights_UK=part.weights_UK)


def add_rows(y_TH: torch.Tensor, rows_U: torch.Tensor | None, y_UH: torch.Tensor) -> None:
    """Add one shard's sums to those of its tokens."""
    if rows_U is None:
        y_TH.add_(y_UH.float())
    else:
        y_TH.index_add_(0, rows_U, y_UH.float())


Serve = Callable[[int, ExpertRows], torch.Tensor]
"""A shard as a function: layer and rows to weighted sums `[U, H]`."""


@dataclasses.dataclass(frozen=True, slots=True)
class _Answered:
    layer: int
    replies: list[tuple[torch.Tensor | None, torch.Tensor]]
    """Tokens, None for all, and their sums."""


class LocalExchange:
    """Shards in the same process, called at once."""

    def __init__(self, shards: Sequence[Serve]) -> None:
        self._shards = shards
        self.gives_way = self.crowded = False

    @property
    def num_shards(self) -> int:
        return len(self._shards)

    def send(self, layer: int, x_TH: torch.Tensor, plan: DispatchPlan) -> Ticket:
        parts = [(serve, part) for shard, serve in enumerate(self._shards) if (part := plan.of(shard)) is not None]
        return _Answered(layer, [(part.rows_U, serve(layer, rows_of(x_TH, part))) for serve, part in parts])

    def await_first(self, ticket: Ticket) -> None:
        return

    def receive(self, ticket: Ticket, y_TH: torch.Tensor) -> None:
        assert isinstance(ticket, _Answered)
        for rows_U, y_UH in ticket.replies:
            add_rows(y_TH, rows_U, y_UH)

    def settle(self) -> None:
        return

    def heartbeat(self) -> None:
        return

    def close(self) -> None:
        return
