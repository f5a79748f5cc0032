from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import zmq

from octet.errors import UnavailableError
from octet.ids import RequestId, WorkerId
from octet.mailbox import AsyncMailbox, Mailbox
from octet.messages import Abort, Message

HOST = "127.0.0.1"
PATIENT_S = 20.0
PEER = WorkerId("decode-0")


def message(number: int) -> Abort:
    return Abort(request_id=RequestId("r"), choice=number)


@pytest.fixture
def mailboxes() -> Iterator[tuple[Mailbox, Mailbox]]:
    with contextlib.closing(Mailbox(HOST)) as sender, contextlib.closing(Mailbox(HOST)) as receiver:
        sender.connect({PEER: receiver.address})
        yield sender, receiver


def receive(mailbox: Mailbox, count: int) -> list[Message]:
    messages: list[Message] = []
    deadline_s = time.monotonic() + PATIENT_S
    while len(messages) < count and time.monotonic() < deadline_s:
        messages += mailbox.receive(PATIENT_S)
    return messages


def test_messages_arrive_in_the_order_in_which_they_were_sent(mailboxes: tuple[Mailbox, Mailbox]) -> None:
    sender, receiver = mailboxes
    for number in range(500):
        sender.send(PEER, message(number))
    assert receive(receiver, 500) == [message(number) for number in range(500)]


def test_any_thread_may_send(mailboxes: tuple[Mailbox, Mailbox]) -> None:
    sender, receiver = mailboxes
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda number: sender.send(PEER, message(number)), range(400)))
    assert sorted(m.choice or 0 for m in receive(receiver, 400) if isinstance(m, Abort)) == list(range(400))


def test_a_receive_without_messages_returns_at_its_deadline() -> None:
    with contextlib.closing(Mailbox(HOST)) as mailbox:
        assert mailbox.receive(0.05) == []


def test_a_wake_ends_a_receive() -> None:
    with contextlib.closing(Mailbox(HOST)) as mailbox, ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(mailbox.receive, PATIENT_S)
        start_s = time.monotonic()
        mailbox.wake()
        assert waiting.result(PATIENT_S) == []
        assert time.monotonic() - start_s < PATIENT_S / 2


def test_many_threads_may_wake() -> None:
    with contextlib.closing(Mailbox(HOST)) as mailbox:
        threads = [threading.Thread(target=mailbox.wake) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert mailbox.receive(PATIENT_S) == []


def test_a_message_to_a_peer_that_was_forgotten_is_unavailable(mailboxes: tuple[Mailbox, Mailbox]) -> None:
    sender, receiver = mailboxes
    for _ in range(2):
        sender.disconnect([PEER])
    with pytest.raises(UnavailableError, match="decode-0"):
        sender.send(PEER, message(0))
    sender.connect({PEER: receiver.address})
    sender.send(PEER, message(1))
    assert receive(receiver, 1) == [message(1)]


def test_a_message_to_an_unknown_peer_is_unavailable(mailboxes: tuple[Mailbox, Mailbox]) -> None:
    with pytest.raises(UnavailableError, match="decode-7"):
        mailboxes[0].send(WorkerId("decode-7"), message(0))


def test_a_message_to_a_peer_that_is_not_there_yet_waits_for_it() -> None:
    with contextlib.closing(Mailbox(HOST)) as gone:
        address = gone.address
    with contextlib.closing(Mailbox(HOST)) as sender:
        sender.connect({PEER: address})
        sender.send(PEER, message(1))
        late: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.PULL)
        late.bind(address)
        assert late.poll(int(PATIENT_S * 1000))
        late.close(linger=0)


def test_a_peer_may_come_back_under_another_address(mailboxes: tuple[Mailbox, Mailbox]) -> None:
    sender, _ = mailboxes
    with contextlib.closing(Mailbox(HOST)) as moved:
        sender.connect({PEER: moved.address})
        sender.send(PEER, message(3))
        assert receive(moved, 1) == [message(3)]


def test_garbage_is_dropped_and_costs_no_message(mailboxes: tuple[Mailbox, Mailbox]) -> None:
    sender, receiver = mailboxes
    stranger: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.PUSH)
    stranger.connect(receiver.address)
    stranger.send(b"hello")
    assert receiver.receive(PATIENT_S) == []
    sender.send(PEER, message(4))
    assert receive(receiver, 1) == [message(4)]
    stranger.close(linger=0)


def test_a_closed_mailbox_does_not_wait_for_peers_that_never_read() -> None:
    sender = Mailbox(HOST)
    with contextlib.closing(Mailbox(HOST)) as gone:
        address = gone.address
    sender.connect({PEER: address})
    sender.send(PEER, message(0))
    start_s = time.monotonic()
    sender.close()
    assert time.monotonic() - start_s < PATIENT_S / 4


async def test_the_two_kinds_of_mailbox_talk_to_each_other() -> None:
    frontend, worker = AsyncMailbox(HOST), Mailbox(HOST)
    try:
        frontend.connect({PEER: worker.address})
        worker.connect({WorkerId("frontend-0"): frontend.address})
        frontend.send(PEER, message(1))
        question = await asyncio.to_thread(worker.receive, PATIENT_S)
        worker.send(WorkerId("frontend-0"), message(2))
        answer = await asyncio.wait_for(frontend.receive(), PATIENT_S)
        assert ([*question], answer) == ([message(1)], message(2))
    finally:
        frontend.close()
        worker.close()


async def test_an_async_mailbox_refuses_unknown_peers() -> None:
    mailbox = AsyncMailbox(HOST)
    with pytest.raises(UnavailableError):
        mailbox.send(PEER, message(0))
    mailbox.close()
