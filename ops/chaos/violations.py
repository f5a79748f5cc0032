"""What may be wrong with a history, by kind."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Literal, TypeAlias, get_args

from ops.chaos.history import Stream

Kind = Literal[
    "gap in a stream",
    "deltas are not the answer",
    "terminal status",
    "not finished",
    "greedy answer differs",
    "sampled answer differs",
    "usage",
    "too late",
    "nobody was served",
    "old epoch committed",
    "journal out of order",
    "request ended not once",
    "computed twice",
    "journal and stream differ",
    "epoch went back",
    "not at baseline",
]
KINDS: tuple[Kind, ...] = get_args(Kind)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Violation:
    kind: Kind
    subject: str
    """The request, the worker or the thing counted."""
    found: str

    def __str__(self) -> str:
        return f"{self.kind}: {self.subject}: {self.found}"


Found: TypeAlias = Iterator[Violation]


def about(stream: Stream, kind: Kind, found: str) -> Violation:
    return Violation(kind=kind, subject=f"{stream.request_id} ({stream.question.name})", found=found)
