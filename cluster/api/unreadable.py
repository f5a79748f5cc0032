"""Requests that are no protobuf: the caller's fault, and said so. gRPC by itself calls them UNKNOWN."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import grpc
from google.protobuf.message import DecodeError

from cluster.api.status_codes import Context, abort
from octet.errors import RequestError

_OURS = "/octet.v1."


class Unreadable(grpc.aio.ServerInterceptor):
    """Answers INVALID_ARGUMENT in place of the methods of our services, which take one request each."""

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        handler = await continuation(handler_call_details)
        if handler is None or not handler_call_details.method.startswith(_OURS):
            return handler
        parse, streams = handler.request_deserializer, handler.response_streaming
        behave = handler.unary_stream if streams else handler.unary_unary

        def parsed(data: bytes) -> Any:
            try:
                return parse(data)
            except DecodeError as error:
                return error

        async def answered(request: Any, context: Context) -> Any:
            if isinstance(request, DecodeError):
                await abort(context, RequestError("request", str(request), "a message of this API"))
            return await behave(request, context)

        make = grpc.unary_stream_rpc_method_handler if streams else grpc.unary_unary_rpc_method_handler
        return make(answered, request_deserializer=parsed, response_serializer=handler.response_serializer)
