"""The section `autoscaler` of the configuration."""

from __future__ import annotations

import pydantic

from octet.config_node import ConfigNode


class PoolScalingConfig(ConfigNode):
    """When a pool grows and shrinks. Names are those of Ray Serve's autoscaling where the meaning is the same."""

    min_replicas: int = pydantic.Field(1, ge=0)
    """0 lets the pool go when nothing is asked for; requests that come then wait for it to start."""
    max_replicas: int = pydantic.Field(8, ge=1)
    upscale_delay_s: float = pydantic.Field(30.0, ge=0)
    """The pool grows to what was wanted throughout this time."""
    downscale_delay_s: float = pydantic.Field(600.0, ge=0)
    """It shrinks to the most that was wanted lastingly within this time, or within what is left of
    `reversal_cooldown_s` after it has turned, if that is longer."""
    upscaling_factor: float = pydantic.Field(1.0, gt=0)
    """What part of a wanted change is made at once; more than 1 overshoots."""
    downscaling_factor: float = pydantic.Field(1.0, gt=0, le=1)
    square_root_staffing: float = pydantic.Field(0.0, ge=0)
    """β of `R + β·√R` members for a load of R: chance is a larger part of a small load, as where one long prompt fills
    a whole worker. Counts where it is more than the target share leaves anyway."""

    @pydantic.model_validator(mode="after")
    def _the_bounds_are_in_order(self) -> PoolScalingConfig:
        if self.min_replicas > self.max_replicas:
            raise ValueError(
                f"min_replicas ({self.min_replicas}) must be at most max_replicas ({self.max_replicas}); "
                "raise max_replicas or lower min_replicas"
            )
        return self


class PrefillScalingConfig(PoolScalingConfig):
    target_busy_share: float = pydantic.Field(0.7, gt=0, le=1)
    """The share of its time that a worker is meant to compute prompts."""


class DecodeScalingConfig(PoolScalingConfig):
    """A decode worker with one sequence is as busy as one with fifty; what fills is its KV cache."""

    target_kv_occupancy: float = pydantic.Field(0.8, gt=0, le=1)
    target_ongoing_requests: float | None = pydantic.Field(None, gt=0)
    """Sequences per worker; null takes 0.8 of `decode.max_batch`."""


class ExpertScalingConfig(PoolScalingConfig):
    target_busy_share: float = pydantic.Field(0.7, gt=0, le=1)
    """The share of its time that the fullest shard is meant to compute."""
    target_balancedness: float = pydantic.Field(0.9, gt=0, le=1)
    """Below this, and where the fullest shard is what steps wait for, replicas of experts are asked for."""
    max_redundant_experts: int = pydantic.Field(32, ge=0)
    """Slots per layer beyond one for each expert, over all shards; beside what shards must have."""
    least_gain: float = pydantic.Field(0.02, gt=0, lt=1)
    """Balancedness that redundancy has to bring, or its slots go back."""


class AutoscalerConfig(ConfigNode):
    """Sizes of the pools by load. Not by GPU utilisation: a GPU that waits in a collective looks busy."""

    enabled: bool = False
    metrics_interval_s: float = pydantic.Field(10.0, gt=0)
    """Decisions are this far apart."""
    look_back_period_s: float = pydantic.Field(30.0, gt=0)
    """What a decision looks at; at least `metrics_interval_s`."""
    forecast_horizon_s: float = pydantic.Field(180.0, ge=0)
    """The trend of the load is followed this far ahead: about what a new member takes to start and load. 0: not
    at all."""
    cold_start_s: float = pydantic.Field(30.0, ge=0)
    """What a member reports in its first seconds is left out."""
    action_timeout_s: float = pydantic.Field(900.0, gt=0)
    """A change of a pool that is not complete by then is given up, and another may be decided."""
    reversal_cooldown_s: float = pydantic.Field(600.0, ge=0)
    """A pool that has grown does not shrink for so long, and changes direction at most once in this time; growing is
    exempt once requests have missed their target for `urgent_delay_s`."""
    urgent_delay_s: float = pydantic.Field(120.0, ge=0)
    """About what a new member takes to start, and a look back: a burst that is shorter is over before it could help."""
    tolerance: float = pydantic.Field(0.1, ge=0, lt=1)
    """A pool whose load is this close to its target stays as it is."""
    target_ttft_s: float = pydantic.Field(5.0, gt=0)
    target_ttft_per_1k_tokens_s: float = pydantic.Field(1.0, ge=0)
    """Comes on top for every 1,000 tokens of a prompt: attention over a long one takes its time on an idle cluster."""
    target_tpot_s: float = pydantic.Field(0.1, gt=0)
    max_gpus: float | None = pydantic.Field(None, gt=0)
    """Over all pools; where members hold no GPU, each counts as one. Null is no limit beside the pools' own."""
    prefill: PrefillScalingConfig = PrefillScalingConfig()
    decode: DecodeScalingConfig = DecodeScalingConfig()
    experts: ExpertScalingConfig = ExpertScalingConfig()

    @pydantic.model_validator(mode="after")
    def _a_window_holds_a_decision(self) -> AutoscalerConfig:
        if self.look_back_period_s < self.metrics_interval_s:
            raise ValueError(
                f"autoscaler.look_back_period_s ({self.look_back_period_s}) must be at least "
                f"autoscaler.metrics_interval_s ({self.metrics_interval_s}), or load between decisions is never seen"
            )
        zero = [name for name in ("prefill", "decode", "experts") if getattr(self, name).min_replicas == 0]
        if zero and len(zero) < 3:
            raise ValueError(
                f"autoscaler.{zero[0]}.min_replicas is 0 and another pool's is not: pools go to zero together, "
                "as none serves without the others"
            )
        return self
