"""Clients of the gRPC API, one blocking and one for asyncio. They need neither torch nor Ray.

Every call carries a deadline. A prompt is a string, a sequence of token ids, or a conversation: a sequence of pairs
(role, content), or of mappings with these two keys. Options are the fields of `Sampling`, `Stopping` and `Output` in
octet.proto, by name.

Generation goes on after a lost connection, without a gap or a repeat, up to the call's deadline: see
`octet.resumption`. Whoever leaves a stream, interrupts a call, or closes the client has the requests aborted that are
under way.
"""

from __future__ import annotations

import asyncio
import contextlib
import difflib
import math
import reprlib
import threading
import time
from collections.abc import AsyncGenerator, Callable, Generator, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import grpc

from octet.errors import RequestError
from octet.resumption import CallError, Resumption, typed
from octet.tls import Tls
from octet.v1 import octet_pb2 as pb
from octet.v1 import octet_pb2_grpc as rpc

Chat: TypeAlias = Sequence[tuple[str, str]] | Sequence[Mapping[str, str]]
Prompt: TypeAlias = str | Sequence[int] | Chat

_SECTIONS: dict[str, Any] = {"sampling": pb.Sampling, "stopping": pb.Stopping, "output": pb.Output}
_OPTIONS = {field.name: section for section, cls in _SECTIONS.items() for field in cls.DESCRIPTOR.fields}
_CHANNEL_OPTIONS = (
    # The server says how long messages may be (`frontend.max_message_mib`).
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 1_000),
    ("grpc.max_reconnect_backoff_ms", 1_000),
)
_ABORT_S = 2.0
_CLOSED = "this client was closed"

__all__ = ["AsyncClient", "CallError", "Client", "make_request"]


class Client:
    """A blocking client; its methods may be called from any thread."""

    def __init__(self, address: str, timeout_s: float = 300.0, *, resume: bool = True, tls: Tls | None = None) -> None:
        """
        Args:
            address: `host:port` of a frontend.
            timeout_s: deadline of each call that is not given its own.
            resume: whether generation goes on after a lost connection.
            tls: None speaks in the clear.

        Raises: ConfigError for a TLS file that cannot be read, RequestError for a timeout that is none.
        """
        self._timeout_s, self._resume = _deadline_s(timeout_s, timeout_s), resume
        self._channel = (
            grpc.insecure_channel(address, options=_CHANNEL_OPTIONS)
            if tls is None
            else grpc.secure_channel(address, tls.credentials(), options=_CHANNEL_OPTIONS)
        )
        self._generation = rpc.GenerationStub(self._channel)
        self._cluster = rpc.ClusterStub(self._channel)
        self._under_way, self._closed, self._lock = set[Resumption](), False, threading.Lock()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def close(self) -> None:
        """Abort what is under way: whoever waits for it in another thread hears CANCELLED. Idempotent."""
        with self._lock:
            left, self._closed = () if self._closed else tuple(self._under_way), True
            self._under_way.clear()
        aborts = [pb.AbortRequest(request_id=asked.request_id) for asked in left if asked.runs_on]
        for call in [self._generation.Abort.future(abort, timeout=_ABORT_S) for abort in aborts]:
            # One that cannot be told ends the request by itself, after a while.
            call.exception()
        self._channel.close()

    def generate(self, prompt: Prompt, *, timeout_s: float | None = None, **options: Any) -> pb.GenerateResponse:
        """The whole answer. Raises: CallError; RequestError for an option that does not exist."""
        asked = self._ask(prompt, timeout_s, options)
        try:
            while True:
                call = self._begin(self._generation.Generate.future, asked)
                try:
                    asked.note_metadata(call.initial_metadata())
                    response: pb.GenerateResponse = call.result()
                    asked.note_end()
                    return response
                except grpc.RpcError as error:
                    self._wait(asked, error)
                finally:
                    call.cancel()
        finally:
            self._leave(asked)

    def stream(
        self, prompt: Prompt, *, timeout_s: float | None = None, **options: Any
    ) -> Generator[pb.GenerateChunk, None, None]:
        """The answer chunk by chunk. Leaving the iteration ends the request. Raises: CallError."""
        asked = self._ask(prompt, timeout_s, options)
        try:
            while True:
                call = self._begin(self._generation.GenerateStream, asked)
                try:
                    asked.note_metadata(call.initial_metadata())
                    for chunk in call:
                        if asked.take(chunk):
                            yield chunk
                    asked.note_end()
                    return
                except grpc.RpcError as error:
                    if asked.complete:
                        return
                    self._wait(asked, error)
                finally:
                    call.cancel()
        finally:
            self._leave(asked)

    def abort(self, request_id: str, *, timeout_s: float | None = None) -> None:
        """End a live request; an unknown one is no error."""
        self._call(self._generation.Abort, pb.AbortRequest(request_id=request_id), timeout_s)

    def tokenize(self, prompt: str | Chat, *, timeout_s: float | None = None) -> list[int]:
        request = make_tokenize_request(prompt)
        return list(self._call(self._generation.Tokenize, request, timeout_s).token_ids)

    def detokenize(self, token_ids: Sequence[int], *, timeout_s: float | None = None) -> str:
        text: str = self._call(self._generation.Detokenize, pb.DetokenizeRequest(token_ids=token_ids), timeout_s).text
        return text

    def model_info(self, *, timeout_s: float | None = None) -> pb.GetModelInfoResponse:
        info: pb.GetModelInfoResponse = self._call(self._generation.GetModelInfo, pb.GetModelInfoRequest(), timeout_s)
        return info

    def status(self, *, window_s: float | None = None, timeout_s: float | None = None) -> pb.GetStatusResponse:
        """With telemetry of the last `window_s` seconds, at most and by default the cluster's `telemetry.window_s`."""
        request = pb.GetStatusRequest(window_s=window_s or 0)
        status: pb.GetStatusResponse = self._call(self._cluster.GetStatus, request, timeout_s)
        return status

    def rebalance(self, *, dry_run: bool = False, timeout_s: float | None = None) -> pb.RebalanceResponse:
        """Move experts after their load. Raises: CallError."""
        request = pb.RebalanceRequest(dry_run=dry_run)
        response: pb.RebalanceResponse = self._call(self._cluster.Rebalance, request, timeout_s)
        return response

    def scale(self, *, timeout_s: float | None = None, **sizes: int) -> pb.ScaleResponse:
        """Bring pools to other sizes, `experts=4`; answers when it is so. Raises: CallError."""
        request = make_scale_request(sizes)
        response: pb.ScaleResponse = self._call(self._cluster.Scale, request, timeout_s)
        return response

    def _ask(self, prompt: Prompt, timeout_s: float | None, options: dict[str, Any]) -> Resumption:
        deadline_s = _deadline_s(timeout_s, self._timeout_s)
        asked = Resumption(make_request(prompt, **options), deadline_s, resume=self._resume)
        with self._lock:
            if self._closed:
                raise CallError(grpc.StatusCode.CANCELLED, _CLOSED)
            self._under_way.add(asked)
        return asked

    def _begin(self, method: Any, asked: Resumption) -> Any:
        """The next call. Raises: CallError if the client was closed."""
        return self._unless_closed(lambda: method(asked.next_request(), timeout=asked.time_left_s))

    def _unless_closed(self, call: Callable[[], Any]) -> Any:
        """Of a channel that is closed gRPC says so in an error without a status. Raises: CallError."""
        try:
            return call()
        except ValueError:
            if not self._closed:
                raise
            raise CallError(grpc.StatusCode.CANCELLED, _CLOSED) from None

    def _wait(self, asked: Resumption, error: grpc.RpcError) -> None:
        """Until it is time for the next call. Raises: CallError if there shall be none."""
        delay_s = asked.delay_s(error)
        if delay_s is None:
            raise typed(error) from None
        time.sleep(delay_s)

    def _leave(self, asked: Resumption) -> None:
        with self._lock:
            # What `close` has found there is aborted by it.
            left = asked in self._under_way and asked.runs_on
            self._under_way.discard(asked)
        if left:
            with contextlib.suppress(CallError):
                self.abort(asked.request_id, timeout_s=_ABORT_S)

    def _call(self, method: Any, request: Any, timeout_s: float | None) -> Any:
        deadline_s = _deadline_s(timeout_s, self._timeout_s)
        try:
            return self._unless_closed(lambda: method(request, timeout=deadline_s))
        except grpc.RpcError as error:
            raise typed(error) from None


class AsyncClient:
    """The same for asyncio. Belongs to the event loop that it is first used in."""

    def __init__(self, address: str, timeout_s: float = 300.0, *, resume: bool = True, tls: Tls | None = None) -> None:
        """As for `Client`."""
        self._timeout_s, self._resume = _deadline_s(timeout_s, timeout_s), resume
        self._channel = (
            grpc.aio.insecure_channel(address, options=_CHANNEL_OPTIONS)
            if tls is None
            else grpc.aio.secure_channel(address, tls.credentials(), options=_CHANNEL_OPTIONS)
        )
        self._generation: Any = rpc.GenerationStub(self._channel)
        self._cluster: Any = rpc.ClusterStub(self._channel)
        self._under_way, self._closed = set[Resumption](), False

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.close()

    async def close(self) -> None:
        """As `Client.close`; also for streams whose iteration was left and not closed."""
        left, self._closed = () if self._closed else tuple(self._under_way), True
        self._under_way.clear()
        aborts = [self.abort(asked.request_id, timeout_s=_ABORT_S) for asked in left if asked.runs_on]
        # One that cannot be told ends the request by itself, after a while.
        await asyncio.gather(*aborts, return_exceptions=True)
        await self._channel.close()

    async def generate(self, prompt: Prompt, *, timeout_s: float | None = None, **options: Any) -> pb.GenerateResponse:
        """The whole answer. Raises: CallError; RequestError for an option that does not exist."""
        asked = self._ask(prompt, timeout_s, options)
        try:
            while True:
                with self._unless_closed():
                    call = self._generation.Generate(asked.next_request(), timeout=asked.time_left_s)
                    try:
                        asked.note_metadata(await call.initial_metadata())
                        response: pb.GenerateResponse = await call
                        asked.note_end()
                        return response
                    except grpc.RpcError as error:
                        await self._wait(asked, error)
                    finally:
                        call.cancel()
        finally:
            await self._leave(asked)

    async def stream(
        self, prompt: Prompt, *, timeout_s: float | None = None, **options: Any
    ) -> AsyncGenerator[pb.GenerateChunk, None]:
        """The answer chunk by chunk. Closing the iteration ends the request. Raises: CallError."""
        asked = self._ask(prompt, timeout_s, options)
        try:
            while True:
                with self._unless_closed():
                    call = self._generation.GenerateStream(asked.next_request(), timeout=asked.time_left_s)
                    try:
                        asked.note_metadata(await call.initial_metadata())
                        async for chunk in call:
                            if asked.take(chunk):
                                yield chunk
                        asked.note_end()
                        return
                    except grpc.RpcError as error:
                        if asked.complete:
                            return
                        await self._wait(asked, error)
                    finally:
                        call.cancel()
        finally:
            await self._leave(asked)

    async def abort(self, request_id: str, *, timeout_s: float | None = None) -> None:
        """End a live request; an unknown one is no error."""
        await self._call(self._generation.Abort, pb.AbortRequest(request_id=request_id), timeout_s)

    async def tokenize(self, prompt: str | Chat, *, timeout_s: float | None = None) -> list[int]:
        response = await self._call(self._generation.Tokenize, make_tokenize_request(prompt), timeout_s)
        return list(response.token_ids)

    async def detokenize(self, token_ids: Sequence[int], *, timeout_s: float | None = None) -> str:
        request = pb.DetokenizeRequest(token_ids=token_ids)
        text: str = (await self._call(self._generation.Detokenize, request, timeout_s)).text
        return text

    async def model_info(self, *, timeout_s: float | None = None) -> pb.GetModelInfoResponse:
        info: pb.GetModelInfoResponse = await self._call(
            self._generation.GetModelInfo, pb.GetModelInfoRequest(), timeout_s
        )
        return info

    async def status(self, *, window_s: float | None = None, timeout_s: float | None = None) -> pb.GetStatusResponse:
        """See `Client.status`."""
        request = pb.GetStatusRequest(window_s=window_s or 0)
        status: pb.GetStatusResponse = await self._call(self._cluster.GetStatus, request, timeout_s)
        return status

    async def rebalance(self, *, dry_run: bool = False, timeout_s: float | None = None) -> pb.RebalanceResponse:
        """Move experts after their load. Raises: CallError."""
        request = pb.RebalanceRequest(dry_run=dry_run)
        response: pb.RebalanceResponse = await self._call(self._cluster.Rebalance, request, timeout_s)
        return response

    async def scale(self, *, timeout_s: float | None = None, **sizes: int) -> pb.ScaleResponse:
        """Bring pools to other sizes, `experts=4`; answers when it is so. Raises: CallError."""
        request = make_scale_request(sizes)
        response: pb.ScaleResponse = await self._call(self._cluster.Scale, request, timeout_s)
        return response

    def _ask(self, prompt: Prompt, timeout_s: float | None, options: dict[str, Any]) -> Resumption:
        deadline_s = _deadline_s(timeout_s, self._timeout_s)
        asked = Resumption(make_request(prompt, **options), deadline_s, resume=self._resume)
        if self._closed:
            raise CallError(grpc.StatusCode.CANCELLED, _CLOSED)
        self._under_way.add(asked)
        return asked

    @contextlib.contextmanager
    def _unless_closed(self) -> Iterator[None]:
        """Where a channel is closed, gRPC cancels whoever waits for a call of it, and says it without a status.

        Raises: CallError.
        """
        try:
            yield
        except (asyncio.CancelledError, grpc.aio.UsageError):
            task = asyncio.current_task()
            if not self._closed or (task is not None and task.cancelling() > 0):
                raise
            raise CallError(grpc.StatusCode.CANCELLED, _CLOSED) from None

    async def _wait(self, asked: Resumption, error: grpc.RpcError) -> None:
        """Until it is time for the next call. Raises: CallError if there shall be none."""
        delay_s = asked.delay_s(error)
        if delay_s is None:
            raise typed(error) from None
        await asyncio.sleep(delay_s)

    async def _leave(self, asked: Resumption) -> None:
        # What `close` has found there is aborted by it.
        left = asked in self._under_way and asked.runs_on
        self._under_way.discard(asked)
        if left:
            with contextlib.suppress(CallError):
                await self.abort(asked.request_id, timeout_s=_ABORT_S)

    async def _call(self, method: Any, request: Any, timeout_s: float | None) -> Any:
        deadline_s = _deadline_s(timeout_s, self._timeout_s)
        try:
            with self._unless_closed():
                return await method(request, timeout=deadline_s)
        except grpc.RpcError as error:
            raise typed(error) from None


def make_request(prompt: Prompt, *, request_id: str = "", priority: int = 0, **options: Any) -> pb.GenerateRequest:
    """The request of a prompt and options. Raises: RequestError for an option that is none, or has another type."""
    request = pb.GenerateRequest()
    try:
        request.request_id, request.priority = request_id, priority
    except (TypeError, ValueError) as error:
        found = f"{request_id!r}, {priority!r}"
        raise RequestError("request_id, priority", found, "a string, and a number of 32 bits", str(error)) from error
    try:
        if isinstance(prompt, str):
            request.text = prompt
        elif prompt and isinstance(prompt[0], tuple | Mapping):
            request.chat.CopyFrom(_chat(prompt))
        else:
            request.token_ids.ids.extend(prompt)  # type: ignore[arg-type]
            request.token_ids.SetInParent()
    except (TypeError, ValueError) as error:
        expected = "a text, token ids of 32 bits, or messages: pairs (role, content), or mappings with these keys"
        raise RequestError("prompt", reprlib.repr(prompt), expected, str(error)) from error
    sections: dict[str, dict[str, Any]] = {section: {} for section in _SECTIONS}
    for name, value in options.items():
        if name not in _OPTIONS:
            known = sorted({*_OPTIONS, "request_id", "priority", "timeout_s"})
            near = difflib.get_close_matches(name, known, n=1)
            raise RequestError(
                name, repr(value), f"one of {', '.join(known)}", f"did you mean '{near[0]}'?" if near else ""
            )
        if value is not None:
            sections[_OPTIONS[name]][name] = value
    for section, fields in sections.items():
        try:
            getattr(request, section).CopyFrom(_SECTIONS[section](**fields))
        except (TypeError, ValueError) as error:
            raise RequestError(section, fields, "values of the types in octet.proto", str(error)) from error
    return request


def make_tokenize_request(prompt: str | Chat) -> pb.TokenizeRequest:
    """Raises: RequestError."""
    try:
        return pb.TokenizeRequest(text=prompt) if isinstance(prompt, str) else pb.TokenizeRequest(chat=_chat(prompt))
    except (TypeError, ValueError) as error:
        raise RequestError("prompt", reprlib.repr(prompt), "a text, or pairs (role, content)", str(error)) from error


def make_scale_request(sizes: Mapping[str, int]) -> pb.ScaleRequest:
    """Raises: RequestError."""
    try:
        return pb.ScaleRequest(sizes=[pb.PoolSize(pool=pool, size=size) for pool, size in sizes.items()])
    except (TypeError, ValueError) as error:
        raise RequestError("sizes", dict(sizes), "numbers of members, by pool", str(error)) from error


def _chat(messages: Any) -> pb.Chat:
    """Raises: TypeError, ValueError."""
    chat = pb.Chat()
    for message in messages:
        if isinstance(message, Mapping):
            if set(message) != {"role", "content"}:
                raise ValueError(f"a message has 'role' and 'content', found {sorted(message)}")
            chat.messages.add(role=message["role"], content=message["content"])
        else:
            role, content = message
            chat.messages.add(role=role, content=content)
    return chat


def _deadline_s(timeout_s: float | None, default_s: float) -> float:
    """Raises: RequestError."""
    if timeout_s is None:
        return default_s
    # gRPC takes an infinite one for one that has passed.
    if not (isinstance(timeout_s, int | float) and math.isfinite(timeout_s) and timeout_s > 0):
        raise RequestError("timeout_s", repr(timeout_s), "a finite number of seconds above 0")
    return timeout_s
