"""What Prometheus is told of a cluster, and what the files in deploy/ ask of it."""

from __future__ import annotations

import json
import pathlib
import random
import re
import socket

import grpc
import pytest
import yaml
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from octet.client import Client
from octet.errors import ConfigError
from octet.resumption import CallError
from octet.v1 import octet_pb2 as pb
from ops.metrics import StatusCollector, serve

ROOT = pathlib.Path(__file__).parents[3]
LAYERS, EXPERTS = (1, 2), 4

Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


def histogram() -> pb.Histogram:
    counts = [random.randrange(10) for _ in range(4)]
    return pb.Histogram(bounds=[0.5, 1.0, 2.5], counts=counts, sum=random.uniform(0, 9))


def some_status() -> pb.GetStatusResponse:
    """One in which everything is told."""
    load = pb.MemberLoad(total_busy_s=12.5, frames_per_s=3, step_s=0.25, wait_share=0.5, wait_s=0.125, queue_depth=2)
    return pb.GetStatusResponse(
        state="DEGRADED",
        pools=[
            pb.Pool(
                name="prefill", members=[pb.Member(worker_id="prefill-0", state="READY", cached_tokens=5, load=load)]
            ),
            pb.Pool(
                name="decode",
                members=[
                    pb.Member(worker_id="decode-0", state="READY", tokens=random.randrange(10**9), load=load),
                    pb.Member(worker_id="decode-1", state="SILENT", kv_pages_total=9, kv_pages_free=4),
                ],
            ),
            pb.Pool(name="experts", members=[pb.Member(worker_id="experts-0", state="READY", num_held=7, load=load)]),
        ],
        epoch=random.randrange(99),
        requests_finished=random.randrange(99),
        requests_refused=random.randrange(99),
        tokens_served=random.randrange(10**12),
        expert_counts=[
            pb.ExpertCounts(layer=layer, tokens=random.choices(range(10**9), k=EXPERTS), balancedness=random.random())
            for layer in LAYERS
        ],
        balancedness=0.75,
        autoscaler_enabled=True,
        latest_decisions=[pb.ScalingDecision(pool="decode", current=2, wanted=5, target=3)],
        request_histograms=pb.RequestHistograms(
            ttft_s=histogram(), itl_s=histogram(), e2e_s=histogram(), prompt_tokens=histogram(), new_tokens=histogram()
        ),
    )


def told(status: pb.GetStatusResponse, *, experts: bool = True) -> Samples:
    """As a scrape has it."""
    registry = CollectorRegistry()
    registry.register(StatusCollector(lambda: status, experts=experts))
    text = generate_latest(registry).decode()
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def labels(**values: str) -> frozenset[tuple[str, str]]:
    return frozenset(values.items())


def test_counters_are_the_clusters_own() -> None:
    status = some_status()
    samples = told(status)
    decode_0 = status.pools[1].members[0]
    assert samples["octet_requests_total", labels(outcome="finished")] == status.requests_finished
    assert samples["octet_requests_total", labels(outcome="refused")] == status.requests_refused
    assert samples["octet_generated_tokens_total", labels()] == status.tokens_served
    assert samples["octet_member_tokens_total", labels(pool="decode", member="decode-0")] == decode_0.tokens
    assert samples["octet_member_busy_seconds_total", labels(pool="experts", member="experts-0")] == 12.5
    for counts in status.expert_counts:
        for expert, rows in enumerate(counts.tokens):
            assert samples["octet_expert_tokens_total", labels(layer=str(counts.layer), expert=str(expert))] == rows


def test_the_cluster_is_in_one_state() -> None:
    samples = told(some_status())
    states = {dict(where)["state"]: value for (name, where), value in samples.items() if name == "octet_state"}
    assert states == {"STARTING": 0, "READY": 0, "DEGRADED": 1, "DRAINING": 0, "FAILED": 0}
    assert samples["octet_up", labels()] == 1
    assert samples["octet_members", labels(pool="decode", state="SILENT")] == 1
    assert samples["octet_pool_target", labels(pool="decode")] == 3


def test_buckets_count_whatever_is_no_larger() -> None:
    status = some_status()
    samples, of = told(status), status.request_histograms.itl_s
    name = "octet_inter_token_latency_seconds"
    found = [samples[f"{name}_bucket", labels(le=bound)] for bound in ("0.5", "1.0", "2.5", "+Inf")]
    assert found == [sum(of.counts[: number + 1]) for number in range(4)]
    assert samples[f"{name}_count", labels()] == sum(of.counts)
    assert samples[f"{name}_sum", labels()] == pytest.approx(of.sum)


def test_of_a_member_that_does_not_answer_there_is_what_is_known_and_no_load() -> None:
    samples = told(some_status())
    silent = {name: value for (name, where), value in samples.items() if ("member", "decode-1") in where}
    assert silent["octet_member_kv_pages_free"] == 4
    assert not [name for name in silent if "busy" in name or "step" in name]


@pytest.mark.parametrize(
    ("name", "pools"),
    [
        ("resident_bytes", {"prefill", "decode", "experts"}),
        ("kv_pages", {"prefill", "decode"}),
        ("leases", {"prefill"}),
        ("drafted_tokens_total", {"decode"}),
        ("held_experts", {"experts"}),
        ("step_seconds", {"prefill", "decode"}),
        ("frame_wait_seconds", {"experts"}),
    ],
)
def test_members_tell_of_what_their_pool_has(name: str, pools: set[str]) -> None:
    """Or a mean over members would have zeros of those that have no such thing."""
    samples = told(some_status())
    assert {dict(where)["pool"] for each, where in samples if each == f"octet_member_{name}"} == pools


def test_what_no_member_has_counted_is_the_frontends() -> None:
    status = some_status()
    for pool in status.pools:
        for member in pool.members:
            member.refused = random.randrange(99)
    of_members = sum(member.refused for pool in status.pools for member in pool.members)
    status.strangers_refused = of_members + 5
    samples = told(status)
    name = "octet_member_strangers_refused_total"
    assert samples[name, labels(pool="frontend", member="frontend")] == 5
    assert sum(value for (each, _), value in samples.items() if each == name) == status.strangers_refused


def test_experts_may_be_left_out() -> None:
    names = {name for name, _ in told(some_status(), experts=False)}
    assert "octet_expert_tokens_total" not in names
    assert {"octet_layer_balancedness", "octet_balancedness"} <= names


def test_a_cluster_that_does_not_answer_is_told_as_one_that_is_down() -> None:
    gone = CallError(grpc.StatusCode.UNAVAILABLE, "nobody listens")
    answers: list[pb.GetStatusResponse | CallError] = [gone, gone, some_status(), some_status(), gone]
    coming, lines = iter(answers), list[str]()

    def ask() -> pb.GetStatusResponse:
        answer = next(coming)
        if isinstance(answer, CallError):
            raise answer
        return answer

    collector = StatusCollector(ask, experts=True, tell=lines.append)
    for answer in answers:
        scrape = {sample.name: sample.value for family in collector.collect() for sample in family.samples}
        assert scrape["octet_up"] == (answer is not gone)
        assert (len(scrape) == 1) == (answer is gone)
    # Why is said once.
    down = "octet: UNAVAILABLE: nobody listens"
    assert lines == [down, "octet: the cluster answers", down]


def test_a_port_that_somebody_has_is_refused_by_name() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken, Client("127.0.0.1:1", timeout_s=1.0) as client:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=rf"--host, --port.*127\.0\.0\.1:{port}"):
            serve(client, "127.0.0.1", port, 15.0, experts=True)


def families() -> set[str]:
    """Names of all that is told, as queries have them."""
    return {name for name, _ in told(some_status())}


def test_the_dashboard_asks_for_what_is_told() -> None:
    dashboard = json.loads((ROOT / "deploy/monitoring/grafana.json").read_text())
    queries = [target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", ())]
    queries += [each["query"] for each in dashboard["templating"]["list"]]
    asked = {name for query in queries for name in re.findall(r"octet_\w+", query)}
    assert len(queries) > 30
    assert asked - families() == set()


def test_panels_of_the_dashboard_do_not_overlap() -> None:
    dashboard = json.loads((ROOT / "deploy/monitoring/grafana.json").read_text())
    taken = [
        (panel["gridPos"]["x"] + x, panel["gridPos"]["y"] + y)
        for panel in dashboard["panels"]
        for x in range(panel["gridPos"]["w"])
        for y in range(panel["gridPos"]["h"])
    ]
    assert len(taken) == len(set(taken))
    assert max(x for x, _ in taken) < 24
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])


def test_prometheus_is_told_the_port_that_is_the_default() -> None:
    config = yaml.safe_load((ROOT / "deploy/monitoring/prometheus.yaml").read_text())
    targets = [
        target for job in config["scrape_configs"] for each in job["static_configs"] for target in each["targets"]
    ]
    assert targets == ["127.0.0.1:9464"]


def test_the_documentation_lists_what_is_told() -> None:
    page = (ROOT / "docs/telemetry.md").read_text()
    suffix = re.compile(r"_(bucket|count|sum)$")
    named = {suffix.sub("", name) for name in families()}
    assert {name for name in named if f"`{name}`" not in page} == set()
