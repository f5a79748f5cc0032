"""What the outcomes of a load come to."""

from __future__ import annotations

import collections
import dataclasses
import statistics
from collections.abc import Iterable, Mapping, Sequence

from octet.errors import UnavailableError
from ops.bench.load import Outcome


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Percentiles:
    p50: float
    p95: float
    p99: float


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """Latencies are of the requests that ended well, in seconds from when they were due (`ops.bench.load`); None where
    there was nothing to measure."""

    requests: int
    errors: dict[str, int]
    duration_s: float
    tokens_per_s: float
    """Everything generated, also by requests that failed later."""
    prompt_tokens_per_s: float
    goodput_per_s: float
    """Requests per second that kept both service levels."""
    max_lag_s: float
    """The most that a request was sent after it was due."""
    ttft_s: Percentiles | None
    tpot_s: Percentiles | None
    """Of each request's mean; requests of one token have none."""
    itl_s: Percentiles | None
    """Of every gap; tokens that came in one chunk have gaps of 0."""
    e2e_s: Percentiles | None


def summarize(outcomes: Sequence[Outcome], duration_s: float, slo_ttft_s: float, slo_tpot_s: float) -> Summary:
    good = [outcome for outcome in outcomes if not outcome.error]
    kept = sum(outcome.ttft_s <= slo_ttft_s and (outcome.tpot_s or 0.0) <= slo_tpot_s for outcome in good)
    return Summary(
        requests=len(outcomes),
        errors=errors_of(outcomes),
        duration_s=duration_s,
        tokens_per_s=sum(len(outcome.token_times_s) for outcome in outcomes) / duration_s,
        prompt_tokens_per_s=sum(outcome.prompt_tokens for outcome in good) / duration_s,
        goodput_per_s=kept / duration_s,
        max_lag_s=max((outcome.lag_s for outcome in outcomes), default=0.0),
        ttft_s=measured([outcome.ttft_s for outcome in good]),
        tpot_s=measured([outcome.tpot_s for outcome in good if outcome.tpot_s is not None]),
        itl_s=measured([itl for outcome in good for itl in outcome.itl_s]),
        e2e_s=measured([outcome.end_s for outcome in good]),
    )


def errors_of(outcomes: Iterable[Outcome]) -> dict[str, int]:
    """How many requests ended with each status code other than success."""
    return dict(collections.Counter(outcome.error for outcome in outcomes if outcome.error))


def counted(errors: Mapping[str, int]) -> str:
    """What `errors_of` found, in words; empty for nothing."""
    return ", ".join(f"{count} × {code}" for code, count in errors.items())


def require_success(outcomes: Sequence[Outcome]) -> None:
    """Raises: UnavailableError, with the codes and what one of them said, where every request failed."""
    if all(outcome.error for outcome in outcomes):
        found = counted(errors_of(outcomes)) or "none was sent"
        said = f"; the first said: {outcomes[0].problem}" if outcomes else ""
        raise UnavailableError(f"not one of {len(outcomes)} requests succeeded: {found}{said}")


def measured(values: Sequence[float]) -> Percentiles | None:
    """As `percentiles`; None where there was nothing to measure."""
    return percentiles(values) if values else None


def in_ms(values: Percentiles | None, digits: int) -> tuple[str, str, str]:
    """What a table shows of p50, p95 and p99."""
    if values is None:
        return "-", "-", "-"
    return f"{values.p50 * 1e3:.{digits}f}", f"{values.p95 * 1e3:.{digits}f}", f"{values.p99 * 1e3:.{digits}f}"


def percentiles(values: Sequence[float]) -> Percentiles:
    """Interpolated between the nearest values, as numpy's default does; 0 of no values."""
    if len(values) < 2:
        only = values[0] if values else 0.0
        return Percentiles(p50=only, p95=only, p99=only)
    cuts = statistics.quantiles(values, n=100, method="inclusive")
    return Percentiles(p50=cuts[49], p95=cuts[94], p99=cuts[98])
