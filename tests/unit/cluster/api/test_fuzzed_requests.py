"""Requests of any content against validation: a valid request or a RequestError, which names its field.

`--hypothesis-profile=long` tries many more of them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math

from google.protobuf.message import DecodeError
from hypothesis import example, given
from hypothesis import strategies as st

from cluster.frontend.validation import Limits, check_ids, input_ids, parse_request, status_window_s, wanted_sizes
from cluster.members import POOLS
from cluster.planning import EMBEDDED_MODEL, make_plan
from model.config import GenerationDefaults
from model.tokenizer import Tokenizer
from octet.config import load_config
from octet.errors import RequestError
from octet.messages import decode, encode
from octet.v1 import octet_pb2 as pb
from tests.unit.cluster.any_message import any_message

TOKENIZER = Tokenizer.open(EMBEDDED_MODEL)
PLAN = make_plan(load_config(None, ["model.max_model_len=64"]))
LIMITS = dataclasses.replace(Limits.of(PLAN), generation=GenerationDefaults())


def _check(request: pb.GenerateRequest) -> None:
    try:
        spec = parse_request(request, LIMITS, TOKENIZER)
    except RequestError:
        return
    assert decode(encode(spec.request)) == spec.request


@given(request=any_message(pb.GenerateRequest))
def test_any_request_is_valid_or_a_typed_error(request: pb.GenerateRequest) -> None:
    _check(request)


@given(request=any_message(pb.TokenizeRequest))
def test_any_text_is_tokenized_or_a_typed_error(request: pb.TokenizeRequest) -> None:
    assert TOKENIZER is not None
    with contextlib.suppress(RequestError):
        pb.TokenizeResponse(token_ids=input_ids(request, TOKENIZER))


@given(request=any_message(pb.DetokenizeRequest))
def test_any_ids_are_text_or_a_typed_error(request: pb.DetokenizeRequest) -> None:
    assert TOKENIZER is not None
    with contextlib.suppress(RequestError):
        check_ids(list(request.token_ids), "token_ids", PLAN.model.vocab_size)
        pb.DetokenizeResponse(text=TOKENIZER.decode(list(request.token_ids), request.keep_special_tokens))


@given(request=any_message(pb.ScaleRequest))
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


@given(request=any_message(pb.GetStatusRequest))
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
