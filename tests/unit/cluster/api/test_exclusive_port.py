"""Who may have a port, where all set SO_REUSEPORT."""

from __future__ import annotations

import contextlib
import socket
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from cluster.api.exclusive_port import exclusive_port

HOST = "127.0.0.1"


def listener(port: int) -> socket.socket:
    shared = socket.socket()
    shared.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    shared.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    shared.bind((HOST, port))
    shared.listen()
    return shared


def free_port() -> int:
    with exclusive_port(HOST, 0) as (_, port):
        return port


def test_several_sockets_may_listen() -> None:
    with contextlib.ExitStack() as stack:
        with exclusive_port(HOST, free_port()) as (hosts, port):
            listeners = [stack.enter_context(listener(port)) for _ in range(3)]
        assert hosts == [HOST]
        assert {each.getsockname() for each in listeners} == {(HOST, port)}


def test_nobody_else_gets_the_port_while_it_is_held_and_while_it_is_listened_on() -> None:
    with exclusive_port(HOST, 0) as (_, port):
        with pytest.raises(OSError, match="in use"), exclusive_port(HOST, port):
            pass
        listening = listener(port)
    with listening, pytest.raises(OSError, match="in use"), exclusive_port(HOST, port):
        pass


def test_of_many_that_ask_at_once_one_gets_it_at_most() -> None:
    num_asking, port, winners = 8, free_port(), 0
    barrier = threading.Barrier(num_asking)

    def ask() -> socket.socket | None:
        barrier.wait(10.0)
        try:
            with exclusive_port(HOST, port):
                return listener(port)
        except OSError:
            return None

    with ThreadPoolExecutor(num_asking) as threads:
        for _ in range(50):
            listening = [
                each for each in [asked.result() for asked in [threads.submit(ask) for _ in range(num_asking)]] if each
            ]
            assert len(listening) <= 1
            winners += len(listening)
            for each in listening:
                each.close()
    assert winners > 0


def test_an_ipv6_host_may_be_in_brackets() -> None:
    try:
        with exclusive_port("[::1]", 0) as (hosts, port):
            assert hosts == ["[::1]"]
            assert port > 0
    except OSError as error:
        pytest.skip(f"no IPv6 here: {error}")


@pytest.mark.parametrize("taken", [0, 1])
def test_a_port_that_is_taken_at_one_address_of_a_name_is_taken(taken: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else clients by that name would reach another server, now and then."""
    hosts, port = ["127.0.0.1", "127.0.0.2"], free_port()

    def look_up(host: str, port: int, type: int) -> list[tuple[int, int, int, str, tuple[str, int]]]:
        return [(socket.AF_INET, type, 0, "", (ip, port)) for ip in hosts]

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    with exclusive_port("both", port) as (found, _):
        assert found == hosts
    with socket.socket() as other:
        other.bind((hosts[taken], port))
        other.listen()
        with pytest.raises(OSError, match="in use"), exclusive_port("both", port):
            pass


def test_an_address_of_a_name_that_this_machine_has_not_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def look_up(host: str, port: int, type: int) -> list[tuple[int, int, int, str, tuple[str, int]]]:
        return [(socket.AF_INET, type, 0, "", (ip, port)) for ip in ("192.0.2.77", HOST)]

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    with exclusive_port("both", 0) as (found, port):
        assert found == [HOST]
        assert port > 0
