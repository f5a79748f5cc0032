"""Histories in which nothing is wrong, to plant what is."""

from __future__ import annotations

from typing import Any

from ops.chaos.history import Commit, Delta, Facts, History, Ids, Question, Sample, Stream

EXPECTED: Ids = (5, 6, 7, 8)


def question(**changes: Any) -> Question:
    fields: dict[str, Any] = {
        "name": "greedy 0",
        "prompt": (1, 2, 3),
        "max_new_tokens": 4,
        "seed": None,
        "temperature": 0.0,
        "num_choices": 1,
        "expected": (EXPECTED,),
    }
    return Question(**fields | changes)


def stream(**changes: Any) -> Stream:
    """Four tokens in two chunks, on time."""
    fields: dict[str, Any] = {
        "request_id": "r0",
        "question": question(),
        "sent_s": 100.0,
        "timeout_s": 10.0,
        "deltas": [
            Delta(at_s=101.0, choice=0, offset=0, token_ids=(5, 6)),
            Delta(at_s=102.0, choice=0, offset=2, token_ids=(7, 8), finish_reason="LENGTH", usage=(3, 4)),
        ],
        "calls_s": [100.0],
        "accepted": True,
        "endings": [(102.5, "OK")],
        "final": (EXPECTED,),
    }
    return Stream(**fields | changes)


def facts(**changes: Any) -> Facts:
    fields: dict[str, Any] = {
        "at_s": 99.0,
        "state": "READY",
        "epoch": 1,
        "placement_version": 1,
        "sizes": {"prefill": 1, "decode": 2, "experts": 2},
        "live_requests": 0,
        "pages": 0,
        "leases": 0,
        "sequences": 0,
        "slots": 32,
        "least_slots": 32,
        "most_slots": 40,
        "actors": {"prefill": 1, "decode": 2, "experts": 2, "controller": 1, "frontend": 1, "router": 1},
        "bundles": 5,
        "unplaced": 0,
        "processes": {"PrefillWorker": 1, "DecodeWorker": 2, "ExpertShard": 2},
        "ports": 20,
    }
    return Facts(**fields | changes)


def workers(*ids: str, frontend: str = "f0") -> Commit:
    return Commit(kind="workers", frontend=frontend, at_s=99.0, workers=ids)


def accept(*received: int, request_id: str = "r0", frontend: str = "f0") -> Commit:
    return Commit(kind="accept", frontend=frontend, at_s=100.0, request_id=request_id, received=received)


def commit(
    index: int, worker: str = "decode-0", attempt: int = 7, frontend: str = "f0", request_id: str = "r0"
) -> Commit:
    return Commit(
        kind="commit",
        frontend=frontend,
        at_s=101.0,
        request_id=request_id,
        index=index,
        worker=worker,
        attempt=attempt,
    )


def end(outcome: str = "finished", frontend: str = "f0", request_id: str = "r0") -> Commit:
    return Commit(kind="end", frontend=frontend, at_s=102.0, request_id=request_id, outcome=outcome)


def served(request_id: str = "r0") -> list[Commit]:
    """Four tokens at the first frontend."""
    tokens = [commit(index, request_id=request_id) for index in range(len(EXPECTED))]
    return [
        workers("prefill-0", "decode-0", "decode-1"),
        accept(request_id=request_id),
        *tokens,
        end(request_id=request_id),
    ]


def journal(*commits: Commit) -> History:
    """What frontends wrote of a request that no user asked for, beside a stream that is as it should be."""
    return history(stream(request_id="r1"), commits=[*served("r1"), *commits])


def history(*streams: Stream, **changes: Any) -> History:
    """By default of one stream."""
    fields: dict[str, Any] = {
        "name": "a schedule",
        "begin_s": 99.5,
        "end_s": 110.0,
        "streams": streams or (stream(),),
        "commits": served(),
        "faults": [],
        "samples": [
            Sample(at_s=101.0, epoch=1, state="READY", sizes={}),
            Sample(at_s=103.0, epoch=2, state="READY", sizes={}),
        ],
        "before": facts(),
        "after": facts(at_s=111.0, epoch=2),
    }
    return History(**fields | changes)
