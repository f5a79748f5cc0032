"""What is known of a change that was carried out, or that failed."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ChangeRecord:
    """One change, for the status page."""

    at_s: float
    """Seconds since 1970."""
    duration_s: float
    kind: str
    """rebalance, scale, recovery or slow."""
    reason: str
    outcome: str
    """What came of it; why it failed, if it did."""
    succeeded: bool
