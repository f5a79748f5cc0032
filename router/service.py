"""The router service: the one owner of the live routing, and of what members tell about their load."""

from __future__ import annotations

from octet.config import TelemetryConfig
from router.routing import Routing
from router.telemetry import Telemetry


class RouterService:
    """Holds routing and telemetry. Belongs to one thread."""

    def __init__(
        self, routing: Routing, experts_per_token: int, config: TelemetryConfig, now_s: float, incarnation: int
    ) -> None:
        self.routing = routing
        placement = routing.placement
        self.telemetry = Telemetry(
            placement.layers, placement.num_experts, experts_per_token, config, now_s, incarnation
        )
