"""Process groups between a few of our processes, without `torch.distributed`'s global one.

Each group has a name of its own in a store that one of its members hosts. A lane's store is its attention worker's, so
a lane lives and dies with the process that it belongs to. Names are signed with the cluster's secret, so that processes
of two clusters never meet; but neither the store nor a gloo port asks who connects: both belong on a network that is
trusted.
"""

from __future__ import annotations

import datetime
import logging
import re
import socket
from typing import Any

import torch
from torch._C._distributed_c10d import PrefixStore, ProcessGroupGloo, TCPStore
from torch.distributed import DistError

from octet.errors import LaneError, LaneTimeoutError, PeerLostError
from octet.secret import SIGNATURE_BYTES, ClusterSecret

_log = logging.getLogger(__name__)

_VALUE = "value"
_FRAMES, _NOTHING = 0, 1
"""Tags: everything is sent with the first, nothing ever with the second."""


class GroupStore:
    """A key-value store through which the members of groups find each other."""

    def __init__(self, store: TCPStore, address: str, secret: ClusterSecret) -> None:
        self._store, self.address, self.secret = store, address, secret
        self.num_refused = 0
        """Strangers that were turned away from what is joined through this store."""

    @staticmethod
    def host(host: str, timeout_s: float, secret: ClusterSecret) -> GroupStore:
        """Serve a store on a free port of `host`, and on no other address of this machine."""
        listening = socket.create_server((host, 0))
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
        return GroupStore(store, f"{host}:{port}", secret)

    @staticmethod
    def join(address: str, timeout_s: float, secret: ClusterSecret) -> GroupStore:
        host, _, port = address.rpartition(":")
        try:
            store = TCPStore(host, int(port), is_master=False, timeout=_delta(timeout_s))
        except (RuntimeError, DistError) as error:
            raise LaneTimeoutError(f"no store at {address} within {timeout_s} s: {error}") from error
        return GroupStore(store, address, secret)

    def another(self) -> GroupStore:
        """The same store by another connection: one who waits holds up all others of its connection."""
        store: Any = self._store  # `clone` is missing from torch's stubs
        return GroupStore(store.clone(), self.address, self.secret)

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


class Group:
    """Tagless point-to-point sends and receives among `size` ranks over gloo; order is kept per pair of ranks.

    A receive may have more room than the frame that arrives: frames say how long they are.
    """

    def __init__(
        self, store: GroupStore, name: str, rank: int, size: int, host: str, connect_s: float, transfer_s: float
    ) -> None:
        """Connects to every other rank.

        Args:
            connect_s: deadline for all of them to come.
            transfer_s: default deadline of a send or a receive.

        Raises: LaneTimeoutError if one does not come.
        """
        gloo: Any = ProcessGroupGloo  # its options and point-to-point calls are missing from torch's stubs
        options = gloo._Options()
        options._timeout = _delta(connect_s)
        options._devices = [gloo.create_device(hostname=host)]
        self._timeout_s, self._peer = transfer_s, (rank + 1) % size
        try:
            self._group = gloo(store.prefix(name), rank, size, options)
        except (RuntimeError, DistError) as error:
            # Whoever keeps the error keeps this frame, and with it a device that listens on a port.
            options._devices = []
            raise LaneTimeoutError(
                f"group {name}: rank {rank} of {size} found no full group in {connect_s} s"
            ) from error

    def send(self, frame: torch.Tensor, to: int) -> Transfer:
        """`frame` must stay as it is until the transfer is done."""
        try:
            return Transfer(self._group.send([frame], to, _FRAMES), self._timeout_s)
        except RuntimeError as error:
            raise _typed(error) from error

    def receive(self, buffer: torch.Tensor, source: int) -> Transfer:
        try:
            return Transfer(self._group.recv([buffer], source, _FRAMES), self._timeout_s)
        except RuntimeError as error:
            raise _typed(error) from error

    def abort(self) -> None:
        """Break every connection of this rank: whoever waits on it, here or at a peer, gets an error now."""
        # Gloo's own abort and shutdown leave the connections open; a receive that times out closes all of them.
        try:
            self._group.recv([torch.empty(1, dtype=torch.uint8)], self._peer, _NOTHING).wait(_delta(0.001))
        except RuntimeError:
            return


class Transfer:
    """A send or a receive under way."""

    def __init__(self, work: Any, timeout_s: float) -> None:
        self._work, self._timeout_s = work, timeout_s

    def wait(self, timeout_s: float | None = None) -> None:
        """Raises: LaneTimeoutError, PeerLostError; the whole group is of no more use then."""
        try:
            self._work.wait(_delta(self._timeout_s if timeout_s is None else timeout_s))
        except RuntimeError as error:
            raise _typed(error) from error


def _delta(seconds: float) -> datetime.timedelta:
    return datetime.timedelta(seconds=seconds)


def _typed(error: RuntimeError) -> LaneError:
    """Gloo raises plain RuntimeErrors; their texts tell which."""
    # Gloo puts its source file before the message, and advice and a picture behind it.
    text = re.sub(r"^\[[^\]]*\]\s*", "", str(error)).partition(" This is typically")[0]
    if "Timed out" in text:
        return LaneTimeoutError(text)
    if "caused pair closure" in text:
        return LaneError(f"this end has given the group up: {text}")
    return PeerLostError(text)
