"""Members are killed while streams run: every stream goes on to the tokens that `transformers` gives."""

from __future__ import annotations

import contextlib
import os
import pathlib
import random
import signal
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from cluster.fault_points import arm
from octet.client import Client
from octet.errors import ConfigError
from octet.faults import Fault
from octet.v1 import octet_pb2 as pb
from ops.chaos.history import Injected
from ops.chaos.schedule import Kill, Stop
from tests.chaos.conftest import Chaos
from tests.clusters import Start, Traffic, members, wait_until

Answers = Mapping[tuple[int, ...], Sequence[int]]
REPLICATED = ("pools.experts.size=2", "pools.experts.redundant_experts=16")
"""Every expert on two shards."""


def lost_in(fault: Injected) -> str:
    """Whom "kill decode-1" has hit."""
    return fault.what.split()[1].rstrip(",")


@pytest.mark.parametrize("pool", ["experts", "decode", "prefill"])
def test_a_killed_member_costs_no_token_and_is_replaced(chaos: Chaos, pool: str) -> None:
    verdict = chaos.run(Kill(at_s=0.3, target=pool), complete=True)
    assert verdict.violations == ()
    (fault,) = verdict.history.faults
    changes = [change for change in chaos.status().changes if lost_in(fault) in change.reason]
    assert [change.kind for change in changes] == ["recovery", "scale"]
    assert all(change.succeeded for change in changes)
    assert lost_in(fault) not in members(chaos.status(), pool)


@pytest.mark.parametrize("pool", ["decode", "experts"])
def test_every_member_of_a_pool_may_be_killed_at_once(chaos: Chaos, pool: str) -> None:
    verdict = chaos.run(Kill(at_s=0.3, target=pool, all=True), complete=True)
    assert verdict.violations == ()
    assert len(verdict.history.faults[0].what.split(",")) > 1


def test_an_answer_that_is_computed_again_has_the_log_probabilities_that_it_had(chaos: Chaos) -> None:
    """Bit for bit: no near tie, and no draw at the border of two tokens, ends another way for a lost worker."""
    wait_until(chaos.whole, 120, "every pool has its size")
    samplings: list[dict[str, Any]] = [{"temperature": 0.0}, {"temperature": 1.0, "seed": random.getrandbits(60)}] * 2
    prompts = [random.choices(range(chaos.cluster.plan.model.vocab_size), k=random.randint(1, 60)) for _ in samplings]
    under_way = threading.Barrier(len(samplings) + 1, timeout=60)

    def ask(client: Client, prompt: Sequence[int], sampling: Mapping[str, Any], barrier: bool) -> list[pb.TokenLogprob]:
        told: list[pb.TokenLogprob] = []
        for chunk in client.stream(prompt, max_new_tokens=150, ignore_eos=True, logprobs=3, **sampling):
            if barrier and len(told) < 20 <= len(told) + len(chunk.logprobs):
                under_way.wait()
            told += chunk.logprobs
        return told

    with Client(chaos.cluster.address, timeout_s=60) as client, ThreadPoolExecutor(len(samplings)) as pool:
        asked = list(zip(prompts, samplings, strict=True))
        expected = [ask(client, prompt, sampling, False) for prompt, sampling in asked]
        answers = [pool.submit(ask, client, prompt, sampling, True) for prompt, sampling in asked]
        under_way.wait()
        for victim in members(chaos.status(), "decode").values():
            os.kill(victim.pid, signal.SIGKILL)
        assert [answer.result(60) for answer in answers] == expected
    assert all(len(told) == 150 for told in expected)


@pytest.mark.parametrize("pool", ["experts", "decode"])
def test_a_member_that_hangs_is_replaced_and_does_not_come_back(chaos: Chaos, pool: str) -> None:
    verdict = chaos.run(Stop(at_s=0.3, target=pool, for_s=60), complete=True)
    assert verdict.violations == ()
    (fault,) = verdict.history.faults
    assert fault.note == "it was killed for it"
    (recovery,) = [c for c in chaos.status().changes if lost_in(fault) in c.reason and c.kind == "recovery"]
    assert "no sign of life within 1.5 s" in recovery.reason
    print(f"{lost_in(fault)} was lost {recovery.at_s - fault.at_s:.2f} s after it was stopped")
    # Two seconds, and as many for a machine that others use as well.
    assert recovery.at_s - fault.at_s < 4.0


def test_a_member_that_is_stopped_over_and_over_is_called_slow_and_not_lost(chaos: Chaos) -> None:
    wait_until(chaos.whole, 120, "every pool has its size")
    name, victim = next(iter(members(chaos.status(), "experts").items()))

    def stopped_most_of_the_time_until(state: str) -> bool:
        if state == "SLOW":
            os.kill(victim.pid, signal.SIGSTOP)
            time.sleep(0.7)
            os.kill(victim.pid, signal.SIGCONT)
        return members(chaos.status(), "experts")[name].state == state

    wait_until(lambda: stopped_most_of_the_time_until("SLOW"), 45, "it is called slow")
    wait_until(lambda: stopped_most_of_the_time_until("READY"), 60, "and not slow any more")
    assert members(chaos.status(), "experts")[name].pid == victim.pid
    slow = [change for change in chaos.status().changes if change.kind == "slow" and name in change.reason]
    assert [("missed" in change.reason, change.succeeded) for change in slow][:1] == [(True, True)]


def test_a_member_that_stays_slow_is_replaced_while_streams_go_on(
    start: Start, checkpoint: pathlib.Path, answers: Answers
) -> None:
    # A machine that is slow to wake it shall not have it taken for lost.
    patience = ("health.slow_s=1.0", "health.evict_slow_s=4.0", "health.silent_s=10")
    cluster = start(f"model.path={checkpoint}", *REPLICATED, *patience)
    with Client(cluster.address, timeout_s=60) as client, Traffic(cluster.address, answers, num_users=3) as traffic:
        traffic.flow()
        name, victim = next(iter(members(client.status(), "experts").items()))

        def shunned_and_gone() -> bool:
            with contextlib.suppress(ProcessLookupError):
                os.kill(victim.pid, signal.SIGSTOP)
                time.sleep(0.7)
                os.kill(victim.pid, signal.SIGCONT)
            return name not in members(client.status(), "experts")

        wait_until(shunned_and_gone, 60, "it is parted with")
        wait_until(lambda: len(members(client.status(), "experts")) == 2, 60, "another takes its place")
        wait_until(lambda: not pathlib.Path(f"/proc/{victim.pid}").exists(), 10, "its process is ended")
        traffic.flow()
        changes = [change for change in client.status().changes if name in change.reason]
    # On a machine that is slow itself, whoever is to go on without it may not answer in time, and is asked again.
    kinds = ["evicted" if "it has been slow for" in change.reason else change.kind for change in changes]
    evictions = [change for change, kind in zip(changes, kinds, strict=True) if kind == "evicted"]
    assert evictions, changes
    assert evictions[-1].succeeded, changes
    assert kinds.index("slow") < kinds.index("evicted"), changes
    cluster.stop(drain=False)


def test_the_data_path_goes_on_without_the_router_service(chaos: Chaos) -> None:
    verdict = chaos.run(Kill(at_s=0.3, target="router"), complete=True)
    assert verdict.violations == ()
    with Client(chaos.cluster.address, timeout_s=60) as client:
        wait_until(lambda: client.status().window_s > 0, 60, "another router service tells of the load")


def test_clients_resume_at_the_frontend_that_takes_the_place_of_a_killed_one(chaos: Chaos) -> None:
    verdict = chaos.run(Kill(at_s=0.3, target="frontend"), complete=True)
    assert verdict.violations == ()
    (change,) = [change for change in chaos.status().changes if "frontend-0" in change.reason]
    assert change.succeeded, change.outcome


def test_a_lost_shard_whose_experts_have_replicas_takes_nothing_from_the_checkpoint(
    start: Start, checkpoint: pathlib.Path, answers: Answers
) -> None:
    cluster = start(f"model.path={checkpoint}", *REPLICATED)
    with Client(cluster.address, timeout_s=60) as client:
        held = {worker_id: member.num_held for worker_id, member in members(client.status(), "experts").items()}
        with Traffic(cluster.address, answers, num_users=3) as traffic:
            traffic.flow()
            lost, victim = next(iter(members(client.status(), "experts").items()))
            os.kill(victim.pid, signal.SIGKILL)
            wait_until(lambda: lost not in members(client.status(), "experts"), 60, "the loss is dealt with")
            (survivor,) = [w for w in held if w != lost]
            assert members(client.status(), "experts")[survivor].num_held == held[survivor]
            traffic.flow()
    with pytest.raises(ConfigError, match=r"chaos\.enabled"):
        arm(cluster.plan.config.ray.namespace, survivor, Fault(point="serve", action="kill"))
    cluster.stop(drain=False)
