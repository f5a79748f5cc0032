"""What a trace of requests may be."""

from __future__ import annotations

import json
import pathlib
import random
from typing import Any

import pytest

from octet.errors import ConfigError
from ops.simulate.load import read_requests

GOOD = {"timestamp": 0, "input_length": 3, "output_length": 4, "hash_ids": [1]}


def written(file: pathlib.Path, *entries: object) -> pathlib.Path:
    file.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return file


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("timestamp", float("nan")),
        ("timestamp", float("inf")),
        ("timestamp", -float("inf")),
        ("timestamp", 10**400),
        ("timestamp", "0"),
        ("timestamp", True),
        ("input_length", 100.5),
        ("input_length", -1),
        ("output_length", None),
        ("output_length", float("nan")),
        ("hash_ids", 7),
        ("hash_ids", "77"),
        ("hash_ids", None),
        ("hash_ids", [1, 2.5]),
        ("hash_ids", [[1]]),
        ("hash_ids", [True]),
    ],
)
def test_a_field_that_is_none_is_refused_with_its_line_and_what_it_is(
    tmp_path: pathlib.Path, field: str, value: Any
) -> None:
    before = random.randint(0, 5)
    file = written(tmp_path / "trace.jsonl", *[GOOD] * before, GOOD | {field: value})
    with pytest.raises(ConfigError, match=rf"trace\.jsonl:{before + 1}: {field} .*expected a ") as told:
        read_requests(file)
    assert len(str(told.value).splitlines()) == 1


@pytest.mark.parametrize("entry", [[1], "text", None, 5])
def test_a_line_that_is_no_object_is_refused(tmp_path: pathlib.Path, entry: object) -> None:
    with pytest.raises(ConfigError, match=r":2: .*expected a JSON object"):
        read_requests(written(tmp_path / "trace.jsonl", GOOD, entry))


@pytest.mark.parametrize("field", ["timestamp", "input_length", "output_length"])
def test_a_field_that_is_missing_is_named(tmp_path: pathlib.Path, field: str) -> None:
    entry = {name: value for name, value in GOOD.items() if name != field}
    with pytest.raises(ConfigError, match=f":1: no {field}"):
        read_requests(written(tmp_path / "trace.jsonl", entry))


def test_prefixes_may_be_left_out(tmp_path: pathlib.Path) -> None:
    entry = {name: value for name, value in GOOD.items() if name != "hash_ids"}
    (request,) = read_requests(written(tmp_path / "trace.jsonl", entry))
    assert request.blocks == ()


def test_the_first_request_comes_at_once_wherever_the_clock_of_a_trace_began(tmp_path: pathlib.Path) -> None:
    begin_ms = random.randint(-(10**9), 2 * 10**12)
    later_ms = [random.randint(0, 10**6) for _ in range(20)]
    entries = [GOOD | {"timestamp": begin_ms + at_ms} for at_ms in (*later_ms, 0)]
    requests = read_requests(written(tmp_path / "trace.jsonl", *entries))
    assert [one.at_s for one in requests] == pytest.approx([0, *(at_ms / 1000 for at_ms in sorted(later_ms))])
    assert requests[0].at_s == 0
