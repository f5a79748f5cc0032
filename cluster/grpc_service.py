"""The gRPC face of a frontend: protobuf in, protobuf out, typed errors as status codes."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Any, NoReturn

import grpc
from google.protobuf import any_pb2
from google.rpc import code_pb2, error_details_pb2, status_pb2
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection
from grpc_status import rpc_status

from cluster.answer import MatchedStop, Piece
from cluster.frontend import Frontend
from cluster.live_requests import Increment
from cluster.validation import chat_messages, check_ids, parse_request, require_tokenizer
from model.config import ARCHITECTURE
from octet.config import FrontendConfig
from octet.errors import (
    ConfigError,
    DeadlineExceededError,
    OctetError,
    QueueFullError,
    RequestError,
    RequestExistsError,
    UnavailableError,
)
from octet.ids import RequestId
from octet.messages import TokenLogprob
from octet.v1 import octet_pb2 as pb
from octet.v1 import octet_pb2_grpc as rpc

_log = logging.getLogger(__name__)

Context = grpc.aio.ServicerContext[Any, Any]
_CODES: tuple[tuple[type[OctetError], Any], ...] = (
    (RequestError, code_pb2.INVALID_ARGUMENT),
    (RequestExistsError, code_pb2.ALREADY_EXISTS),
    (QueueFullError, code_pb2.RESOURCE_EXHAUSTED),
    (UnavailableError, code_pb2.UNAVAILABLE),
    (DeadlineExceededError, code_pb2.DEADLINE_EXCEEDED),
)
_FINISH = {"stop": pb.STOP, "length": pb.LENGTH, "aborted": pb.ABORTED, None: pb.FINISH_REASON_UNSPECIFIED}
SERVICES = ("octet.v1.Generation", "octet.v1.Cluster", "")
"""Services that have a health of their own; the empty name is the server's."""


class GenerationService(rpc.GenerationServicer):
    def __init__(self, frontend: Frontend, model_name: str, num_parameters: int) -> None:
        self._frontend, self._model_name, self._num_parameters = frontend, model_name, num_parameters

    async def Generate(self, request: pb.GenerateRequest, context: Context) -> pb.GenerateResponse:
        response = pb.GenerateResponse()
        choices: dict[int, pb.Choice] = {}
        async for chunk in self._chunks(request, context):
            response.request_id = chunk.request_id
            _add_to(choices.setdefault(chunk.index, pb.Choice(index=chunk.index)), chunk)
            response.prompt_logprobs.extend(chunk.prompt_logprobs)
            if chunk.HasField("usage"):
                response.usage.CopyFrom(chunk.usage)
        response.choices.extend(choices[index] for index in sorted(choices))
        return response

    async def GenerateStream(self, request: pb.GenerateRequest, context: Context) -> AsyncIterator[pb.GenerateChunk]:
        async for chunk in self._chunks(request, context):
            yield chunk

    async def Abort(self, request: pb.AbortRequest, context: Context) -> pb.AbortResponse:
        self._frontend.abort(RequestId(request.request_id))
        return pb.AbortResponse()

    async def Tokenize(self, request: pb.TokenizeRequest, context: Context) -> pb.TokenizeResponse:
        try:
            tokenizer = require_tokenizer(self._frontend.tokenizer, request.WhichOneof("input") or "input")
            if request.WhichOneof("input") == "chat":
                return pb.TokenizeResponse(token_ids=tokenizer.apply_chat_template(chat_messages(request.chat)))
            if request.WhichOneof("input") == "text":
                return pb.TokenizeResponse(token_ids=tokenizer.encode(request.text))
            raise RequestError("input", "nothing", "one of text, chat")
        except OctetError as error:
            await _abort(context, error)

    async def Detokenize(self, request: pb.DetokenizeRequest, context: Context) -> pb.DetokenizeResponse:
        try:
            tokenizer = require_tokenizer(self._frontend.tokenizer, "token_ids")
            token_ids = list(request.token_ids)
            check_ids(token_ids, "token_ids", self._frontend.limits.model.vocab_size)
            return pb.DetokenizeResponse(text=tokenizer.decode(token_ids, request.keep_special_tokens))
        except OctetError as error:
            await _abort(context, error)

    async def GetModelInfo(self, request: pb.GetModelInfoRequest, context: Context) -> pb.GetModelInfoResponse:
        model, tokenizer = self._frontend.limits.model, self._frontend.tokenizer
        return pb.GetModelInfoResponse(
            model=self._model_name,
            architecture=ARCHITECTURE,
            vocab_size=model.vocab_size,
            max_model_len=self._frontend.limits.max_model_len,
            num_layers=model.num_hidden_layers,
            num_experts=model.n_routed_experts,
            num_experts_per_tok=model.num_experts_per_tok,
            eos_token_ids=model.eos_token_ids,
            has_tokenizer=tokenizer is not None,
            has_chat_template=tokenizer is not None and tokenizer.has_chat_template,
            num_parameters=self._num_parameters,
        )

    async def _chunks(self, message: pb.GenerateRequest, context: Context) -> AsyncIterator[pb.GenerateChunk]:
        try:
            spec = parse_request(message, self._frontend.limits, self._frontend.tokenizer)
            # Closing the increments is what frees the work when the client goes away or its deadline passes.
            async with contextlib.aclosing(self._frontend.generate(spec, context.time_remaining())) as increments:
                async for increment in increments:
                    yield _chunk(spec.request.request_id, increment)
        except OctetError as error:
            await _abort(context, error)


class ClusterService(rpc.ClusterServicer):
    def __init__(self, status: Callable[[pb.GetStatusRequest], Awaitable[pb.GetStatusResponse]]) -> None:
        self._status = status

    async def GetStatus(self, request: pb.GetStatusRequest, context: Context) -> pb.GetStatusResponse:
        try:
            return await self._status(request)
        except OctetError as error:
            await _abort(context, error)


class GrpcServer:
    """The server with both services, health and reflection."""

    def __init__(self, config: FrontendConfig, generation: GenerationService, cluster: ClusterService) -> None:
        limit = config.max_message_mib * 2**20
        self._config = config
        self._server = grpc.aio.server(
            options=[
                # Two servers on one port would share its connections at random; the second must fail.
                ("grpc.so_reuseport", 0),
                ("grpc.max_receive_message_length", limit),
                ("grpc.max_send_message_length", limit),
                ("grpc.keepalive_time_ms", 30_000),
                ("grpc.keepalive_timeout_ms", 10_000),
                ("grpc.keepalive_permit_without_calls", 1),
                ("grpc.http2.min_recv_ping_interval_without_data_ms", 10_000),
            ]
        )
        rpc.add_GenerationServicer_to_server(generation, self._server)
        rpc.add_ClusterServicer_to_server(cluster, self._server)
        self._health = health.aio.HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        reflection.enable_server_reflection((*SERVICES[:2], health.SERVICE_NAME, reflection.SERVICE_NAME), self._server)

    async def start(self) -> int:
        """Listen, not serving yet. Returns: the port. Raises: ConfigError if it is taken."""
        address = f"{self._config.host}:{self._config.port}"
        try:
            port = self._server.add_insecure_port(address)
        except RuntimeError as error:
            raise ConfigError("frontend.port", address, "a free address of this machine", str(error)) from error
        await self.set_serving(False)
        await self._server.start()
        return port

    async def set_serving(self, serving: bool) -> None:
        state = health_pb2.HealthCheckResponse.SERVING if serving else health_pb2.HealthCheckResponse.NOT_SERVING
        for service in SERVICES:
            await self._health.set(service, state)

    async def stop(self, grace_s: float) -> None:
        await self._server.stop(grace_s)


async def _abort(context: Context, error: OctetError) -> NoReturn:
    """End the call with the code of the error; RequestErrors also name their field in a google.rpc.BadRequest."""
    code = next((code for cls, code in _CODES if isinstance(error, cls)), code_pb2.INTERNAL)
    details = []
    if isinstance(error, RequestError):
        violation = error_details_pb2.BadRequest.FieldViolation(field=error.field, description=str(error))
        detail = any_pb2.Any()
        detail.Pack(error_details_pb2.BadRequest(field_violations=[violation]))
        details.append(detail)
    status = rpc_status.to_status(status_pb2.Status(code=code, message=str(error), details=details))
    await context.abort(status.code, status.details or "", status.trailing_metadata or ())
    raise AssertionError("abort raises")


def _chunk(request_id: RequestId, increment: Increment) -> pb.GenerateChunk:
    piece = increment.piece
    chunk = pb.GenerateChunk(
        request_id=request_id,
        index=piece.choice,
        offset=piece.offset,
        token_ids=piece.token_ids,
        text=piece.text,
        logprobs=_logprobs(piece.logprobs),
        finish_reason=_FINISH[piece.finish_reason],
        matched_stop=_matched_stop(piece),
        prompt_logprobs=_logprobs(increment.prompt_logprobs),
    )
    if increment.usage is not None:
        chunk.usage.prompt_tokens = increment.usage.prompt_tokens
        chunk.usage.completion_tokens = increment.usage.completion_tokens
        chunk.usage.cached_tokens = increment.usage.cached_tokens
    return chunk


def _logprobs(logprobs: tuple[TokenLogprob, ...]) -> Iterator[pb.TokenLogprob]:
    for entry in logprobs:
        yield pb.TokenLogprob(
            token_id=entry.token_id,
            logprob=entry.logprob,
            top=[pb.Alternative(token_id=token_id, logprob=logprob) for token_id, logprob in entry.top],
        )


def _matched_stop(piece: Piece) -> pb.MatchedStop | None:
    matched: MatchedStop | None = piece.matched_stop
    if matched is None:
        return None
    return pb.MatchedStop(text=matched) if isinstance(matched, str) else pb.MatchedStop(token_id=matched)


def _add_to(choice: pb.Choice, chunk: pb.GenerateChunk) -> None:
    choice.token_ids.extend(chunk.token_ids)
    choice.text += chunk.text
    choice.logprobs.extend(chunk.logprobs)
    choice.finish_reason = chunk.finish_reason
    if chunk.HasField("matched_stop"):
        choice.matched_stop.CopyFrom(chunk.matched_stop)
