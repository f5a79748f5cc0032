"""What every section of the configuration is."""

from __future__ import annotations

import pydantic


class ConfigNode(pydantic.BaseModel):
    """Frozen; a field that there is not is refused."""

    model_config = pydantic.ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
