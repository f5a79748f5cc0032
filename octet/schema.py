"""Whether a value that came over a wire is of the type that a field says. Made once for each class, from its hints."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Callable, Mapping
from typing import Any

Check = Callable[[object], bool]


def field_checks(cls: type) -> Mapping[str, Check]:
    """A check for each field of a dataclass: deep in tuples, shallow in dataclasses, which are checked when made."""
    hints = typing.get_type_hints(cls)
    return {field.name: _check(hints[field.name]) for field in dataclasses.fields(cls)}


def _check(hint: Any) -> Check:
    plain = _plain(hint)
    if plain is not None:
        return lambda value: type(value) in plain
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        checks = [_check(argument) for argument in arguments]
        return lambda value: any(check(value) for check in checks)
    if origin is typing.Literal:
        return lambda value: type(value) is str and value in arguments
    if origin is not tuple:
        raise TypeError(f"no check for a field of type {hint}")
    if arguments[-1] is Ellipsis:
        each = _check(arguments[0])
        return lambda value: type(value) is tuple and all(map(each, value))
    parts = [_check(argument) for argument in arguments]
    return lambda value: (
        type(value) is tuple
        and len(value) == len(parts)
        and all(check(part) for check, part in zip(parts, value, strict=True))
    )


def _plain(hint: Any) -> frozenset[type] | None:
    """The exact types of a hint, if it is nothing but those."""
    if isinstance(hint, typing.NewType):
        return _plain(hint.__supertype__)
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        parts = [_plain(argument) for argument in typing.get_args(hint)]
        return None if None in parts else frozenset[type]().union(*(part for part in parts if part is not None))
    if hint is float:
        # Whole numbers are numbers; truth values are none.
        return frozenset({float, int})
    return frozenset({hint}) if isinstance(hint, type) and typing.get_origin(hint) is None else None
