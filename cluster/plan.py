"""What a cluster is going to be: the value that every member is started with."""

from __future__ import annotations

import dataclasses

from model.census import Census
from model.config import GenerationDefaults, ModelConfig
from octet.config import OctetConfig
from octet.secret import ClusterSecret
from router.routing import Routing


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ServingPlan:
    """Everything that the members need to know before they load."""

    config: OctetConfig
    model_dir: str
    model: ModelConfig
    generation: GenerationDefaults
    census: Census
    device: str
    """`cpu` or `cuda`."""
    routing: Routing
    """What the cluster starts with."""
    prefill_pages: int
    decode_pages: int
    max_model_len: int
    threads: dict[str, int]
    """CPU threads of each member, by pool."""
    secret: ClusterSecret
