"""The record of one run: what every client saw, what the frontend committed, and what the cluster held. Values only.

All times are seconds since 1970.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Literal

Ids = tuple[int, ...]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """A request without faults: what is asked, and what the answer is."""

    name: str
    prompt: Ids
    max_new_tokens: int
    seed: int | None
    """None asks greedily."""
    temperature: float
    num_choices: int
    expected: tuple[Ids, ...]
    """By choice, from a run without faults."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Delta:
    """One chunk of a stream."""

    at_s: float
    choice: int
    offset: int
    token_ids: Ids
    finish_reason: str = ""
    usage: tuple[int, int] | None = None
    """Prompt and completion tokens, in the last chunk."""


@dataclasses.dataclass(slots=True, kw_only=True)
class Stream:
    """One request as its client saw it; grows while it runs."""

    request_id: str
    question: Question
    sent_s: float
    timeout_s: float
    deltas: list[Delta] = dataclasses.field(default_factory=list)
    calls_s: list[float] = dataclasses.field(default_factory=list)
    """When the client called: once, and once more for each time that it lost its connection, or came back."""
    away_s: list[tuple[float, float]] = dataclasses.field(default_factory=list)
    """From when to when its user was away by its own will."""
    accepted: bool = False
    endings: list[tuple[float, str]] = dataclasses.field(default_factory=list)
    """When the request ended for its client, and with which status."""
    final: tuple[Ids, ...] | None = None
    """The whole answer by choice, asked for once more after the end. None where it did not finish."""

    @property
    def resumes(self) -> int:
        return max(0, len(self.calls_s) - 1)

    def ids(self, choice: int) -> Ids:
        """All that came of a choice, in the order in which it came."""
        return tuple(token_id for delta in self.deltas if delta.choice == choice for token_id in delta.token_ids)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Commit:
    """What a frontend wrote down, in its order: see `cluster.frontend.audit`."""

    kind: Literal["workers", "accept", "commit", "end"]
    frontend: str
    at_s: float
    workers: tuple[str, ...] = ()
    """Of "workers": those whose reports count from here on."""
    request_id: str = ""
    choice: int = 0
    attempt: int = 0
    index: int = 0
    worker: str = ""
    received: Ids = ()
    """Of "accept": the tokens of each choice that the client has already."""
    outcome: str = ""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """What the cluster holds at one moment."""

    at_s: float
    state: str
    epoch: int
    placement_version: int
    sizes: Mapping[str, int]
    """Members that serve, by pool."""
    live_requests: int
    pages: int
    leases: int
    sequences: int
    slots: int
    """Filled, over all shards and layers."""
    least_slots: int
    """One for each expert."""
    most_slots: int
    """And the room for replicas."""
    actors: Mapping[str, int]
    """Of this cluster, by kind."""
    bundles: int
    unplaced: int
    """Groups of bundles for which no node has room."""
    processes: Mapping[str, int]
    """That Ray names after an actor of ours, by class: also those that no actor stands for any more."""
    ports: int
    """TCP sockets that these processes listen on."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Injected:
    """A fault, as it came about."""

    at_s: float
    what: str
    """Such as "kill experts-1"."""
    kind: str
    """Such as "kill experts", under which figures are put together."""
    until_s: float
    """When its effect was over: who died is done without, who stopped goes on."""
    fired: bool = True
    """False for an armed fault whose step was never reached, and for what could not be done."""
    note: str = ""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """The cluster's own word, every now and then."""

    at_s: float
    epoch: int
    state: str
    sizes: Mapping[str, int]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class History:
    name: str
    """Of the schedule."""
    begin_s: float
    end_s: float
    streams: Sequence[Stream]
    commits: Sequence[Commit] | None
    """None where frontends write nothing down (`chaos.audit_dir`)."""
    faults: Sequence[Injected]
    samples: Sequence[Sample]
    before: Facts
    after: Facts
    complete: bool = True
    """Whether lost members had to be replaced by the end."""
    host_lost: bool = False
    """Whether a host is gone for good: what no other has room for is not replaced, and the cluster says so."""
