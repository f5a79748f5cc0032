"""Who may connect to a mailbox: CURVE, ZeroMQ's own authentication and encryption, with one key pair per cluster.

The pair is made of the cluster's secret, so that every member has it and nobody else does. A stranger does not know the
key that a connection has to be opened with; one who had seen it would still have to prove that he has the other half.
"""

from __future__ import annotations

import logging
import threading
import time

import zmq
import zmq.utils.monitor
import zmq.utils.z85

from octet.secret import ClusterSecret

_log = logging.getLogger(__name__)

MAX_MESSAGE_BYTES = 64 * 2**20
"""Of one message. What announces itself as more is cut off before it is read."""
_HANDSHAKE_MS = 5000
"""A connection that has not shown within this time who it is, is closed."""
_DOMAIN = "octet"
_POLL_MS = 1000
_LOG_EVERY_S = 1.0
_FAILURES = zmq.Event.HANDSHAKE_FAILED_NO_DETAIL | zmq.Event.HANDSHAKE_FAILED_PROTOCOL | zmq.Event.HANDSHAKE_FAILED_AUTH


class Keys:
    """The pair, in the form that ZeroMQ takes."""

    def __init__(self, secret: ClusterSecret) -> None:
        self.private: bytes = zmq.utils.z85.encode(secret.key("curve"))
        self.public: bytes = zmq.curve_public(self.private)

    def guard(self, inbound: zmq.Socket[bytes]) -> None:
        """Let only members connect to this socket, before it is bound. A `Doorkeeper` looks at who they are."""
        inbound.curve_server = True
        inbound.curve_secretkey = self.private
        inbound.zap_domain = _DOMAIN.encode()
        inbound.setsockopt(zmq.ZAP_ENFORCE_DOMAIN, 1)
        inbound.setsockopt(zmq.MAXMSGSIZE, MAX_MESSAGE_BYTES)
        inbound.setsockopt(zmq.HANDSHAKE_IVL, _HANDSHAKE_MS)

    def show(self, outbound: zmq.Socket[bytes]) -> None:
        """Let this socket connect to those of members, and to no others."""
        outbound.curve_serverkey = outbound.curve_publickey = self.public
        outbound.curve_secretkey = self.private
        outbound.setsockopt(zmq.HANDSHAKE_IVL, _HANDSHAKE_MS)


class Doorkeeper:
    """Answers ZeroMQ's question who may come in (ZAP, RFC 27), and counts who may not. One per ZeroMQ context."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], keys: Keys, inbound: zmq.Socket[bytes]) -> None:
        """
        Args:
            inbound: the guarded socket, not bound yet.
        """
        self._keys = keys
        self.num_refused = 0
        """Connections that were refused; one that tries again counts again."""
        self._logged_s = 0.0
        self._questions = context.socket(zmq.REP)
        self._questions.bind("inproc://zeromq.zap.01")
        self._failures = inbound.get_monitor_socket(_FAILURES | zmq.Event.MONITOR_STOPPED)
        self._inbound = inbound
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="doorkeeper", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Before the guarded socket is closed."""
        self._stopping.set()
        self._inbound.disable_monitor()
        self._thread.join()

    def _run(self) -> None:
        poller = zmq.Poller()
        poller.register(self._questions, zmq.POLLIN)
        poller.register(self._failures, zmq.POLLIN)
        while not self._stopping.is_set():
            ready = dict(poller.poll(_POLL_MS))
            if self._questions in ready:
                self._answer(self._questions.recv_multipart())
            if self._failures in ready:
                event = zmq.utils.monitor.recv_monitor_message(self._failures)
                if event["event"] == zmq.Event.MONITOR_STOPPED:
                    break
                self._note_refusal(str(event["endpoint"].decode(errors="replace")))
        self._questions.close(linger=0)
        self._failures.close(linger=0)

    def _answer(self, question: list[bytes]) -> None:
        """RFC 27: version, request id, domain, address, identity, mechanism, credentials."""
        request_id = question[1] if len(question) > 1 else b""
        member = question[5:] == [b"CURVE", zmq.utils.z85.decode(self._keys.public)]
        status = (b"200", b"a member") if member else (b"400", b"a stranger")
        self._questions.send_multipart((b"1.0", request_id, *status, b"", b""))

    def _note_refusal(self, endpoint: str) -> None:
        self.num_refused += 1
        now_s = time.monotonic()
        # A stranger that keeps trying does not fill the log.
        if now_s - self._logged_s >= _LOG_EVERY_S:
            self._logged_s = now_s
            _log.error("%s: a stranger was refused, %d so far", endpoint, self.num_refused)
