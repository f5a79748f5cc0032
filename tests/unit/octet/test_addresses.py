from __future__ import annotations

import contextlib
import socket
import time

import pytest

from octet.addresses import family, host_and_port, with_port
from octet.ids import RequestId, WorkerId
from octet.mailbox import Mailbox
from octet.messages import Abort
from octet.pulse import Pulse, Pulses
from octet.secret import ClusterSecret
from router.group_store import GroupStore

PATIENT_S = 20.0


@pytest.mark.parametrize("host", ["10.0.0.1", "localhost", "::1", "fd00:77::1"])
def test_an_address_is_its_host_and_port(host: str) -> None:
    assert host_and_port(with_port(host, 50051)) == (host, 50051)
    assert with_port(host, 50051).startswith("[") == (family(host) == socket.AF_INET6)


def test_brackets_are_there_once() -> None:
    assert with_port("[::1]", 1) == with_port("::1", 1) == "[::1]:1"


@pytest.mark.parametrize("address", ["", "localhost", "10.0.0.1:", "10.0.0.1:x", "10.0.0.1:-1"])
def test_what_has_no_port_is_refused(address: str) -> None:
    with pytest.raises(ValueError, match="is not host:port"):
        host_and_port(address)


@pytest.fixture(params=["127.0.0.1", "::1"])
def host(request: pytest.FixtureRequest) -> str:
    found: str = request.param
    try:
        socket.create_server((found, 0), family=family(found)).close()
    except OSError as error:
        pytest.skip(f"no {found} here: {error}")
    return found


def listens(host: str, port: int) -> bool:
    with socket.socket(family(host)) as connection:
        return connection.connect_ex((host, port)) == 0


def test_mailboxes_meet_at_their_host(host: str) -> None:
    secret, peer = ClusterSecret.draw(), WorkerId("decode-0")
    with contextlib.closing(Mailbox(host, secret)) as sender, contextlib.closing(Mailbox(host, secret)) as receiver:
        assert listens(*host_and_port(receiver.address.removeprefix("tcp://")))
        sender.connect({peer: receiver.address})
        sender.send(peer, message := Abort(request_id=RequestId("r"), choice=1))
        assert receiver.receive(PATIENT_S) == [message]


def test_a_pulse_is_felt_at_its_host(host: str) -> None:
    with contextlib.closing(Pulse(host)) as pulse, contextlib.closing(Pulses()) as pulses:
        pulses.keep({"peer": pulse.address})
        deadline_s = time.monotonic() + PATIENT_S
        while not (felt := pulses.beat()) and time.monotonic() < deadline_s:
            time.sleep(0.01)
    assert felt == {"peer"}


def test_a_store_is_hosted_and_joined_at_its_host_alone(host: str) -> None:
    secret = ClusterSecret.draw()
    hosted = GroupStore.host(host, PATIENT_S, secret)
    found, port = host_and_port(hosted.address)
    assert found == host
    other = "::1" if host == "127.0.0.1" else "127.0.0.1"
    assert not listens(other, port)
    GroupStore.join(hosted.address, PATIENT_S, secret).publish("name", b"value")
    assert hosted.look_up("name", PATIENT_S) == b"value"
