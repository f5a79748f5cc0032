"""More load than two simulated workers can carry, in virtual time."""

from __future__ import annotations

import asyncio
import dataclasses
import random
from typing import cast

import pytest

from cluster.frontend.frontend import Frontend
from cluster.frontend.validation import parse_request
from cluster.planning import make_plan
from octet.config import load_config
from octet.errors import OctetError, QueueFullError
from octet.ids import WorkerId
from octet.mailbox import AsyncMailbox
from octet.v1 import octet_pb2 as pb
from tests.unit.cluster.pools import Pools, PoolsMailbox, VirtualLoop, Worker

TICK_S, WARM_UP_S, SECONDS = 0.02, 5.0, 30.0
"""Rates are measured in the warm-up, with a sustainable load; only what arrives later is counted."""
PREFILL_S = 0.08
"""Of a prompt."""
MAX_BATCH, STEP_S, STEP_PER_SEQUENCE_S = 16, 0.02, 0.002
NEW_TOKENS, DEADLINE_S = 32, 5.0
SUSTAINABLE = MAX_BATCH / (STEP_S + MAX_BATCH * STEP_PER_SEQUENCE_S) / NEW_TOKENS
"""Requests per second of the decode worker, about 9.6; the prefill worker takes 12.5."""
PLAN = make_plan(load_config(None, ["frontend.max_requests=100000", f"decode.max_batch={MAX_BATCH}"]))


@dataclasses.dataclass
class Counts:
    in_time: int = 0
    late: int = 0
    refused: int = 0
    important: int = 0
    refused_important: int = 0


class Overload:
    def __init__(self, loop: VirtualLoop, rate: float, share_important: float = 0.0) -> None:
        self._loop, self._rate, self._share_important = loop, rate, share_important
        self._random = random.Random(0)
        self._pools = Pools()
        self._mailbox = PoolsMailbox(self._pools)
        self._frontend = Frontend(WorkerId("frontend-0"), PLAN, None, cast(AsyncMailbox, self._mailbox))
        self._prefill, self._decode = Worker(WorkerId("prefill-0")), Worker(WorkerId("decode-0"))
        self._pools.prefill[self._prefill.worker_id] = self._prefill
        self._pools.decode[self._decode.worker_id] = self._decode
        self._readers: set[asyncio.Task[None]] = set()
        self.counts = Counts()

    async def run(self) -> Counts:
        self._frontend.serve({self._prefill.worker_id: ""}, {self._decode.worker_id: ""})
        begin_s = arrival_s = prefill_s = decode_s = self._loop.now_s
        while self._loop.now_s < begin_s + SECONDS:
            now_s = self._loop.now_s = self._loop.now_s + TICK_S
            while arrival_s <= now_s:
                warm = arrival_s >= begin_s + WARM_UP_S
                self._arrive(self.counts if warm else Counts())
                arrival_s += self._random.expovariate(self._rate if warm else 0.8 * SUSTAINABLE)
            if prefill_s <= now_s:
                self._pools.step_prefill(self._prefill)
                prefill_s = now_s + PREFILL_S
            if decode_s <= now_s:
                self._pools.step_decode(self._decode, MAX_BATCH)
                decode_s = now_s + STEP_S + STEP_PER_SEQUENCE_S * len(self._decode.sequences)
            for reports in self._pools.reports.values():
                while reports:
                    self._mailbox.inbound.put_nowait(reports.popleft())
            for _ in range(4):
                await asyncio.sleep(0)
        for reader in self._readers:
            reader.cancel()
        await asyncio.gather(*self._readers, return_exceptions=True)
        self._frontend.close()
        await asyncio.sleep(0)
        return self.counts

    def _arrive(self, counts: Counts) -> None:
        important = self._random.random() < self._share_important
        request = pb.GenerateRequest(
            token_ids=pb.TokenIds(ids=[1, 2, 3]),
            stopping=pb.Stopping(max_new_tokens=NEW_TOKENS, ignore_eos=True),
            priority=-1 if important else 0,
        )
        reader = asyncio.get_running_loop().create_task(self._read(request, counts))
        self._readers.add(reader)
        reader.add_done_callback(self._readers.discard)

    async def _read(self, request: pb.GenerateRequest, counts: Counts) -> None:
        counts.important += request.priority < 0
        spec = parse_request(request, self._frontend.limits, None)
        try:
            with self._frontend.generate(spec, DEADLINE_S) as reader:
                async for _ in reader.increments():
                    pass
            counts.in_time += 1
        except QueueFullError:
            counts.refused += 1
            counts.refused_important += request.priority < 0
        except OctetError:
            counts.late += 1


def overloaded(multiple: float, share_important: float = 0.0) -> Counts:
    loop = VirtualLoop()
    try:
        return loop.run_until_complete(Overload(loop, multiple * SUSTAINABLE, share_important).run())
    finally:
        loop.close()


@pytest.fixture(scope="module")
def sustained() -> Counts:
    return overloaded(1.0)


@pytest.mark.parametrize("multiple", [2.0, 10.0])
def test_beyond_what_is_sustainable_goodput_stays(sustained: Counts, multiple: float) -> None:
    counts = overloaded(multiple)
    assert counts.in_time >= 0.9 * sustained.in_time
    assert counts.refused > 0


def test_what_was_accepted_is_rarely_late() -> None:
    counts = overloaded(10.0)
    assert counts.late < 0.05 * counts.in_time


def test_what_is_important_is_accepted_while_there_is_less_of_it_than_is_sustainable() -> None:
    counts = overloaded(5.0, share_important=0.1)
    assert counts.refused_important < 0.1 * counts.important
    assert counts.refused > 0.7 * (counts.refused + counts.in_time)
