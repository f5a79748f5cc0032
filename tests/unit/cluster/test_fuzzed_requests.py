"""Requests of any content against validation: a valid request or a RequestError, which names its field.

`--hypothesis-profile=long` tries many more of them.
"""

from __future__ import annotations

import contextlib
import math
from typing import Any

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import DecodeError, Message
from hypothesis import example, given
from hypothesis import strategies as st

from cluster.members import POOLS
from cluster.planning import EMBEDDED_MODEL, make_plan
from cluster.validation import Limits, check_ids, input_ids, parse_request, status_window_s, wanted_sizes
from model.config import GenerationDefaults
from model.tokenizer import Tokenizer
from octet.config import load_config
from octet.errors import RequestError
from octet.messages import decode, encode
from octet.v1 import octet_pb2 as pb

TOKENIZER = Tokenizer.open(EMBEDDED_MODEL)
PLAN = make_plan(load_config(None, ["model.max_model_len=64"]))
LIMITS = Limits(
    config=PLAN.config,
    model=PLAN.model,
    generation=GenerationDefaults(),
    max_model_len=PLAN.max_model_len,
    decode_pages=PLAN.decode_pages,
)


def _whole(low: int, high: int) -> st.SearchStrategy[int]:
    return st.integers(0, 8) | st.integers(low, high)


_VALUES: dict[int, st.SearchStrategy[Any]] = {
    FieldDescriptor.CPPTYPE_INT32: _whole(-(2**31), 2**31 - 1),
    FieldDescriptor.CPPTYPE_INT64: _whole(-(2**63), 2**63 - 1),
    FieldDescriptor.CPPTYPE_UINT32: _whole(0, 2**32 - 1),
    FieldDescriptor.CPPTYPE_UINT64: _whole(0, 2**64 - 1),
    FieldDescriptor.CPPTYPE_DOUBLE: st.floats(0, 2) | st.floats(),
    FieldDescriptor.CPPTYPE_FLOAT: st.floats(0, 2, width=32) | st.floats(width=32),
    FieldDescriptor.CPPTYPE_BOOL: st.booleans(),
    FieldDescriptor.CPPTYPE_ENUM: _whole(-(2**31), 2**31 - 1),
    FieldDescriptor.CPPTYPE_STRING: st.sampled_from(("", "user", "assistant")) | st.text(max_size=8),
}


@st.composite
def _messages(draw: st.DrawFn, descriptor: Any, cls: type[Message]) -> Any:
    """Any fields with any values, so that a field added tomorrow is tried too."""
    message: Any = cls()
    for field in draw(
        st.lists(st.sampled_from(list(descriptor.fields)), unique_by=lambda field: field.name, max_size=5)
    ):
        entries = draw(st.integers(1, 3)) if field.is_repeated else 1
        for _ in range(entries):
            if field.message_type is not None:
                part = getattr(message, field.name)
                target = part.add() if field.is_repeated else part
                target.CopyFrom(draw(_messages(field.message_type, type(target))))
                if not field.is_repeated:
                    target.SetInParent()
            elif field.is_repeated:
                getattr(message, field.name).append(draw(_VALUES[field.cpp_type]))
            else:
                setattr(message, field.name, draw(_VALUES[field.cpp_type]))
    return message


def _check(request: pb.GenerateRequest) -> None:
    try:
        spec = parse_request(request, LIMITS, TOKENIZER)
    except RequestError:
        return
    assert decode(encode(spec.request)) == spec.request


@given(request=_messages(pb.GenerateRequest.DESCRIPTOR, pb.GenerateRequest))
def test_any_request_is_valid_or_a_typed_error(request: pb.GenerateRequest) -> None:
    _check(request)


@given(request=_messages(pb.TokenizeRequest.DESCRIPTOR, pb.TokenizeRequest))
def test_any_text_is_tokenized_or_a_typed_error(request: pb.TokenizeRequest) -> None:
    assert TOKENIZER is not None
    with contextlib.suppress(RequestError):
        pb.TokenizeResponse(token_ids=input_ids(request, TOKENIZER))


@given(request=_messages(pb.DetokenizeRequest.DESCRIPTOR, pb.DetokenizeRequest))
def test_any_ids_are_text_or_a_typed_error(request: pb.DetokenizeRequest) -> None:
    assert TOKENIZER is not None
    with contextlib.suppress(RequestError):
        check_ids(list(request.token_ids), "token_ids", PLAN.model.vocab_size)
        pb.DetokenizeResponse(text=TOKENIZER.decode(list(request.token_ids), request.keep_special_tokens))


@given(request=_messages(pb.ScaleRequest.DESCRIPTOR, pb.ScaleRequest))
@example(request=pb.ScaleRequest(sizes=[pb.PoolSize(pool="decode", size=2**32 - 1)]))
@example(request=pb.ScaleRequest(sizes=[pb.PoolSize(pool="decode", size=2)] * 2))
def test_any_sizes_are_pools_sizes_or_a_typed_error(request: pb.ScaleRequest) -> None:
    try:
        sizes = wanted_sizes(request)
    except RequestError as error:
        assert error.field.startswith("sizes[")  # noqa: PT017
        return
    assert set(sizes) <= set(POOLS)
    assert len(sizes) == len(request.sizes)
    assert all(size < 2**15 for size in sizes.values())


@given(request=_messages(pb.GetStatusRequest.DESCRIPTOR, pb.GetStatusRequest))
@example(request=pb.GetStatusRequest(window_s=math.nan))
def test_any_window_is_a_number_of_seconds_or_a_typed_error(request: pb.GetStatusRequest) -> None:
    try:
        window_s = status_window_s(request)
    except RequestError as error:
        assert error.field == "window_s"  # noqa: PT017
        return
    assert window_s is None or 0 < window_s < math.inf


@given(data=st.binary(max_size=200))
def test_any_bytes_are_a_request_or_an_error(data: bytes) -> None:
    try:
        request = pb.GenerateRequest.FromString(data)
    except DecodeError:
        return
    _check(request)
