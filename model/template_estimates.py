"""What filters and string methods of a template make, before they make it."""

from __future__ import annotations

import re
import string
from collections.abc import Callable, Iterable
from typing import Any

from model.template_meter import Meter, TemplateLimitError

_MAX_FORMAT_CHARACTERS = 2**14
_MAX_RARE_BYTES = 2**16
_MAX_RARE_ARGUMENT_BYTES = 2**10
_MAX_DIGITS = 4300
_PIECE_BYTES = 84
"""Of a list's entry that is a string of its own."""
_PERCENT = re.compile(r"%(?:\([^)]*\))?[#0\- +]*(\*|\d+)?(?:\.(\*|\d+))?")

Args = list[Any]
Kwargs = dict[str, Any]
FilterEstimate = Callable[[Meter, Any, Args, Kwargs], tuple[Any, Args, Kwargs, int]]
"""Value, other arguments, named ones, and the bytes that the filter makes."""
MethodEstimate = Callable[[Meter, str, tuple[Any, ...], Kwargs], tuple[tuple[Any, ...], int]]


def percent_bytes(meter: Meter, text: str, values: Any) -> int:
    """Of `text % values`."""
    _check_format(text)
    specs = _PERCENT.findall(text)
    widths = [width for spec in specs for width in spec if width]
    return len(text) + sum(map(_width, widths)) + len(specs) * meter.size(values)


def format_bytes(meter: Meter, formatter: string.Formatter, text: str, args: tuple[Any, ...], kwargs: Kwargs) -> int:
    """Of `text.format(*args, **kwargs)`, and `format_map`. Raises: ValueError as the formatting itself."""
    _check_format(text)
    num_bytes, fields = len(text), 0
    for _, field, spec, _ in formatter.parse(text):
        if field is None:
            continue
        if spec and "{" in spec:
            raise TemplateLimitError("formats with a width that is a field, which is not allowed here")
        fields += 1
        num_bytes += sum(map(_width, re.findall(r"\d+", spec or "")))
    values = [value for name, value in kwargs.items() if not name.startswith("_")]
    return num_bytes + fields * sum(meter.measure(value, inside=True)[0] for value in (*args, *values))


def _check_format(text: str) -> None:
    if len(text) > _MAX_FORMAT_CHARACTERS:
        raise TemplateLimitError(f"formats by {len(text)} characters, of at most {_MAX_FORMAT_CHARACTERS}")


def _width(digits: str) -> int:
    if digits == "*" or len(digits) > 9:
        raise TemplateLimitError(f"formats with a width of {digits[:20]}, which is not allowed here")
    return int(digits)


def _number(value: Any, what: str) -> int:
    """Raises: TemplateLimitError for what is no number; TypeError would come of it anyway."""
    if not isinstance(value, int):
        raise TemplateLimitError(f"gives {what} a {type(value).__name__} for a number")
    return max(int(value), 0)


def _given(args: Args | tuple[Any, ...], kwargs: Kwargs, index: int, name: str, default: Any) -> Any:
    return args[index] if len(args) > index else kwargs.get(name, default)


def _listed(value: Any) -> Any:
    """Iterators as lists, to be measured before they are used."""
    return value if isinstance(value, str | dict | list | tuple) else list(value)


# --- filters ---


def _linear(meter: Meter, value: Any, args: Args, kwargs: Kwargs) -> tuple[Any, Args, Kwargs, int]:
    """Makes no more than a few times what it gets."""
    return value, args, kwargs, meter.size(value) if isinstance(value, str) else 0


def _text(meter: Meter, value: Any, args: Args, kwargs: Kwargs) -> tuple[Any, Args, Kwargs, int]:
    """The same, of the value as text."""
    return value, args, kwargs, meter.size(value) + sum(map(meter.size, args)) + sum(map(meter.size, kwargs.values()))


def _listing(meter: Meter, value: Any, args: Args, kwargs: Kwargs) -> tuple[Any, Args, Kwargs, int]:
    """Makes lists of what it gets."""
    if isinstance(value, str):
        return value, args, kwargs, _PIECE_BYTES * len(value)
    for argument in (*args, *kwargs.values()):
        if isinstance(argument, int) and argument > 100_000:
            raise TemplateLimitError(f"asks for {argument} parts, of at most 100000")
    return value, args, kwargs, 0


def _keyed(meter: Meter, value: Any, args: Args, kwargs: Kwargs) -> tuple[Any, Args, Kwargs, int]:
    """Makes a key of each entry, of what is in it."""
    value = _listed(value)
    num_bytes = _PIECE_BYTES * len(value) if isinstance(value, str) else meter.size(value)
    return value, args, kwargs, num_bytes


def _rare(meter: Meter, value: Any, args: Args, kwargs: Kwargs) -> tuple[Any, Args, Kwargs, int]:
    """Slow, or makes much of little: for short texts only."""
    arguments = sum(map(meter.size, (*args, *kwargs.values())))
    if meter.size(value) > _MAX_RARE_BYTES or arguments > _MAX_RARE_ARGUMENT_BYTES:
        raise TemplateLimitError("gives a filter that is for short texts a long one")
    return value, args, kwargs, 0


def _replace(meter: Meter, value: Any, args: Args, kwargs: Kwargs) -> tuple[Any, Args, Kwargs, int]:
    value = value if isinstance(value, str) else str(value)
    old, new = _given(args, kwargs, 0, "old", ""), _given(args, kwargs, 1, "new", "")
    return value, args, kwargs, _replaced(meter, value, old, new)


def _replaced(meter: Meter, text: str, old: Any, new: Any) -> int:
    times = text.count(old if isinstance(old, str) else str(old))
    return meter.size(text) + times * meter.size(new)


def _join(meter: Meter, value: Any, args: Args, kwargs: Kwargs) -> tuple[Any, Args, Kwargs, int]:
    if _given(args, kwargs, 1, "attribute", None) is not None:
        raise TemplateLimitError("joins by an attribute, which is not allowed here; map(attribute=...) does the same")
    value = _listed(value)
    separator = _given(args, kwargs, 0, "d", "")
    return value, args, kwargs, meter.size(value) + len(value) * meter.size(separator)


def _center(meter: Meter, value: Any, args: Args, kwargs: Kwargs) -> tuple[Any, Args, Kwargs, int]:
    return value, args, kwargs, meter.size(value) + 4 * _number(_given(args, kwargs, 0, "width", 80), "center")


def _indent(meter: Meter, value: Any, args: Args, kwargs: Kwargs) -> tuple[Any, Args, Kwargs, int]:
    width = _given(args, kwargs, 0, "width", 4)
    by = meter.size(width) if isinstance(width, str) else _number(width, "indent")
    lines = len(value.splitlines()) if isinstance(value, str) else meter.size(value)
    return value, args, kwargs, meter.size(value) + (lines + 1) * by


def _format(meter: Meter, value: Any, args: Args, kwargs: Kwargs) -> tuple[Any, Args, Kwargs, int]:
    value = value if isinstance(value, str) else str(value)
    return value, args, kwargs, percent_bytes(meter, value, kwargs or tuple(args))


def _tojson(meter: Meter, value: Any, args: Args, kwargs: Kwargs) -> tuple[Any, Args, Kwargs, int]:
    num_bytes, depth = meter.measure(value)
    each = 0
    for argument in (*args, *kwargs.values()):
        each += max(argument, 0) if isinstance(argument, int) else meter.size(argument) if argument else 0
    return value, args, kwargs, num_bytes + (num_bytes // 8) * depth * each


def _round(meter: Meter, value: Any, args: Args, kwargs: Kwargs) -> tuple[Any, Args, Kwargs, int]:
    precision = _given(args, kwargs, 0, "precision", 0)
    if not isinstance(precision, int) or abs(precision) > 300:
        raise TemplateLimitError("rounds to more than 300 digits")
    return value, args, kwargs, 0


def _int(meter: Meter, value: Any, args: Args, kwargs: Kwargs) -> tuple[Any, Args, Kwargs, int]:
    if isinstance(value, str) and len(value) > _MAX_DIGITS:
        raise TemplateLimitError(f"reads a number of {len(value)} characters, of at most {_MAX_DIGITS}")
    return value, args, kwargs, 0


def _sum(meter: Meter, value: Any, args: Args, kwargs: Kwargs) -> tuple[Any, Args, Kwargs, int]:
    if not isinstance(_given(args, kwargs, 1, "start", 0), int | float):
        raise TemplateLimitError("sums what are no numbers")
    return value, args, kwargs, 0


def _kinds(estimate: FilterEstimate, names: str) -> dict[str, FilterEstimate]:
    return dict.fromkeys(names.split(), estimate)


FILTERS: dict[str, FilterEstimate] = {
    **_kinds(_linear, "abs attr capitalize count length lower upper trim reverse random first last default d safe map"),
    **_kinds(_linear, "select reject selectattr rejectattr filesizeformat float items"),
    **_kinds(_text, "e escape forceescape string truncate urlencode"),
    **_kinds(_listing, "list batch slice title wordcount"),
    **_kinds(_keyed, "sort unique dictsort groupby min max"),
    **_kinds(_rare, "pprint striptags urlize wordwrap xmlattr"),
    "replace": _replace,
    "join": _join,
    "center": _center,
    "indent": _indent,
    "format": _format,
    "tojson": _tojson,
    "round": _round,
    "int": _int,
    "sum": _sum,
}

# --- methods of strings ---


def _plain(meter: Meter, text: str, args: tuple[Any, ...], kwargs: Kwargs) -> tuple[tuple[Any, ...], int]:
    return args, 0


def _padded(meter: Meter, text: str, args: tuple[Any, ...], kwargs: Kwargs) -> tuple[tuple[Any, ...], int]:
    return args, meter.size(text) + 4 * _number(_given(args, kwargs, 0, "width", 0), "a method")


def _tabs(meter: Meter, text: str, args: tuple[Any, ...], kwargs: Kwargs) -> tuple[tuple[Any, ...], int]:
    width = _number(_given(args, kwargs, 0, "tabsize", 8), "expandtabs")
    return args, meter.size(text) + 4 * text.count("\t") * width


def _split(meter: Meter, text: str, args: tuple[Any, ...], kwargs: Kwargs) -> tuple[tuple[Any, ...], int]:
    separator, most = _given(args, kwargs, 0, "sep", None), _given(args, kwargs, 1, "maxsplit", -1)
    pieces = text.count(separator) if isinstance(separator, str) and separator else len(text) // 2
    pieces = min(pieces, most) if isinstance(most, int) and most >= 0 else pieces
    return args, meter.size(text) + pieces * _PIECE_BYTES


def _lines(meter: Meter, text: str, args: tuple[Any, ...], kwargs: Kwargs) -> tuple[tuple[Any, ...], int]:
    # Two in three of them at most are empty, or one character that is shared.
    return args, meter.size(text) + text.count("\n") * _PIECE_BYTES + len(text) // 2


def _replace_method(meter: Meter, text: str, args: tuple[Any, ...], kwargs: Kwargs) -> tuple[tuple[Any, ...], int]:
    old, new = (*args, "", "")[:2]
    return args, _replaced(meter, text, old, new)


def _join_method(meter: Meter, text: str, args: tuple[Any, ...], kwargs: Kwargs) -> tuple[tuple[Any, ...], int]:
    parts: Iterable[Any] = _listed(args[0]) if args else ()
    parts = list(parts)
    return (parts, *args[1:]), meter.size(parts) + len(parts) * meter.size(text)


_PLAIN_METHODS = """
capitalize casefold count encode endswith find index isalnum isalpha isascii isdecimal isdigit isidentifier islower
isnumeric isprintable isspace istitle isupper lower lstrip partition removeprefix removesuffix rfind rindex rpartition
rstrip startswith strip swapcase title upper
"""
STR_METHODS: dict[str, MethodEstimate] = {
    **dict.fromkeys(_PLAIN_METHODS.split(), _plain),
    **dict.fromkeys(("center", "ljust", "rjust", "zfill"), _padded),
    "expandtabs": _tabs,
    "split": _split,
    "rsplit": _split,
    "splitlines": _lines,
    "replace": _replace_method,
    "join": _join_method,
}
