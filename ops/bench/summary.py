"""What the outcomes of a load come to."""

from __future__ import annotations

import collections
import dataclasses
import statistics
from collections.abc import Sequence

from ops.bench.load import Outcome


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Percentiles:
    """0 where there was nothing to measure."""

    p50: float
    p95: float
    p99: float


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """Latencies are of the requests that ended well, in seconds."""

    requests: int
    errors: dict[str, int]
    duration_s: float
    tokens_per_s: float
    """Everything generated, also by requests that failed later."""
    prompt_tokens_per_s: float
    goodput_per_s: float
    """Requests per second that kept both service levels."""
    ttft_s: Percentiles
    tpot_s: Percentiles
    """Of each request's mean; requests of one token have none."""
    itl_s: Percentiles
    """Of every gap; tokens that came in one chunk have gaps of 0."""
    e2e_s: Percentiles


def summarize(outcomes: Sequence[Outcome], duration_s: float, slo_ttft_s: float, slo_tpot_s: float) -> Summary:
    good = [outcome for outcome in outcomes if not outcome.error]
    kept = sum(outcome.ttft_s <= slo_ttft_s and (outcome.tpot_s or 0.0) <= slo_tpot_s for outcome in good)
    return Summary(
        requests=len(outcomes),
        errors=dict(collections.Counter(outcome.error for outcome in outcomes if outcome.error)),
        duration_s=duration_s,
        tokens_per_s=sum(len(outcome.token_times_s) for outcome in outcomes) / duration_s,
        prompt_tokens_per_s=sum(outcome.prompt_tokens for outcome in good) / duration_s,
        goodput_per_s=kept / duration_s,
        ttft_s=percentiles([outcome.ttft_s for outcome in good]),
        tpot_s=percentiles([outcome.tpot_s for outcome in good if outcome.tpot_s is not None]),
        itl_s=percentiles([itl for outcome in good for itl in outcome.itl_s]),
        e2e_s=percentiles([outcome.end_s for outcome in good]),
    )


def percentiles(values: Sequence[float]) -> Percentiles:
    """Interpolated between the nearest values, as numpy's default does."""
    if len(values) < 2:
        only = values[0] if values else 0.0
        return Percentiles(p50=only, p95=only, p99=only)
    cuts = statistics.quantiles(values, n=100, method="inclusive")
    return Percentiles(p50=cuts[49], p95=cuts[94], p99=cuts[98])
