"""What a real cluster's telemetry says, against what was asked of it."""

from __future__ import annotations

import pathlib
import random
import signal
import subprocess
import sys
import urllib.request
from collections import defaultdict

import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families

from cluster.launch import RunningCluster
from octet.client import Client
from octet.v1 import octet_pb2 as pb
from router.trace.files import read_trace
from tests.clusters import Start

TOP_K = 8
STREAMS, PROMPT_TOKENS, NEW_TOKENS = 4, 40, 12


@pytest.fixture(scope="module")
def cluster(start: Start) -> RunningCluster:
    """One prefill worker, one decode worker and three shards."""
    return start("pools.experts.size=3", "prefill.prefix_cache=false", "telemetry.step_s=0.5")


@pytest.fixture(scope="module")
def status(cluster: RunningCluster) -> pb.GetStatusResponse:
    """After it has answered some requests, and nothing else."""
    with Client(cluster.address, timeout_s=60) as client:
        vocab_size = client.model_info().vocab_size
        for _ in range(STREAMS):
            prompt = random.choices(range(vocab_size), k=PROMPT_TOKENS)
            client.generate(prompt, max_new_tokens=NEW_TOKENS, ignore_eos=True)
        return client.status()


def loads_of(status: pb.GetStatusResponse, pool: str) -> list[pb.MemberLoad]:
    members = next(found.members for found in status.pools if found.name == pool)
    assert all(member.HasField("load") for member in members)
    return [member.load for member in members]


def test_the_window_has_every_computed_token_eight_times(status: pb.GetStatusResponse) -> None:
    # The last token of an answer is sampled, but not computed.
    computed = STREAMS * (PROMPT_TOKENS + NEW_TOKENS - 1)
    for counts in status.expert_counts[:-1]:
        assert sum(counts.window_tokens) == sum(counts.tokens) == TOP_K * computed
    # Of a prompt, the last layer computes the last token.
    last = status.expert_counts[-1]
    assert sum(last.window_tokens) == sum(last.tokens) == TOP_K * STREAMS * NEW_TOKENS
    assert 0 < status.window_s <= 60
    assert status.window_tokens_per_s * status.window_s == pytest.approx(computed)


def test_balancedness_is_of_the_rows_that_the_shards_served(status: pb.GetStatusResponse) -> None:
    for counts in status.expert_counts:
        # The first placement: contiguous runs.
        by_shard = [run.sum() for run in np.array_split(np.array(counts.window_tokens), 3)]
        assert counts.balancedness == pytest.approx(np.mean(by_shard) / max(by_shard))
    assert status.balancedness == pytest.approx(np.mean([counts.balancedness for counts in status.expert_counts]))


def test_the_hottest_expert_is_the_one_with_the_largest_share(status: pb.GetStatusResponse) -> None:
    ratios = {
        (counts.layer, expert): tokens / np.mean(counts.window_tokens)
        for counts in status.expert_counts
        for expert, tokens in enumerate(counts.window_tokens)
    }
    hottest = status.hottest[0]
    assert hottest.ratio == pytest.approx(max(ratios.values()))
    assert ratios[hottest.layer, hottest.expert] == hottest.ratio


def test_shards_tell_how_busy_they_were_and_with_what(status: pb.GetStatusResponse) -> None:
    for load in loads_of(status, "experts"):
        assert 0 < load.busy_share < 1
        assert load.rows_per_s >= load.frames_per_s > 0
        assert 1 <= load.activated_experts <= 11
        assert {lane.worker_id for lane in load.lanes} == {"prefill-0", "decode-0"}
        assert sum(lane.busy_share for lane in load.lanes) == pytest.approx(load.busy_share)
        assert sum(lane.rows_per_s for lane in load.lanes) == pytest.approx(load.rows_per_s)


def test_attention_workers_tell_what_they_computed_and_how_they_waited(status: pb.GetStatusResponse) -> None:
    prefill, decode = loads_of(status, "prefill")[0], loads_of(status, "decode")[0]
    for load in (prefill, decode):
        assert 0 < load.wait_share < 1
        assert 0 < load.wait_s < load.step_s
        assert 0 < load.busy_share < 1
    # Both began to serve at about the same time.
    expected = PROMPT_TOKENS / (NEW_TOKENS - 1)
    assert prefill.rows_per_s / decode.rows_per_s == pytest.approx(expected, rel=0.2)


def test_a_recording_has_every_token_of_its_time(
    cluster: RunningCluster, status: pb.GetStatusResponse, tmp_path: pathlib.Path
) -> None:
    file = tmp_path / "trace.npz"
    octet, where = str(pathlib.Path(sys.executable).parent / "octet"), ["--grpc", cluster.address]
    command = [octet, "experts", "record", str(file), *where, "--seconds", "600", "--step", "0.5"]
    with Client(cluster.address, timeout_s=60) as client:
        client.generate([1, 2, 3], max_new_tokens=4, ignore_eos=True)
        recorder = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        assert recorder.stderr is not None
        # It has begun when its first window is told.
        recorder.stderr.readline()
        client.generate([1, 2, 3], max_new_tokens=8, ignore_eos=True)
        recorder.stderr.readline()
        recorder.stderr.readline()
        recorder.send_signal(signal.SIGINT)
        _, said = recorder.communicate(timeout=30)
    assert recorder.returncode == 0, said
    trace = read_trace(file)
    loads_LE = np.sum([window.loads_LE for window in trace.windows], axis=0)
    assert loads_LE.sum(1).tolist() == [TOP_K * (3 + 7)] * (len(trace.header.layers) - 1) + [TOP_K * (1 + 7)]
    assert sum(window.tokens for window in trace.windows) == 3 + 7
    assert trace.windows[-1].members.keys() == {"prefill-0", "decode-0", "experts-0", "experts-1", "experts-2"}


def test_prometheus_is_told_what_the_cluster_has_counted(cluster: RunningCluster, status: pb.GetStatusResponse) -> None:
    octet, where = str(pathlib.Path(sys.executable).parent / "octet"), ["--grpc", cluster.address]
    command = [octet, "metrics", *where, "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            address = process.stdout.readline().split()[-1]
            with Client(cluster.address, timeout_s=60) as client:
                now = client.status()
            with urllib.request.urlopen(address, timeout=20) as answer:
                families = list(text_string_to_metric_families(answer.read().decode()))
        finally:
            process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0
    samples: dict[str, list[float]] = defaultdict(list)
    for family in families:
        for sample in family.samples:
            samples[sample.name].append(sample.value)
    assert samples["octet_up"] == [1]
    assert samples["octet_generated_tokens_total"] == [now.tokens_served]
    assert samples["octet_time_to_first_token_seconds_count"] == [now.requests_finished]
    assert samples["octet_inter_token_latency_seconds_count"] == [now.tokens_served - now.requests_finished]
    assert samples["octet_request_prompt_tokens_sum"][0] >= STREAMS * PROMPT_TOKENS
    assert samples["octet_expert_tokens_total"] == [rows for counts in now.expert_counts for rows in counts.tokens]
    assert len(samples["octet_member_busy_seconds_total"]) == 5
    assert min(samples["octet_member_busy_seconds_total"]) > 0
