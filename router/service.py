"""The router service: the one owner of the live placement, and of what members tell about their load."""

from __future__ import annotations

from octet.config import TelemetryConfig
from octet.ids import Epoch
from router.placement import Placement
from router.telemetry import Telemetry


class RouterService:
    """Holds placement, epoch and telemetry. Belongs to one thread."""

    def __init__(
        self, placement: Placement, epoch: Epoch, experts_per_token: int, config: TelemetryConfig, now_s: float
    ) -> None:
        self.placement, self.epoch = placement, epoch
        self.telemetry = Telemetry(placement.layers, placement.num_experts, experts_per_token, config, now_s)
