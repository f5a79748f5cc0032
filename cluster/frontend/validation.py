"""From a protobuf request to plain values, or to an error that names the field."""

from __future__ import annotations

import dataclasses
import hashlib
import math
import secrets
import time
import uuid

from cluster.members import POOLS, Pool
from cluster.plan import ServingPlan
from model.config import GenerationDefaults, ModelConfig
from model.tokenizer import Tokenizer
from octet.config import OctetConfig
from octet.errors import RequestError
from octet.ids import RequestId, WorkerId
from octet.messages import PrefillRequest, pack_ids
from octet.request import SAMPLING_RANGES, Output, Sampling, Stopping
from octet.v1 import octet_pb2 as pb

_MAX_ID_BYTES = 256
_MAX_POOL_SIZE = 2**14


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What requests are checked against."""

    config: OctetConfig
    model: ModelConfig
    generation: GenerationDefaults
    max_model_len: int
    decode_pages: int

    @staticmethod
    def of(plan: ServingPlan) -> Limits:
        return Limits(
            config=plan.config,
            model=plan.model,
            generation=plan.generation,
            max_model_len=plan.max_model_len,
            decode_pages=plan.decode_pages,
        )

    def most_choices(self, num_tokens: int) -> int:
        """For how many choices that share so many tokens a decode worker has pages; always for one, by the context."""
        # They share all pages but the last one.
        return max(1, self.decode_pages - -(-num_tokens // self.config.kv.page_size) + 1)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class GenerateSpec:
    """A valid request. The workers are chosen later."""

    request: PrefillRequest
    stop_strings: tuple[str, ...]
    digest: bytes
    """Of the body: requests of one id with one digest are the same."""
    resumable: bool
    keep: bool
    """Whether anybody may ask for the answer later."""
    received: tuple[tuple[int, ...], ...]
    """By choice: what the client has of the answer already."""
    stream_interval: int = 1
    """Tokens of a choice that its client is told together, after the first."""


def parse_request(message: pb.GenerateRequest, limits: Limits, tokenizer: Tokenizer | None) -> GenerateSpec:
    """Raises: RequestError."""
    token_ids = _input_ids(message, limits, tokenizer)
    stopping = _stopping(message, limits, len(token_ids))
    n = _n(message.sampling, limits, len(token_ids))
    stop_strings = tuple(message.stopping.stop)
    if stop_strings and tokenizer is None:
        raise RequestError("stopping.stop", f"{len(stop_strings)} strings", "none", "this checkpoint has no tokenizer")
    if len(stop_strings) > limits.config.frontend.max_stop_strings:
        raise RequestError(
            "stopping.stop", f"{len(stop_strings)} strings", f"at most {limits.config.frontend.max_stop_strings}"
        )
    if "" in stop_strings:
        raise RequestError("stopping.stop", "an empty string", "strings of at least one character")
    if len(message.request_id.encode()) > _MAX_ID_BYTES:
        raise RequestError("request_id", f"{len(message.request_id.encode())} bytes", f"at most {_MAX_ID_BYTES}")
    if not (message.request_id.isascii() and message.request_id.isprintable()) or " " in message.request_id:
        # It is told in the call's metadata, which takes nothing else.
        raise RequestError("request_id", repr(message.request_id), "visible ASCII characters")
    received = _received(message, limits, n)
    sampling = _sampling(message.sampling, limits.generation)
    if any(received) and not sampling.greedy and not message.sampling.HasField("seed"):
        raise RequestError("sampling.seed", "none", "the seed of the answer that `received` is of", "or temperature 0")
    request = PrefillRequest(
        request_id=RequestId(message.request_id or uuid.uuid4().hex),
        attempt=0,
        choices=tuple(range(n)),
        token_ids=pack_ids(token_ids),
        num_prompt_tokens=len(token_ids),
        sampling=sampling,
        stopping=stopping,
        output=_output(message.output, limits),
        priority=message.priority,
        arrival_s=time.monotonic(),
        decode_worker=WorkerId(""),
        frontend=WorkerId(""),
    )
    return GenerateSpec(
        request=request,
        stop_strings=stop_strings,
        digest=body_digest(message),
        resumable=message.resumable,
        keep=message.resumable or bool(message.request_id),
        received=received,
        stream_interval=_stream_interval(message.output, limits, n),
    )


def body_digest(message: pb.GenerateRequest) -> bytes:
    """Of everything but `received`, which says how far a client is."""
    if message.received:
        body = pb.GenerateRequest()
        body.CopyFrom(message)
        body.ClearField("received")
        message = body
    return hashlib.blake2b(message.SerializeToString(deterministic=True), digest_size=16).digest()


def chat_messages(chat: pb.Chat) -> list[tuple[str, str]]:
    """Raises: RequestError."""
    if not chat.messages:
        raise RequestError("chat.messages", "no message", "at least one")
    for index, message in enumerate(chat.messages):
        if not message.role:
            raise RequestError(f"chat.messages[{index}].role", "an empty string", "a role such as 'user'")
    return [(message.role, message.content) for message in chat.messages]


def wanted_sizes(request: pb.ScaleRequest) -> dict[Pool, int]:
    """Raises: RequestError."""
    sizes: dict[Pool, int] = {}
    for index, wanted in enumerate(request.sizes):
        if wanted.pool not in POOLS:
            raise RequestError(f"sizes[{index}].pool", repr(wanted.pool), f"one of {', '.join(POOLS)}")
        if wanted.pool in sizes:
            raise RequestError(f"sizes[{index}].pool", f"'{wanted.pool}' once more", "each pool once")
        if wanted.size > _MAX_POOL_SIZE:
            raise RequestError(f"sizes[{index}].size", wanted.size, f"at most {_MAX_POOL_SIZE} members")
        sizes[wanted.pool] = wanted.size
    return sizes


def status_window_s(request: pb.GetStatusRequest) -> float | None:
    """None is all that there is. Raises: RequestError."""
    if not math.isfinite(request.window_s) or request.window_s < 0:
        raise RequestError("window_s", f"{request.window_s:g}", "a number of seconds, or 0 for all")
    return request.window_s or None


def require_tokenizer(tokenizer: Tokenizer | None, field: str) -> Tokenizer:
    """Raises: RequestError."""
    if tokenizer is None:
        raise RequestError(field, "text", "token_ids", "this checkpoint has no tokenizer")
    return tokenizer


def input_ids(request: pb.TokenizeRequest, tokenizer: Tokenizer) -> list[int]:
    """Raises: RequestError."""
    kind = request.WhichOneof("input")
    if kind == "chat":
        return tokenizer.apply_chat_template(chat_messages(request.chat))
    if kind == "text":
        return tokenizer.encode(request.text)
    raise RequestError("input", "nothing", "one of text, chat")


def check_ids(token_ids: list[int], field: str, vocab_size: int) -> None:
    """Raises: RequestError."""
    for index, token_id in enumerate(token_ids):
        if token_id >= vocab_size:
            raise RequestError(f"{field}[{index}]", token_id, f"an id below the vocabulary's {vocab_size}")


def _input_ids(message: pb.GenerateRequest, limits: Limits, tokenizer: Tokenizer | None) -> list[int]:
    kind = message.WhichOneof("input")
    if kind == "text":
        token_ids = require_tokenizer(tokenizer, "text").encode(message.text)
    elif kind == "chat":
        token_ids = require_tokenizer(tokenizer, "chat").apply_chat_template(chat_messages(message.chat))
    elif kind == "token_ids":
        token_ids = list(message.token_ids.ids)
    else:
        raise RequestError("input", "nothing", "one of text, token_ids, chat")
    field = "token_ids.ids" if kind == "token_ids" else kind
    if not token_ids:
        raise RequestError(field, "an empty prompt", "at least one token")
    check_ids(token_ids, field, limits.model.vocab_size)
    if len(token_ids) >= limits.max_model_len:
        raise RequestError(
            field,
            f"{len(token_ids)} tokens",
            f"fewer than the context of {limits.max_model_len}",
            "shorten the prompt or serve with a larger model.max_model_len",
        )
    return token_ids


def _stopping(message: pb.GenerateRequest, limits: Limits, num_prompt_tokens: int) -> Stopping:
    stopping, room = message.stopping, limits.max_model_len - num_prompt_tokens
    if stopping.HasField("max_new_tokens"):
        max_new_tokens = stopping.max_new_tokens
        if max_new_tokens == 0:
            raise RequestError("stopping.max_new_tokens", 0, "at least 1")
        if max_new_tokens > room:
            raise RequestError(
                "stopping.max_new_tokens",
                f"{max_new_tokens} after a prompt of {num_prompt_tokens}",
                f"at most {room} within the context of {limits.max_model_len}",
            )
    else:
        default = limits.generation.max_new_tokens or limits.config.frontend.default_max_new_tokens
        max_new_tokens = min(default, room)
    if stopping.min_new_tokens > max_new_tokens:
        raise RequestError(
            "stopping.min_new_tokens", stopping.min_new_tokens, f"at most max_new_tokens ({max_new_tokens})"
        )
    check_ids(list(stopping.stop_token_ids), "stopping.stop_token_ids", limits.model.vocab_size)
    eos = () if stopping.ignore_eos else limits.model.eos_token_ids
    return Stopping(
        max_new_tokens=max_new_tokens,
        min_new_tokens=stopping.min_new_tokens,
        stop_token_ids=tuple(dict.fromkeys((*eos, *stopping.stop_token_ids))),
    )


def _n(sampling: pb.Sampling, limits: Limits, num_prompt_tokens: int) -> int:
    n = sampling.n if sampling.HasField("n") else 1
    most = min(limits.config.frontend.max_n, limits.config.decode.max_batch)
    if not 1 <= n <= most:
        raise RequestError("sampling.n", n, f"1 to {most}")
    fitting = limits.most_choices(num_prompt_tokens)
    if n > fitting:
        raise RequestError(
            "sampling.n",
            n,
            f"at most {fitting} after a prompt of {num_prompt_tokens}, for {limits.decode_pages} KV pages",
        )
    return n


def _received(message: pb.GenerateRequest, limits: Limits, n: int) -> tuple[tuple[int, ...], ...]:
    if len(message.received) > n:
        raise RequestError("received", f"{len(message.received)} choices", f"at most n ({n})")
    for choice, received in enumerate(message.received):
        check_ids(list(received.ids), f"received[{choice}].ids", limits.model.vocab_size)
    return tuple(tuple(received.ids) for received in message.received)


def _sampling(sampling: pb.Sampling, defaults: GenerationDefaults) -> Sampling:
    def value(field: str, default: float) -> float:
        found: float = getattr(sampling, field) if sampling.HasField(field) else default
        if found not in SAMPLING_RANGES[field]:
            raise RequestError(f"sampling.{field}", f"{found:g}", str(SAMPLING_RANGES[field]))
        return found

    return Sampling(
        temperature=value("temperature", defaults.temperature),
        top_p=value("top_p", defaults.top_p),
        top_k=sampling.top_k if sampling.HasField("top_k") else defaults.top_k,
        min_p=value("min_p", defaults.min_p),
        repetition_penalty=value("repetition_penalty", defaults.repetition_penalty),
        presence_penalty=value("presence_penalty", 0.0),
        frequency_penalty=value("frequency_penalty", 0.0),
        seed=sampling.seed if sampling.HasField("seed") else secrets.randbits(63),
    )


def _stream_interval(output: pb.Output, limits: Limits, n: int) -> int:
    # What waits to be told together is not to be taken for what a slow client lets wait.
    config, most = limits.config.frontend, max(1, limits.config.frontend.max_unread_tokens // n)
    if not output.HasField("stream_interval"):
        return min(config.stream_interval, most)
    if not 1 <= output.stream_interval <= most:
        raise RequestError(
            "output.stream_interval",
            output.stream_interval,
            f"1 to {most}",
            f"more may not wait (frontend.max_unread_tokens is {config.max_unread_tokens}, for {n} choices)",
        )
    return output.stream_interval


def _output(output: pb.Output, limits: Limits) -> Output:
    most = limits.config.frontend.max_logprobs
    if output.HasField("logprobs") and output.logprobs > most:
        raise RequestError("output.logprobs", output.logprobs, f"at most {most}")
    return Output(
        logprobs=output.logprobs if output.HasField("logprobs") else None, prompt_logprobs=output.prompt_logprobs
    )
