"""Whether a request is accepted: a pure function of what is in hand, how fast it gets done, and the request."""

from __future__ import annotations

import dataclasses
import math

from octet.config import FrontendConfig

_FIRST_RETRY_S, _LAST_RETRY_S = 0.1, 60.0
_UNKNOWN_RETRY_S = 1.0


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Demand:
    """What one request asks for."""

    prompt_tokens: int
    new_tokens: int
    """At most, over all choices."""
    longest_answer: int
    """At most, of one choice."""
    priority: int
    timeout_s: float
    choices: int = 1


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Backlog:
    """What was accepted and is not done."""

    requests: int
    prompt_tokens: int
    """Of requests that wait for their first token."""
    prompt_tokens_ahead: int
    """Those of them that are served before the request at hand."""
    new_tokens: float
    """That are expected to be generated yet."""
    answer_share: float = 1.0
    """Of the tokens that an answer may have, those that it is expected to have."""
    free_places: int = 0
    """In the batches of the decode workers that have pages for the request at hand."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Rates:
    """Measured while there was something to do; None before."""

    prefill_tokens_s: float | None
    decode_tokens_s: float | None
    tpot_s: float | None
    """From one token of an answer to the next."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Refusal:
    reason: str
    retry_after_s: float


def admit(demand: Demand, backlog: Backlog, rates: Rates, config: FrontendConfig) -> Refusal | None:
    """Refuse what is over a limit, or would end past its deadline because of what was accepted before it.

    A priority class has its share of every limit: requests of priority below 0 may use all of it, those of 0 leave
    `reserve` of it to them, and those above 0 twice as much. So the unimportant are refused first.

    The wait is the time in which the slower of the two pools gets through what is ahead: prompts flow through both at
    once, and where one holds up the other, the other's rate is measured accordingly. But whoever has a place in a batch
    is decoded beside the others, however long their answers are: they hold it up for as long at most as its own answer
    takes at their pace. Then comes the request's own time.
    It counts up to half of what the request has, so that with little to do nobody is refused for asking much, and an
    idle cluster refuses nobody at all.
    """
    share = 1.0 - config.reserve * (1 + (demand.priority > 0) - (demand.priority < 0))
    wait_s, own_s = _wait_s(demand, backlog, rates), _own_s(demand, backlog, rates)
    allowed_s = demand.timeout_s * share - min(own_s, demand.timeout_s / 2)
    most_requests = math.ceil(config.max_requests * share)
    most_tokens = math.ceil(config.max_queued_tokens * share)
    if backlog.requests >= most_requests:
        return Refusal(
            reason=f"{backlog.requests} requests are live, the limit (frontend.max_requests) is {most_requests} "
            f"at priority {demand.priority}",
            retry_after_s=_retry_s(wait_s / max(backlog.requests, 1)),
        )
    if backlog.prompt_tokens and backlog.prompt_tokens + demand.prompt_tokens > most_tokens:
        return Refusal(
            reason=f"{backlog.prompt_tokens} prompt tokens are queued before these {demand.prompt_tokens}, the limit "
            f"(frontend.max_queued_tokens) is {most_tokens} at priority {demand.priority}",
            retry_after_s=_retry_s(wait_s * demand.prompt_tokens / backlog.prompt_tokens),
        )
    if wait_s > max(allowed_s, 0.0):
        return Refusal(
            reason=f"it would wait {wait_s:.1f} s and take {own_s:.1f} s, of the {demand.timeout_s:.1f} s that it has: "
            f"{backlog.prompt_tokens_ahead} prompt tokens and {backlog.new_tokens:.0f} new tokens are ahead of it",
            retry_after_s=_retry_s(wait_s - allowed_s),
        )
    return None


def _wait_s(demand: Demand, backlog: Backlog, rates: Rates) -> float:
    prefill_s = backlog.prompt_tokens_ahead / rates.prefill_tokens_s if rates.prefill_tokens_s else 0.0
    decode_s = backlog.new_tokens / rates.decode_tokens_s if rates.decode_tokens_s else 0.0
    if demand.choices <= backlog.free_places:
        decode_s = min(decode_s, _answer_s(demand, backlog, rates))
    return max(prefill_s, decode_s)


def _own_s(demand: Demand, backlog: Backlog, rates: Rates) -> float:
    prefill_s = demand.prompt_tokens / rates.prefill_tokens_s if rates.prefill_tokens_s else 0.0
    return prefill_s + _answer_s(demand, backlog, rates)


def _answer_s(demand: Demand, backlog: Backlog, rates: Rates) -> float:
    """At the pace of those that are decoded now."""
    return demand.longest_answer * backlog.answer_share * (rates.tpot_s or 0.0)


def _retry_s(delay_s: float) -> float:
    """At least a moment, at most a minute; a second where nothing is measured yet."""
    return min(max(delay_s, _FIRST_RETRY_S), _LAST_RETRY_S) if delay_s else _UNKNOWN_RETRY_S
