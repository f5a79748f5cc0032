from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager

import pytest
import torch

from octet.errors import LaneError, LaneTimeoutError, PeerLostError, WrongEpochError
from octet.ids import Epoch
from router.channel import GroupChannel, KvChannel, LocalChannel
from tests.exchange_conformance import MARGIN_S, PATIENT_S, SHORT_S, form_group, within

EPOCH = Epoch(2)


@dataclasses.dataclass(frozen=True)
class Ends:
    prefill: KvChannel
    decode: KvChannel


Open = Callable[[float], AbstractContextManager[Ends]]


@contextlib.contextmanager
def local(timeout_s: float) -> Iterator[Ends]:
    channel = LocalChannel(timeout_s)
    yield Ends(channel, channel)


@contextlib.contextmanager
def gloo(timeout_s: float, decode_epoch: Epoch = EPOCH) -> Iterator[Ends]:
    source, target = form_group(timeout_s)
    ends = Ends(GroupChannel(source, EPOCH, timeout_s), GroupChannel(target, decode_epoch, timeout_s))
    try:
        yield ends
    finally:
        ends.prefill.close()
        ends.decode.close()


@pytest.fixture(params=[local, gloo])
def open_channel(request: pytest.FixtureRequest) -> Open:
    opens: Open = request.param
    return opens


def transfer(ends: Ends, pages: torch.Tensor | None, expected_bytes: int) -> torch.Tensor | None:
    with ThreadPoolExecutor(1) as pool:
        sent = pool.submit(ends.prefill.send, pages)
        try:
            return ends.decode.receive(expected_bytes)
        finally:
            sent.result(PATIENT_S)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pages_arrive_as_they_were_sent(open_channel: Open, dtype: torch.dtype) -> None:
    pages = torch.randn(3, 2, 5, 4, 2, 8).to(dtype)
    with open_channel(PATIENT_S) as ends:
        arrived = transfer(ends, pages, pages.nbytes)
    assert arrived is not None
    assert torch.equal(arrived.view(dtype).view(pages.shape), pages)


def test_a_lease_that_is_gone_arrives_as_none(open_channel: Open) -> None:
    with open_channel(PATIENT_S) as ends:
        assert transfer(ends, None, 4096) is None


def test_a_channel_carries_one_answer_after_another(open_channel: Open) -> None:
    answers = [torch.randn(16), None, torch.randn(1), torch.randn(64)]
    with open_channel(PATIENT_S) as ends:
        for answer in answers:
            arrived = transfer(ends, answer, 4 if answer is None else answer.nbytes)
            assert (arrived is None) == (answer is None)
            if arrived is not None and answer is not None:
                assert torch.equal(arrived.view(torch.float32), answer)


def test_fewer_pages_than_expected_are_refused(open_channel: Open) -> None:
    with open_channel(PATIENT_S) as ends, pytest.raises(LaneError, match="bytes"):
        transfer(ends, torch.zeros(8), 64)


def test_a_silent_peer_is_given_up_at_the_deadline(open_channel: Open) -> None:
    with open_channel(SHORT_S) as ends, within(SHORT_S + MARGIN_S), pytest.raises(LaneTimeoutError):
        ends.decode.receive(64)


def test_a_peer_that_closes_is_noticed_at_once() -> None:
    with gloo(PATIENT_S) as ends:
        ends.prefill.close()
        with within(MARGIN_S), pytest.raises(PeerLostError):
            ends.decode.receive(64)


def test_closing_frees_who_waits_at_the_same_end() -> None:
    with gloo(PATIENT_S) as ends, ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(ends.prefill.send, torch.zeros(8))
        ends.prefill.close()
        with within(MARGIN_S), pytest.raises(LaneError):
            waiting.result(PATIENT_S)


def test_pages_of_another_epoch_are_recognised() -> None:
    with gloo(PATIENT_S, decode_epoch=Epoch(9)) as ends, pytest.raises(WrongEpochError):
        transfer(ends, torch.zeros(16), 64)
