"""`octet metrics`: what a cluster tells of itself, for Prometheus to collect.

A process of its own asks the cluster at every scrape, with `GetStatus` as `octet status` does: nothing runs in the
cluster for it, and it may run anywhere. Counters are the cluster's own, so that a scrape more or less changes nothing;
gauges of loads are means over the last `window_s`.
"""

from __future__ import annotations

import dataclasses
import sys
import threading
from collections.abc import Callable, Iterator, Sequence

from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from octet.addresses import with_port
from octet.client import Client
from octet.errors import ConfigError
from octet.resumption import CallError
from octet.v1 import octet_pb2 as pb
from ops.stopping import stop_signals

ANSWER_S = 8.0
"""How long a cluster has to answer: scrapes are given up after 10 s by default."""
_LOOK_EVERY_S = 0.5
"""A signal that another thread gets does not wake the main one, where Python handles it."""
_UP = "Whether the cluster answered this scrape."
STATES = ("STARTING", "READY", "DEGRADED", "DRAINING", "FAILED")


@dataclasses.dataclass(frozen=True)
class _PerMember:
    name: str
    about: str
    pools: Sequence[str]
    field: str
    """Of `Member`, or of `MemberLoad`."""
    grows: bool = False


_EVERYBODY = ("prefill", "decode", "experts")
_WORKERS, _PREFILL, _DECODE, _EXPERTS = _EVERYBODY[:2], _EVERYBODY[:1], _EVERYBODY[1:2], _EVERYBODY[2:]
_MEMBERS = (
    _PerMember("tokens", "Prefill: computed; decode: generated; experts: rows.", _EVERYBODY, "tokens", grows=True),
    _PerMember("resident_bytes", "Memory that the process holds.", _EVERYBODY, "resident_bytes"),
    _PerMember("kv_pages", "KV pages.", _WORKERS, "kv_pages_total"),
    _PerMember("kv_pages_free", "Of them, those that nobody holds.", _WORKERS, "kv_pages_free"),
    _PerMember("running_sequences", "Sequences in the batch.", _WORKERS, "running"),
    _PerMember("waiting_sequences", "Sequences in the member's queue.", _WORKERS, "waiting"),
    _PerMember("cached_tokens", "Prompt tokens found in the prefix cache.", _PREFILL, "cached_tokens", grows=True),
    _PerMember("leases", "Hand-offs that are not acknowledged.", _PREFILL, "leases"),
    _PerMember("preemptions", "Sequences that had to give their pages back.", _DECODE, "preemptions", grows=True),
    _PerMember("drafted_tokens", "Tokens drafted and verified.", _DECODE, "drafted_tokens", grows=True),
    _PerMember("accepted_tokens", "Drafted tokens that were right.", _DECODE, "accepted_tokens", grows=True),
    _PerMember("held_experts", "Experts in its memory, over all layers.", _EXPERTS, "num_held"),
)
_LOADS = (
    _PerMember("busy_seconds", "Within steps, or computing frames.", _EVERYBODY, "total_busy_s", grows=True),
    _PerMember("steps_per_second", "Steps, or frames of a shard.", _EVERYBODY, "frames_per_s"),
    _PerMember("step_seconds", "A step, on average.", _WORKERS, "step_s"),
    _PerMember("experts_wait_ratio", "Of steps' time, waiting for experts.", _WORKERS, "wait_share"),
    _PerMember("frame_wait_seconds", "A frame's wait for its turn, on average.", _EXPERTS, "wait_s"),
    _PerMember("waiting_frames", "Frames that wait for their turn.", _EXPERTS, "queue_depth"),
    _PerMember("experts_per_frame", "Experts that a frame hits, on average.", _EXPERTS, "activated_experts"),
)


def serve(client: Client, host: str, port: int, window_s: float, *, experts: bool) -> None:
    """Answer scrapes until SIGTERM or Ctrl-C.

    Args:
        port: 0 picks a free one.
        window_s: of what is no counter.
        experts: also tell of every layer's every expert, a series each.

    Raises: ConfigError if the port cannot be had.
    """
    registry, stop = CollectorRegistry(), threading.Event()
    registry.register(StatusCollector(lambda: client.status(window_s=window_s), experts=experts))
    with stop_signals(stop):
        try:
            server, thread = start_http_server(port, host, registry)
        except OSError as error:
            raise ConfigError("--host, --port", f"{host}:{port} ({error.strerror})", "one that is free") from None
        print(f"octet: metrics http://{with_port(host, server.server_port)}/metrics", flush=True)
        while not stop.wait(_LOOK_EVERY_S):
            pass
        server.shutdown()
        server.server_close()
        thread.join()


def _on_stderr(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


class StatusCollector(Collector):
    """Asks for the status at every scrape. Where nobody answers, `octet_up` says so, and nothing else is told."""

    def __init__(
        self,
        ask: Callable[[], pb.GetStatusResponse],
        *,
        experts: bool,
        tell: Callable[[str], object] = _on_stderr,
    ) -> None:
        """
        Args:
            tell: told why nobody answers, and when somebody does again: Prometheus does not hear of that.
        """
        self._ask, self._experts, self._tell = ask, experts, tell
        self._trouble = ""

    def collect(self) -> Iterator[Metric]:
        try:
            status = self._ask()
        except CallError as error:
            self._note(str(error))
            yield _gauge("up", _UP, 0)
            return
        self._note("")
        yield _gauge("up", _UP, 1)
        yield from _cluster(status)
        yield from _requests(status)
        yield from _members(status)
        yield from _layers(status, experts=self._experts)

    def _note(self, trouble: str) -> None:
        if trouble != self._trouble:
            self._trouble = trouble
            self._tell(f"octet: {trouble or 'the cluster answers'}")


def _cluster(status: pb.GetStatusResponse) -> Iterator[Metric]:
    states = GaugeMetricFamily("octet_state", "1 for the state that the cluster is in.", labels=["state"])
    for state in STATES:
        states.add_metric([state], float(state == status.state))
    yield states
    yield _gauge("epoch", "Number of the membership in force.", status.epoch)
    yield _gauge("placement_version", "Number of the experts' placement in force.", status.placement_version)
    yield _gauge("change_under_way", "Whether pools or experts are being changed.", bool(status.change_under_way))
    yield _gauge("window_seconds", "What load gauges are means over.", status.window_s)
    if status.autoscaler_enabled:
        labels = ["pool"]
        wanted = GaugeMetricFamily("octet_pool_wanted", "Members that the autoscaler finds needed.", labels=labels)
        target = GaugeMetricFamily("octet_pool_target", "Members that the autoscaler goes to.", labels=labels)
        for decision in status.latest_decisions:
            wanted.add_metric([decision.pool], decision.wanted)
            target.add_metric([decision.pool], decision.target)
        yield from (wanted, target)


def _requests(status: pb.GetStatusResponse) -> Iterator[Metric]:
    yield _gauge("live_requests", "Requests that are accepted and not ended.", status.live_requests)
    ended = CounterMetricFamily("octet_requests", "Requests by what became of them.", labels=["outcome"])
    for outcome in ("finished", "failed", "cancelled", "refused"):
        ended.add_metric([outcome], getattr(status, f"requests_{outcome}"))
    yield ended
    yield _counter("generated_tokens", "Tokens of answers.", status.tokens_served)
    told = status.request_histograms
    for name, about, histogram in (
        ("time_to_first_token_seconds", "From a request's arrival to its first token.", told.ttft_s),
        ("inter_token_latency_seconds", "Between two tokens of a choice.", told.itl_s),
        ("e2e_request_latency_seconds", "Finished requests, from arrival to end.", told.e2e_s),
        ("request_prompt_tokens", "Prompt tokens of finished requests.", told.prompt_tokens),
        ("request_generation_tokens", "Tokens of finished requests' choices.", told.new_tokens),
    ):
        yield _histogram(name, about, histogram)


def _members(status: pb.GetStatusResponse) -> Iterator[Metric]:
    count = GaugeMetricFamily("octet_members", "Members by pool and state.", labels=["pool", "state"])
    for pool in status.pools:
        for state in sorted({member.state for member in pool.members}):
            count.add_metric([pool.name, state], sum(member.state == state for member in pool.members))
    yield count
    for each in (*_MEMBERS, *_LOADS):
        kind = CounterMetricFamily if each.grows else GaugeMetricFamily
        family = kind(f"octet_member_{each.name}", each.about, labels=["pool", "member"])
        for pool in status.pools:
            for member in pool.members if pool.name in each.pools else ():
                # Who did not answer the telemetry has no load.
                if each in _MEMBERS or member.HasField("load"):
                    told = member if each in _MEMBERS else member.load
                    family.add_metric([pool.name, member.worker_id], float(getattr(told, each.field)))
        yield family
    about = "Connections of strangers to its sockets."
    yield _with_frontend(status, "strangers_refused", about, "refused", status.strangers_refused)
    about = "Messages to its mailbox that were none."
    yield _with_frontend(status, "messages_dropped", about, "dropped", status.messages_dropped)


def _with_frontend(status: pb.GetStatusResponse, name: str, about: str, field: str, total: int) -> Metric:
    """A sum over members would fall when one leaves, which no counter may: what is left of it is the frontend's."""
    family = CounterMetricFamily(f"octet_member_{name}", about, labels=["pool", "member"])
    for pool in status.pools:
        for member in pool.members:
            family.add_metric([pool.name, member.worker_id], getattr(member, field))
            total -= getattr(member, field)
    family.add_metric(["frontend", "frontend"], total)
    return family


def _layers(status: pb.GetStatusResponse, *, experts: bool) -> Iterator[Metric]:
    yield _gauge("balancedness", "Mean over layers with traffic of mean ÷ max over shards.", status.balancedness)
    balance = GaugeMetricFamily("octet_layer_balancedness", "The same of a layer; 0 is no traffic.", labels=["layer"])
    tokens = CounterMetricFamily("octet_expert_tokens", "Token rows by logical expert.", labels=["layer", "expert"])
    for counts in status.expert_counts:
        balance.add_metric([str(counts.layer)], counts.balancedness)
        for expert, rows in enumerate(counts.tokens if experts else ()):
            tokens.add_metric([str(counts.layer), str(expert)], rows)
    yield balance
    if experts:
        yield tokens


def _gauge(name: str, about: str, value: float) -> Metric:
    return GaugeMetricFamily(f"octet_{name}", about, value=value)


def _counter(name: str, about: str, value: float) -> Metric:
    return CounterMetricFamily(f"octet_{name}", about, value=value)


def _histogram(name: str, about: str, told: pb.Histogram) -> Metric:
    family, so_far, buckets = HistogramMetricFamily(f"octet_{name}", about), 0, []
    for bound, count in zip([*told.bounds, float("inf")], told.counts, strict=True):
        so_far += count
        buckets.append(("+Inf" if bound == float("inf") else repr(bound), so_far))
    family.add_metric([], buckets=buckets, sum_value=told.sum)
    return family
