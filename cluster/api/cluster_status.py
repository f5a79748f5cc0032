"""What the controller tells of the whole cluster."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from cluster.autoscaling.decision_log import DecisionLog
from cluster.change_record import ChangeRecord
from cluster.members import MemberStatus
from octet.ids import Epoch, PlacementVersion
from router.telemetry_window import TelemetryWindow


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ClusterStatus:
    """What the controller knows."""

    state: str
    reason: str
    members: Mapping[str, list[MemberStatus]]
    """By pool, with the processes on standby behind those that serve."""
    sizes: Mapping[str, int]
    """How many of each pool serve."""
    telemetry: TelemetryWindow | None
    epoch: Epoch
    placement_version: PlacementVersion
    changes: tuple[ChangeRecord, ...]
    """The last ones, oldest first."""
    under_way: str
    """The change that is being carried out, if one is."""
    waiting_for: str
    """What Ray has no room for yet, if there is such a thing."""
    decisions: DecisionLog | None
    """The autoscaler's, if there is one."""
    decisions_s: float
    """Now, on the clock of the decisions."""
