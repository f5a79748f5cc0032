"""What a status says of a recovery."""

from __future__ import annotations

import random

import pytest

from octet.v1 import octet_pb2 as pb
from ops.bench.changes.stage import recovered_at_s


def change(kind: str, reason: str, at_s: float, *, succeeded: bool = True) -> pb.Change:
    return pb.Change(kind=kind, reason=reason, at_s=at_s, duration_s=0.25, succeeded=succeeded)


def test_the_latest_recovery_from_a_loss_counts() -> None:
    at_s = random.uniform(1e9, 2e9)
    changes = [
        change("recovery", "decode-1: silent", at_s - 9),
        change("recovery", "decode-1: silent", at_s),
        change("recovery", "decode-2: silent", at_s + 1),
        change("recovery", "decode-1: silent", at_s + 2, succeeded=False),
        change("scale", "decode-1 is there", at_s + 3),
    ]
    assert recovered_at_s(pb.GetStatusResponse(changes=changes), "decode-1") == pytest.approx(at_s + 0.25)


def test_a_loss_that_nothing_is_on_record_of_has_no_time() -> None:
    changes = [change("recovery", "decode-1: silent", 5.0)]
    assert recovered_at_s(pb.GetStatusResponse(changes=changes), "prefill-0") is None
    assert recovered_at_s(pb.GetStatusResponse(), "decode-1") is None
