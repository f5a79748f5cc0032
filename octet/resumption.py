"""How a client goes on after a lost connection: what it has of an answer, and when to ask for the rest. No sockets."""

from __future__ import annotations

import hashlib
import random
import time
import uuid
from typing import Any

import grpc
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from octet.errors import OctetError
from octet.metadata import REQUEST_ID, RETRY_PUSHBACK_MS
from octet.v1 import octet_pb2 as pb

_FIRST_DELAY_S, _LAST_DELAY_S = 0.05, 2.0


class CallError(OctetError):
    """A call ended with a status other than OK."""

    def __init__(self, code: grpc.StatusCode, message: str, retry_after_s: float | None = None) -> None:
        """
        Args:
            retry_after_s: when the server, which refused the request for now, says to try again.
        """
        self.code, self.retry_after_s = code, retry_after_s
        super().__init__(f"{code.name}: {message}")


class Resumption:
    """One request of a client, over as many calls as it takes.

    The request has an id and a seed, whoever gave them, and every call names the tokens that have come: so the server
    that knows it goes on where it was, and one that does not computes the very rest of the answer. A seed that nobody
    gave follows from the id: who asks the same with the same id asks the same.
    """

    def __init__(self, request: pb.GenerateRequest, timeout_s: float, *, resume: bool) -> None:
        """
        Args:
            request: becomes this object's.
            timeout_s: deadline of all calls together.
            resume: False lets the first error be the last.
        """
        self._request, self._resume = request, resume
        self._deadline_s = time.monotonic() + timeout_s
        self._num_errors = 0
        self._begun = False
        """Whether a call is under way of which the server has not said anything yet."""
        self._accepted, self.complete = False, False
        """Whether all of the answer has come, which the usage in its last chunk tells: what becomes of the connection
        behind it is no loss."""
        self._ended: set[int] = set()
        if resume:
            request.resumable = True
            request.request_id = request.request_id or uuid.uuid4().hex
            if not request.sampling.HasField("seed"):
                request.sampling.seed = _seed_of(request.request_id)

    @property
    def request_id(self) -> str:
        return self._request.request_id

    @property
    def time_left_s(self) -> float:
        return max(0.0, self._deadline_s - time.monotonic())

    @property
    def runs_on(self) -> bool:
        """Whether the server may go on with the request though no call is left: it has to be aborted."""
        return self._resume and (self._accepted or self._begun) and not self.complete

    def next_request(self) -> pb.GenerateRequest:
        """For the next call."""
        self._begun = True
        return self._request

    def note_metadata(self, metadata: Any) -> None:
        """The initial metadata of a call."""
        if any(key == REQUEST_ID for key, _ in metadata or ()):
            self._accepted, self._num_errors = True, 0

    def note_end(self) -> None:
        """The answer is complete."""
        self.complete = True

    def take(self, chunk: pb.GenerateChunk) -> bool:
        """Note what came. Returns: whether anything of it is news; a choice's end that is told again is taken out.

        Raises: CallError if it is not what comes next.
        """
        while len(self._request.received) <= chunk.index:
            self._request.received.add()
        received = self._request.received[chunk.index].ids
        if chunk.offset != len(received):
            raise CallError(
                grpc.StatusCode.DATA_LOSS,
                f"choice {chunk.index} goes on at token {chunk.offset}, after {len(received)} tokens",
            )
        received.extend(chunk.token_ids)
        self.complete = self.complete or chunk.HasField("usage")
        if chunk.index in self._ended:
            chunk.ClearField("finish_reason")
            chunk.ClearField("matched_stop")
            return chunk.HasField("usage")
        if chunk.finish_reason:
            self._ended.add(chunk.index)
        return True

    def delay_s(self, error: Any) -> float | None:
        """How long to wait before the next call; None if this error is the last.

        Going on takes a request that was accepted: a server that was never reached, or refused it, is the caller's to
        deal with. What a server says of a request that failed for good is final, too.
        """
        self._begun = False
        code, pushback_s = error.code(), retry_after_s(error)
        lost = code == grpc.StatusCode.UNAVAILABLE and not _failed_for_good(error)
        refused = code == grpc.StatusCode.RESOURCE_EXHAUSTED and pushback_s is not None
        if not (self._resume and self._accepted and (lost or refused)):
            return None
        delay_s = min(_FIRST_DELAY_S * 2**self._num_errors, _LAST_DELAY_S) * random.uniform(0.5, 1)
        self._num_errors += 1
        delay_s = max(delay_s, pushback_s or 0.0)
        return delay_s if delay_s < self.time_left_s else None


def _seed_of(request_id: str) -> int:
    """63 bits."""
    return int.from_bytes(hashlib.blake2b(request_id.encode(), digest_size=8).digest()) >> 1


def typed(error: Any) -> CallError:
    """A grpc.RpcError as one of ours."""
    return CallError(error.code(), error.details() or "", retry_after_s(error))


def retry_after_s(error: Any) -> float | None:
    """When a server that refused a request says to try again, if it does."""
    for key, value in error.trailing_metadata() or ():
        if key == RETRY_PUSHBACK_MS and value.isdecimal():
            return int(value) / 1000
    return None


def _failed_for_good(error: Any) -> bool:
    """Whether the server itself says so, in a google.rpc.ErrorInfo."""
    status = rpc_status.from_call(error)
    for detail in status.details if status is not None else ():
        info = error_details_pb2.ErrorInfo()
        if detail.Unpack(info) and (info.domain, info.reason) == ("octet", "REQUEST_FAILED"):
            return True
    return False
