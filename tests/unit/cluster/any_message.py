"""Any message of a protobuf type, drawn from its own description: a field that is added tomorrow is tried, too."""

from __future__ import annotations

from typing import Any

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message
from hypothesis import strategies as st


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


def any_message(cls: type[Message]) -> st.SearchStrategy[Any]:
    return _messages(cls.DESCRIPTOR, cls)


@st.composite
def _messages(draw: st.DrawFn, descriptor: Any, cls: type[Message]) -> Any:
    message: Any = cls()
    for field in draw(
        st.lists(st.sampled_from(list(descriptor.fields)), unique_by=lambda field: field.name, max_size=5)
        if descriptor.fields
        else st.just([])
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
