from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import msgpack
import pytest
import zmq

from octet.doorkeeper import MAX_MESSAGE_BYTES, Keys
from octet.errors import UnavailableError
from octet.ids import RequestId, WorkerId
from octet.mailbox import AsyncMailbox, Mailbox
from octet.messages import Abort, Message, encode
from octet.secret import ClusterSecret

HOST = "127.0.0.1"
SECRET = ClusterSecret.draw()
PATIENT_S = 20.0
PEER = WorkerId("decode-0")


def message(number: int) -> Abort:
    return Abort(request_id=RequestId("r"), choice=number)


@pytest.fixture
def mailboxes() -> Iterator[tuple[Mailbox, Mailbox]]:
    with contextlib.closing(Mailbox(HOST, SECRET)) as sender, contextlib.closing(Mailbox(HOST, SECRET)) as receiver:
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
    with contextlib.closing(Mailbox(HOST, SECRET)) as mailbox:
        assert mailbox.receive(0.05) == []


def test_a_wake_ends_a_receive() -> None:
    with contextlib.closing(Mailbox(HOST, SECRET)) as mailbox, ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(mailbox.receive, PATIENT_S)
        start_s = time.monotonic()
        mailbox.wake()
        assert waiting.result(PATIENT_S) == []
        assert time.monotonic() - start_s < PATIENT_S / 2


def test_many_threads_may_wake() -> None:
    with contextlib.closing(Mailbox(HOST, SECRET)) as mailbox:
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
    with contextlib.closing(Mailbox(HOST, SECRET)) as gone:
        address = gone.address
    with contextlib.closing(Mailbox(HOST, SECRET)) as sender:
        sender.connect({PEER: address})
        sender.send(PEER, message(1))
        late: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.PULL)
        late.curve_server, late.curve_secretkey = True, Keys(SECRET).private
        late.bind(address)
        assert late.poll(int(PATIENT_S * 1000))
        late.close(linger=0)


def test_a_peer_may_come_back_under_another_address(mailboxes: tuple[Mailbox, Mailbox]) -> None:
    sender, _ = mailboxes
    with contextlib.closing(Mailbox(HOST, SECRET)) as moved:
        sender.connect({PEER: moved.address})
        sender.send(PEER, message(3))
        assert receive(moved, 1) == [message(3)]


def push_to(address: str, secret: ClusterSecret | None) -> zmq.Socket[bytes]:
    """A socket that is no mailbox's; with a secret it may come in."""
    socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.PUSH)
    if secret is not None:
        Keys(secret).show(socket)
    socket.connect(address)
    return socket


def test_a_members_garbage_is_dropped_and_costs_no_message(mailboxes: tuple[Mailbox, Mailbox]) -> None:
    sender, receiver = mailboxes
    member = push_to(receiver.address, SECRET)
    member.send(b"hello")
    assert receiver.receive(PATIENT_S) == []
    sender.send(PEER, message(4))
    assert receive(receiver, 1) == [message(4)]
    assert (receiver.drops.num, receiver.num_refused) == (1, 0)
    member.close(linger=0)


def send_unless_refused(stranger: zmq.Socket[bytes]) -> None:
    """One that has been refused already would wait for somebody to send to."""
    with contextlib.suppress(zmq.Again):
        stranger.send(encode(message(1)), zmq.NOBLOCK)


@pytest.mark.parametrize("secret", [None, ClusterSecret.draw()], ids=["no secret", "another cluster's"])
def test_a_stranger_is_refused_and_counted(
    mailboxes: tuple[Mailbox, Mailbox], secret: ClusterSecret | None, caplog: pytest.LogCaptureFixture
) -> None:
    sender, receiver = mailboxes
    stranger = push_to(receiver.address, secret)
    send_unless_refused(stranger)
    deadline_s = time.monotonic() + PATIENT_S
    while not receiver.num_refused and time.monotonic() < deadline_s:
        time.sleep(0.01)
    assert receiver.num_refused
    sender.send(PEER, message(4))
    assert receive(receiver, 1) == [message(4)]
    assert "a stranger was refused" in caplog.text
    stranger.close(linger=0)


def test_who_knows_the_door_but_has_no_key_is_refused(mailboxes: tuple[Mailbox, Mailbox]) -> None:
    _, receiver = mailboxes
    stranger: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.PUSH)
    stranger.curve_serverkey = Keys(SECRET).public
    stranger.curve_publickey, stranger.curve_secretkey = zmq.curve_keypair()
    stranger.connect(receiver.address)
    send_unless_refused(stranger)
    deadline_s = time.monotonic() + PATIENT_S
    while not receiver.num_refused and time.monotonic() < deadline_s:
        time.sleep(0.01)
    assert receiver.num_refused
    assert receiver.receive(0.05) == []
    stranger.close(linger=0)


def test_a_member_sends_nothing_to_a_stranger(mailboxes: tuple[Mailbox, Mailbox]) -> None:
    """Who has taken over an address of ours, without the secret, hears nothing."""
    sender, _ = mailboxes
    for guard in (None, Keys(ClusterSecret.draw())):
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        stranger = context.socket(zmq.PULL)
        if guard is not None:
            stranger.curve_server, stranger.curve_secretkey = True, guard.private
        port = stranger.bind_to_random_port(f"tcp://{HOST}")
        sender.connect({PEER: f"tcp://{HOST}:{port}"})
        sender.send(PEER, message(5))
        assert not stranger.poll(500)
        context.destroy(linger=0)


def test_what_announces_itself_as_too_large_is_not_read(mailboxes: tuple[Mailbox, Mailbox]) -> None:
    sender, receiver = mailboxes
    member = push_to(receiver.address, SECRET)
    member.send(bytes(MAX_MESSAGE_BYTES + 1))
    assert receiver.receive(1.0) == []
    sender.send(PEER, message(6))
    assert receive(receiver, 1) == [message(6)]
    member.close(linger=0)


def test_a_message_that_nobody_would_read_is_not_sent(mailboxes: tuple[Mailbox, Mailbox]) -> None:
    with pytest.raises(UnavailableError, match=r"decode-0 takes no Abort of \d+ bytes"):
        mailboxes[0].send(PEER, Abort(request_id=RequestId("r" * MAX_MESSAGE_BYTES)))


def test_what_goes_over_the_wire_is_msgpack_and_no_pickle(mailboxes: tuple[Mailbox, Mailbox]) -> None:
    sender, _ = mailboxes
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    tap = context.socket(zmq.PULL)
    keys = Keys(SECRET)
    tap.curve_server, tap.curve_secretkey = True, keys.private
    port = tap.bind_to_random_port(f"tcp://{HOST}")
    sender.connect({PEER: f"tcp://{HOST}:{port}"})
    sender.send(PEER, message(7))
    assert tap.poll(int(PATIENT_S * 1000))
    assert tap.recv() == msgpack.packb({"$": "Abort", "request_id": "r", "choice": 7, "attempt": None})
    context.destroy(linger=0)


def test_a_closed_mailbox_does_not_wait_for_peers_that_never_read() -> None:
    sender = Mailbox(HOST, SECRET)
    with contextlib.closing(Mailbox(HOST, SECRET)) as gone:
        address = gone.address
    sender.connect({PEER: address})
    sender.send(PEER, message(0))
    start_s = time.monotonic()
    sender.close()
    assert time.monotonic() - start_s < PATIENT_S / 4


async def test_the_two_kinds_of_mailbox_talk_to_each_other() -> None:
    frontend, worker = AsyncMailbox(HOST, SECRET), Mailbox(HOST, SECRET)
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
    mailbox = AsyncMailbox(HOST, SECRET)
    with pytest.raises(UnavailableError):
        mailbox.send(PEER, message(0))
    mailbox.close()
