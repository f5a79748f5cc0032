"""The stores in which our processes find each other, to form wires and NCCL groups.

An attention worker or a shard hosts one, so that what is formed through it has no other party to lose. Names are signed
with the cluster's secret, so that processes of two clusters never meet, and so is what is published; but the store
itself does not ask who connects.
"""

from __future__ import annotations

import datetime
import logging
import socket

from torch._C._distributed_c10d import PrefixStore, TCPStore
from torch.distributed import DistError

from octet.addresses import family, host_and_port, with_port
from octet.errors import LaneTimeoutError
from octet.secret import SIGNATURE_BYTES, ClusterSecret

_log = logging.getLogger(__name__)

_VALUE = "value"


class GroupStore:
    """A key-value store that one process hosts and others join."""

    def __init__(self, store: TCPStore, address: str, timeout_s: float, secret: ClusterSecret) -> None:
        self._store, self.address, self.timeout_s, self.secret = store, address, timeout_s, secret
        self.num_refused = 0
        """Strangers that were turned away from what is joined through this store."""

    @staticmethod
    def host(host: str, timeout_s: float, secret: ClusterSecret) -> GroupStore:
        """Serve a store on a free port of `host`, and on no other address of this machine."""
        listening = socket.create_server((host, 0), family=family(host))
        port = listening.getsockname()[1]
        store = TCPStore(
            host,
            port,
            is_master=True,
            timeout=_delta(timeout_s),
            wait_for_workers=False,
            # The store's from now on. By itself it would listen on every address.
            master_listen_fd=listening.detach(),
        )
        return GroupStore(store, with_port(host, port), timeout_s, secret)

    @staticmethod
    def join(address: str, timeout_s: float, secret: ClusterSecret) -> GroupStore:
        host, port = host_and_port(address)
        try:
            store = TCPStore(host, port, is_master=False, timeout=_delta(timeout_s))
        except (RuntimeError, DistError) as error:
            raise LaneTimeoutError(f"no store at {address} within {timeout_s} s: {error}") from error
        return GroupStore(store, address, timeout_s, secret)

    def prefix(self, name: str) -> PrefixStore:
        return PrefixStore(self.secret.sign("group", name.encode()).hex(), self._store)

    def publish(self, name: str, value: bytes) -> None:
        """Tell whoever looks `name` up, with a signature: the store itself keeps what anybody sets."""
        self.prefix(name).set(_VALUE, (self.secret.sign("value", name.encode() + b"\0" + value) + value).hex())

    def look_up(self, name: str, timeout_s: float) -> bytes:
        """Waits until it is published. Raises: OSError if no member has published it, RuntimeError or DistError."""
        known = self.prefix(name)
        known.wait([_VALUE], _delta(timeout_s))
        try:
            signed = bytes.fromhex(known.get(_VALUE).decode())
        except ValueError:
            signed = b""
        signature, value = signed[:SIGNATURE_BYTES], signed[SIGNATURE_BYTES:]
        if not self.secret.has_signed("value", name.encode() + b"\0" + value, signature):
            raise OSError(f"what the store at {self.address} says of {name} is not signed by a member")
        return value

    def note_refusal(self, what: str) -> None:
        self.num_refused += 1
        _log.error("%s: a stranger was turned away, %d so far", what, self.num_refused)


def _delta(seconds: float) -> datetime.timedelta:
    return datetime.timedelta(seconds=seconds)
