"""Identifiers are types, so that one is never passed for another."""

from __future__ import annotations

from typing import NewType

RequestId = NewType("RequestId", str)
WorkerId = NewType("WorkerId", str)
"""`prefill-0`, `decode-1`, `experts-2`, `frontend-0`: the pool, and the number in the pool."""
LeaseId = NewType("LeaseId", str)
Epoch = NewType("Epoch", int)
PlacementVersion = NewType("PlacementVersion", int)
