from __future__ import annotations

import dataclasses
import pickle
import types
import typing
from typing import Any

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from octet import messages
from octet.errors import WireError
from octet.ids import Epoch, LeaseId, RequestId, WorkerId
from octet.messages import Abort, KvAck, Message, StepReport, TokenEvent, WorkerLoad, decode, encode
from octet.request import Sampling
from octet.schema import field_checks

_text = st.text(st.characters(codec="utf-8"), max_size=8)
_PLAIN: dict[Any, st.SearchStrategy[Any]] = {
    str: _text,
    # The range of msgpack; seeds are unsigned 64-bit numbers.
    int: st.integers(-(2**63), 2**64 - 1),
    float: st.floats(allow_nan=False),
    bool: st.booleans(),
    bytes: st.binary(max_size=12),
    type(None): st.none(),
}


def values_of(hint: Any) -> st.SearchStrategy[Any]:
    """Values of an annotation, so that a field added tomorrow is tried too."""
    if hint in _PLAIN:
        return _PLAIN[hint]
    if isinstance(hint, typing.NewType):
        return values_of(hint.__supertype__)
    if dataclasses.is_dataclass(hint):
        hints = typing.get_type_hints(hint)
        return st.builds(
            typing.cast(Any, hint), **{field.name: values_of(hints[field.name]) for field in dataclasses.fields(hint)}
        )
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return st.one_of([values_of(argument) for argument in arguments])
    if origin is typing.Literal:
        return st.sampled_from(arguments)
    assert origin is tuple, hint
    if arguments[-1] is Ellipsis:
        return st.lists(values_of(arguments[0]), max_size=3).map(tuple)
    return st.tuples(*map(values_of, arguments))


MESSAGES = typing.get_args(Message)
LOAD = WorkerLoad(kv_pages_total=4, kv_pages_free=3, running=1, waiting=0, tokens=9)


@pytest.mark.parametrize("cls", MESSAGES)
@given(data=st.data())
def test_a_message_arrives_as_it_was_sent(cls: type, data: st.DataObject) -> None:
    message = data.draw(values_of(cls))
    assert decode(encode(message)) == message


@given(st.lists(st.integers(0, 2**32 - 1)))
def test_token_ids_are_unpacked_as_they_were_packed(token_ids: list[int]) -> None:
    assert messages.unpack_ids(messages.pack_ids(token_ids)) == token_ids


def test_token_ids_take_four_little_endian_bytes_each() -> None:
    assert messages.pack_ids([1, 0x01020304]) == b"\x01\0\0\0\x04\x03\x02\x01"


@given(st.binary())
def test_garbage_is_a_wire_error(data: bytes) -> None:
    with pytest.raises(WireError):
        decode(data)


@given(
    st.recursive(st.none() | st.integers(-9, 9) | _text, lambda inner: st.lists(inner) | st.dictionaries(_text, inner))
)
def test_msgpack_that_is_no_message_is_a_wire_error(value: Any) -> None:
    with pytest.raises(WireError):
        decode(msgpack.packb(value))


@pytest.mark.parametrize("name", ["Nobody", "", None, 7, "PoolConfig", "object", "__import__"])
def test_an_unknown_name_is_a_wire_error(name: object) -> None:
    with pytest.raises(WireError, match="unknown message"):
        decode(msgpack.packb({"$": name, "request_id": "a"}))


def test_a_part_of_a_message_is_not_a_message() -> None:
    with pytest.raises(WireError, match="WorkerLoad is not a message"):
        decode(msgpack.packb({"$": "WorkerLoad", **dataclasses.asdict(LOAD)}))


def test_a_missing_field_is_a_wire_error() -> None:
    with pytest.raises(WireError, match=r"malformed KvPull.*decode_worker"):
        decode(msgpack.packb({"$": "KvPull", "lease_id": "a"}))


def test_an_extra_field_is_a_wire_error() -> None:
    with pytest.raises(WireError, match=r"malformed KvAck.*more"):
        decode(msgpack.packb({"$": "KvAck", "lease_id": "a", "more": 1}))


@pytest.mark.parametrize("cls", MESSAGES)
@given(data=st.data())
def test_a_field_of_another_type_is_a_wire_error(cls: type, data: st.DataObject) -> None:
    """Whatever a field holds, what is decoded is a message with fields of its types, or an error."""
    packed = msgpack.unpackb(encode(data.draw(values_of(cls))))
    field = data.draw(st.sampled_from(sorted(packed.keys() - {"$"})))
    packed[field] = data.draw(st.none() | st.booleans() | st.integers(-9, 9) | st.binary() | st.lists(st.floats()))
    try:
        found = decode(msgpack.packb(packed))
    except WireError:
        return
    assert field_checks(cls)[field](getattr(found, field))


@pytest.mark.parametrize(
    ("field", "value"),
    [("request_id", 7), ("choice", "0"), ("choice", True), ("attempt", 1.0), ("attempt", [1])],
)
def test_types_are_not_converted(field: str, value: object) -> None:
    with pytest.raises(WireError, match=f"malformed Abort: field '{field}'"):
        decode(msgpack.packb({"$": "Abort", "request_id": "a", field: value}))


def test_a_sequence_that_announces_too_much_is_a_wire_error() -> None:
    """Nested announcements would make room for each of them."""
    with pytest.raises(WireError):
        decode(b"\xdd\x00\x0f\xff\xff" * 200 + bytes(2**20))


def test_an_unknown_name_inside_a_message_is_a_wire_error() -> None:
    with pytest.raises(WireError, match="unknown message 'Event'"):
        decode(msgpack.packb({"$": "StepReport", "worker_id": "a", "epoch": 1, "events": [{"$": "Event"}], "load": 0}))


def test_bytes_after_a_message_are_a_wire_error() -> None:
    with pytest.raises(WireError):
        decode(encode(Abort(request_id=RequestId("a"))) + b"\0")


class _Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return pytest.fail, ("a pickle was loaded",)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_pickle_is_never_loaded(protocol: int) -> None:
    with pytest.raises(WireError):
        decode(pickle.dumps(_Bomb(), protocol))


@pytest.mark.parametrize("value", [object(), {1, 2}, _Bomb()])
def test_what_is_not_a_message_cannot_be_sent(value: Any) -> None:
    with pytest.raises(WireError, match="cannot be sent"):
        encode(value)


@pytest.mark.parametrize("cls", [*MESSAGES, TokenEvent, Sampling])
def test_messages_are_frozen_slotted_and_keyword_only(cls: Any) -> None:
    fields = dataclasses.fields(cls)
    assert cls.__dataclass_params__.frozen
    assert "__slots__" in vars(cls)
    assert all(field.kw_only for field in fields)


def test_a_report_keeps_the_kinds_and_the_order_of_its_events() -> None:
    event = TokenEvent(request_id=RequestId("a"), choice=0, attempt=1, index=2, token_id=3, finish_reason="stop")
    report = StepReport(worker_id=WorkerId("decode-0"), epoch=Epoch(1), events=(event, event), load=LOAD)
    assert decode(encode(report)) == report


def test_an_acknowledgement_is_small() -> None:
    assert len(encode(KvAck(lease_id=LeaseId("prefill-0/1/0")))) < 64
