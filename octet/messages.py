"""The messages between a frontend and the attention workers, and their msgpack form.

A message is a frozen dataclass; on the wire it is `{"$": class name, field: value, ...}`. Token ids travel as packed
little-endian uint32. Nothing received is ever evaluated: an unknown name, an extra field, or one that is
missing and has no default, or whose value is of another type, is a `WireError`.
"""

from __future__ import annotations

import dataclasses
from array import array
from collections.abc import Sequence
from typing import Any

import msgpack

from octet.errors import WireError
from octet.ids import Epoch, LeaseId, RequestId, WorkerId
from octet.request import FinishReason, Output, Sampling, Stopping
from octet.schema import field_checks

_ID_BYTES = 4
_MAX_ITEMS = 2**18
"""Of one sequence in a message: more than a prompt has tokens. Room is made for what a sequence announces."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class PrefillRequest:
    """Frontend → prefill: compute the KV of `token_ids` and the next token of each of `choices`."""

    request_id: RequestId
    attempt: int
    choices: tuple[int, ...]
    token_ids: bytes
    """The prompt and, when a choice is recomputed, the tokens already committed to it."""
    num_prompt_tokens: int
    sampling: Sampling
    stopping: Stopping
    output: Output
    priority: int
    arrival_s: float
    """The request's arrival on the frontend's clock: it orders, and is never compared with another clock."""
    decode_worker: WorkerId
    frontend: WorkerId

    @property
    def num_tokens(self) -> int:
        """Tokens to compute, not unpacked."""
        return len(self.token_ids) // _ID_BYTES


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Abort:
    """Frontend → workers: forget a request, or one choice or one attempt of it."""

    request_id: RequestId
    choice: int | None = None
    attempt: int | None = None
    """What is computed of other attempts goes on."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class KvOffer:
    """To a decode worker: the pages of `request.token_ids` wait under a lease; `next_tokens` come after them.

    From a prefill worker that has computed them, or from a decode worker that gives its sequences away.
    """

    lease_id: LeaseId
    source: WorkerId
    request: PrefillRequest
    next_tokens: tuple[int, ...]
    """One per choice in `request.choices`; only choices that go on are offered."""
    lease_s: float
    """The lease ends this long after the offer, or after it was renewed."""
    following: int = 0
    """More offers of the same source that its next chunk will bring, where it computes on the decode worker's cores."""
    hidden: bytes = b""
    """The final hidden state `[H]` of the last token, in the cluster's dtype, where the decode worker speculates."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class KvPull:
    """Decode → source: send the lease's pages on our channel, in the order of the pulls."""

    lease_id: LeaseId
    decode_worker: WorkerId
    channel: int
    """Its number: what is awaited on one channel must not be sent on the one that takes its place."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class KvRenew:
    """Decode → source: the lease's pages are still wanted, there is just no room for them yet."""

    lease_id: LeaseId


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class KvAck:
    """Decode → source: the pages have arrived or are no longer wanted; free the lease."""

    lease_id: LeaseId


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class TokenLogprob:
    """A token's log-probability under the unmodified distribution, and the most likely alternatives."""

    token_id: int
    logprob: float | None
    top: tuple[tuple[int, float], ...] = ()


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class TokenEvent:
    """Worker → frontend: token `index` of a choice."""

    request_id: RequestId
    choice: int
    attempt: int
    index: int
    token_id: int
    finish_reason: FinishReason | None
    logprob: TokenLogprob | None = None
    prompt_logprobs: tuple[TokenLogprob, ...] = ()
    """With the first token of a request that asked for them."""
    cached_tokens: int = 0


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Evicted:
    """Worker → frontend: the choice lost its pages and must be prefilled again; it has not failed."""

    request_id: RequestId
    choice: int
    attempt: int
    reason: str


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Failed:
    """Worker → frontend: the choice cannot go on here."""

    request_id: RequestId
    choice: int
    attempt: int
    reason: str
    retryable: bool = False
    """The fault is this worker's or its lane's: another attempt, elsewhere or later, may succeed."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class WorkerLoad:
    """What the scheduler and the status page know of an attention worker."""

    kv_pages_total: int
    kv_pages_free: int
    running: int
    waiting: int
    tokens: int
    preemptions: int = 0
    leases: int = 0
    cached_tokens: int = 0
    """Prompt tokens found in the prefix cache instead of computed."""
    drafted_tokens: int = 0
    """Tokens that were drafted and verified."""
    accepted_tokens: int = 0
    """Those of them that were the right ones, and saved a step each."""
    begun_tokens: int = 0
    """Prefill: of prompts that run, until their first token: all tokens that were not found in the prefix cache."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class StepReport:
    """Worker → frontend: everything that one engine step brought forth."""

    worker_id: WorkerId
    epoch: Epoch
    events: tuple[TokenEvent | Evicted | Failed, ...]
    load: WorkerLoad


Message = PrefillRequest | Abort | KvOffer | KvPull | KvRenew | KvAck | StepReport

_TYPES: dict[str, type[Any]] = {
    cls.__name__: cls
    for cls in (
        Sampling,
        Stopping,
        Output,
        PrefillRequest,
        Abort,
        KvOffer,
        KvPull,
        KvRenew,
        KvAck,
        TokenLogprob,
        TokenEvent,
        Evicted,
        Failed,
        WorkerLoad,
        StepReport,
    )
}
_FIELDS = {name: tuple(f.name for f in dataclasses.fields(cls)) for name, cls in _TYPES.items()}
_CHECKS = {name: field_checks(cls) for name, cls in _TYPES.items()}


def encode(message: Message) -> bytes:
    packed: bytes = msgpack.packb(message, default=_to_map)
    return packed


def decode(data: bytes) -> Message:
    """Raises: WireError."""
    try:
        message = msgpack.unpackb(data, object_hook=_from_map, use_list=False, max_array_len=_MAX_ITEMS)
    except WireError:
        raise
    except Exception as error:
        raise WireError(f"{len(data)} bytes are not a message: {error}") from error
    if not isinstance(message, Message):
        raise WireError(f"a {type(message).__name__} is not a message")
    return message


def pack_ids(token_ids: Sequence[int]) -> bytes:
    return array("I", token_ids).tobytes()


def unpack_ids(data: bytes) -> list[int]:
    """Raises: WireError."""
    ids = array("I")
    if len(data) % ids.itemsize:
        raise WireError(f"{len(data)} bytes are not packed token ids")
    ids.frombytes(data)
    return ids.tolist()


def _to_map(value: object) -> dict[str, Any]:
    name = type(value).__name__
    if name not in _FIELDS:
        raise WireError(f"a {name} cannot be sent")
    return {"$": name, **{field: getattr(value, field) for field in _FIELDS[name]}}


def _from_map(value: dict[str, Any]) -> object:
    name = value.pop("$", None)
    if type(name) is not str or name not in _TYPES:
        raise WireError(f"unknown message {name!r}")
    cls = _TYPES[name]
    checks = _CHECKS[name]
    for field, found in value.items():
        if field in checks and not checks[field](found):
            raise WireError(f"malformed {name}: field {field!r} is a {type(found).__name__} that does not fit")
    try:
        return cls(**value)
    except TypeError as error:
        raise WireError(f"malformed {name}: {error}") from error
