"""Typed errors as gRPC statuses, with what a client can act on in the details."""

from __future__ import annotations

from typing import Any, NoReturn

import grpc
from google.protobuf import any_pb2
from google.rpc import code_pb2, error_details_pb2, status_pb2
from grpc_status import rpc_status

from octet import errors
from octet.metadata import RETRY_PUSHBACK_MS

Context = grpc.aio.ServicerContext[Any, Any]

_CODES: tuple[tuple[type[errors.OctetError], Any], ...] = (
    (errors.RequestError, code_pb2.INVALID_ARGUMENT),
    (errors.RequestExistsError, code_pb2.ALREADY_EXISTS),
    (errors.RequestUnknownError, code_pb2.NOT_FOUND),
    (errors.RequestCancelledError, code_pb2.CANCELLED),
    (errors.QueueFullError, code_pb2.RESOURCE_EXHAUSTED),
    (errors.SlowReaderError, code_pb2.RESOURCE_EXHAUSTED),
    (errors.UnavailableError, code_pb2.UNAVAILABLE),
    (errors.StartupError, code_pb2.UNAVAILABLE),
    (errors.LaneError, code_pb2.UNAVAILABLE),
    (errors.ChangeRefusedError, code_pb2.FAILED_PRECONDITION),
    (errors.ConfigError, code_pb2.FAILED_PRECONDITION),
    (errors.CheckpointError, code_pb2.FAILED_PRECONDITION),
    (errors.DeadlineExceededError, code_pb2.DEADLINE_EXCEEDED),
)
_DOMAIN = "octet"


async def abort(context: Context, error: errors.OctetError) -> NoReturn:
    """End the call with the code of the error.

    Details: a google.rpc.BadRequest names the field of a RequestError, a RetryInfo tells when to try a refused request
    again (as does the trailing metadata), an ErrorInfo that an accepted request has failed for good.
    """
    code = next((code for cls, code in _CODES if isinstance(error, cls)), code_pb2.INTERNAL)
    status = rpc_status.to_status(status_pb2.Status(code=code, message=str(error), details=_details(error)))
    metadata = tuple(status.trailing_metadata or ())
    if isinstance(error, errors.QueueFullError):
        metadata += ((RETRY_PUSHBACK_MS, str(round(error.retry_after_s * 1000))),)
    await context.abort(status.code, status.details or "", metadata)
    raise AssertionError("abort raises")


def _details(error: errors.OctetError) -> list[any_pb2.Any]:
    details = []
    match error:
        case errors.RequestError(field=field):
            violation = error_details_pb2.BadRequest.FieldViolation(field=field, description=str(error))
            details.append(_packed(error_details_pb2.BadRequest(field_violations=[violation])))
        case errors.QueueFullError(retry_after_s=retry_after_s):
            retry = error_details_pb2.RetryInfo()
            retry.retry_delay.FromMilliseconds(round(retry_after_s * 1000))
            details.append(_packed(retry))
        case errors.RequestFailedError():
            details.append(_packed(error_details_pb2.ErrorInfo(reason="REQUEST_FAILED", domain=_DOMAIN)))
    return details


def _packed(message: Any) -> any_pb2.Any:
    packed = any_pb2.Any()
    packed.Pack(message)
    return packed
