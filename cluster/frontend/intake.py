"""Who is let in, and the account of what became of them."""

from __future__ import annotations

import dataclasses

from cluster.frontend.admission import Demand, admit
from cluster.frontend.histograms import RequestHistograms
from cluster.frontend.live_requests import LiveRequest
from cluster.frontend.load_meter import LoadMeter
from cluster.frontend.record import Outcome
from cluster.frontend.request_meter import RequestLoad, RequestMeter
from cluster.frontend.slo import Slo
from cluster.frontend.validation import GenerateSpec
from octet.autoscaler_config import AutoscalerConfig
from octet.config import FrontendConfig
from octet.errors import QueueFullError, UnavailableError


@dataclasses.dataclass(slots=True)
class Totals:
    """Counts since the start. Every accepted request ends in exactly one of finished, failed, cancelled."""

    tokens: int = 0
    finished: int = 0
    failed: int = 0
    cancelled: int = 0
    refused: int = 0
    """Requests that were never accepted, for lack of room or time."""


class Intake:
    """Told of every request's way: `check`, `accept`, `count` for each token, `end`. Clocks are passed in."""

    def __init__(self, config: FrontendConfig, scaler: AutoscalerConfig) -> None:
        self._config = config
        self._meter = LoadMeter()
        self._requests = RequestMeter(
            Slo(
                ttft_s=scaler.target_ttft_s,
                ttft_per_1k_tokens_s=scaler.target_ttft_per_1k_tokens_s,
                tpot_s=scaler.target_tpot_s,
            ),
            scaler.look_back_period_s,
        )
        self.closed = "the pools are starting"
        """Why nobody is let in; empty where that is not so."""
        self.totals, self.histograms = Totals(), RequestHistograms()

    def timeout_s(self, asked_s: float | None) -> float:
        return self._config.default_timeout_s if asked_s is None else asked_s

    def unread(self, priority: int, timeout_s: float | None) -> Demand:
        """Of a request that has a prompt and an answer of a token at least."""
        return Demand(
            prompt_tokens=1, new_tokens=1, longest_answer=1, priority=priority, timeout_s=self.timeout_s(timeout_s)
        )

    def check(self, demand: Demand, free_places: int) -> None:
        """
        Args:
            free_places: see `Backlog`.

        Raises: UnavailableError, QueueFullError.
        """
        if self.closed:
            raise UnavailableError(self.closed)
        backlog = self._meter.backlog(demand.priority, free_places)
        refusal = admit(demand, backlog, self._meter.rates, self._config)
        if refusal is not None:
            self.totals.refused += 1
            raise QueueFullError(refusal.reason, refusal.retry_after_s)

    def demand(self, spec: GenerateSpec, timeout_s: float | None) -> Demand:
        request = spec.request
        return Demand(
            prompt_tokens=request.num_tokens,
            new_tokens=request.stopping.max_new_tokens * len(request.choices) - sum(map(len, spec.received)),
            longest_answer=request.stopping.max_new_tokens,
            priority=request.priority,
            timeout_s=self.timeout_s(timeout_s),
            choices=len(request.choices),
        )

    def sent(self, prompt_tokens: int, cached_tokens: int, now_s: float) -> None:
        """A prompt is on its way to a prefill worker that probably has so many of its tokens."""
        self._requests.arrived(now_s, prompt_tokens, cached_tokens)

    def request_load(self, now_s: float, queued_prompt_tokens: float, waiting: int) -> RequestLoad:
        """What the autoscaler goes by."""
        return self._requests.load(now_s, queued_prompt_tokens, waiting)

    def accept(self, live: LiveRequest, now_s: float) -> None:
        self._meter.accept(live.demand, now_s)

    def count(self, live: LiveRequest, choice: int, now_s: float) -> None:
        """A token of a choice was committed."""
        self.totals.tokens += 1
        if not live.prefilled:
            live.prefilled = True
            self._meter.prefilled(live.demand, now_s)
            live.first_token_s = now_s
            request = live.journal.request
            ttft_s = now_s - request.arrival_s
            self._requests.first_token(now_s, ttft_s, request.num_prompt_tokens)
            self.histograms.ttft_s.note(ttft_s)
        last_s = live.last_token_s.get(choice)
        if last_s is not None:
            self.histograms.itl_s.note(now_s - last_s)
        self._meter.generated(now_s, None if last_s is None else now_s - last_s)
        live.last_token_s[choice] = now_s

    def end(self, live: LiveRequest, outcome: Outcome, now_s: float) -> None:
        setattr(self.totals, outcome.kind, getattr(self.totals, outcome.kind) + 1)
        finished, request = outcome.kind == "finished", live.journal.request
        if finished:
            self.histograms.finished(now_s - request.arrival_s, request.num_prompt_tokens, live.num_generated)
            if live.first_token_s is not None:
                longest = max(len(live.journal.token_ids(choice)) for choice in request.choices)
                self._requests.finished(now_s, now_s - live.first_token_s, longest)
        self._meter.end(live.demand, live.num_generated, prefilled=live.prefilled, finished=finished, now_s=now_s)
