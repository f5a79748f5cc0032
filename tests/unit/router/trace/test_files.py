from __future__ import annotations

import json
import pathlib
from typing import Any

import numpy as np
import pytest

from octet.errors import TraceError
from router.trace.files import TraceWriter, read_trace
from router.trace.values import MEMBER_NUMBERS, MemberRecord, Trace, TraceHeader, TraceWindow

HEADER = TraceHeader(model="glm", layers=(3, 4), num_experts=5, experts_per_token=2)
SUFFIXES = (".jsonl", ".npz")


def random_member() -> MemberRecord:
    return MemberRecord(**dict(zip(MEMBER_NUMBERS, np.random.default_rng().random(len(MEMBER_NUMBERS)), strict=True)))


def window(t_s: float, *members: str, **fields: Any) -> TraceWindow:
    rng = np.random.default_rng()
    defaults: dict[str, Any] = {
        "t_s": t_s,
        "duration_s": 5.25,
        "tokens": float(rng.integers(1, 1000)),
        "balancedness": rng.random(),
        "loads_LE": rng.integers(0, 10**6, (2, 5)).astype(np.float64),
        "members": {name: random_member() for name in members},
    }
    return TraceWindow(**defaults | fields)


def written(file: pathlib.Path, *windows: TraceWindow) -> pathlib.Path:
    writer = TraceWriter(file, HEADER)
    for one in windows:
        writer.add(one)
    writer.close()
    return file


def assert_same(read: Trace, windows: list[TraceWindow]) -> None:
    assert read.header == HEADER
    assert len(read.windows) == len(windows)
    for found, expected in zip(read.windows, windows, strict=True):
        np.testing.assert_array_equal(found.loads_LE, expected.loads_LE)
        assert found.members == expected.members
        for name in ("t_s", "duration_s", "tokens", "balancedness"):
            assert getattr(found, name) == getattr(expected, name)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_what_is_written_is_read_again(tmp_path: pathlib.Path, suffix: str) -> None:
    windows = [window(0.0, "experts-0"), window(5.25, "experts-0", "decode-0"), window(11.0)]
    assert_same(read_trace(written(tmp_path / f"trace{suffix}", *windows)), windows)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_trace_may_be_empty(tmp_path: pathlib.Path, suffix: str) -> None:
    assert_same(read_trace(written(tmp_path / f"trace{suffix}")), [])


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_loads_may_be_fractions(tmp_path: pathlib.Path, suffix: str) -> None:
    windows = [window(0.0, loads_LE=np.random.default_rng().random((2, 5)))]
    assert_same(read_trace(written(tmp_path / f"trace{suffix}", *windows)), windows)


def test_lines_are_on_disk_as_they_are_added(tmp_path: pathlib.Path) -> None:
    file = tmp_path / "trace.jsonl"
    writer = TraceWriter(file, HEADER)
    first = window(0.0)
    writer.add(first)
    assert_same(read_trace(file), [first])
    writer.close()


def test_lines_are_plain_json(tmp_path: pathlib.Path) -> None:
    file = written(tmp_path / "trace.jsonl", window(0.5, "experts-0"))
    header, first = (json.loads(line) for line in file.read_text().splitlines())
    assert header["format"] == "octet-telemetry"
    assert header["layers"] == [3, 4]
    assert np.array(first["loads_LE"]).shape == (2, 5)
    assert first["t_s"] == 0.5


def test_arrays_are_read_by_numpy_alone(tmp_path: pathlib.Path) -> None:
    file = written(tmp_path / "trace.npz", window(0.0), window(6.0))
    with np.load(file, allow_pickle=False) as arrays:
        assert arrays["loads_LE"].shape == (2, 2, 5)
        assert arrays["t_s"].tolist() == [0.0, 6.0]


@pytest.mark.parametrize("name", ["trace.csv", "trace", "trace.json"])
def test_another_suffix_is_refused(tmp_path: pathlib.Path, name: str) -> None:
    with pytest.raises(TraceError, match=r"expected \.jsonl or \.npz"):
        TraceWriter(tmp_path / name, HEADER)
    with pytest.raises(TraceError, match=r"expected \.jsonl or \.npz"):
        read_trace(tmp_path / name)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_file_that_is_not_there_is_named(tmp_path: pathlib.Path, suffix: str) -> None:
    with pytest.raises(TraceError, match=f"trace{suffix}.*No such file"):
        read_trace(tmp_path / f"trace{suffix}")
    with pytest.raises(TraceError, match="a file that can be written"):
        TraceWriter(tmp_path / "nowhere" / f"trace{suffix}", HEADER)


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize(
    "content", [b"", b"nothing of ours\n", b"\x00\xff\x00", b"[1, 2]\n", b"PK\x03\x04 and no more"]
)
def test_what_is_no_trace_is_refused(tmp_path: pathlib.Path, suffix: str, content: bytes) -> None:
    file = tmp_path / f"trace{suffix}"
    file.write_bytes(content)
    with pytest.raises(TraceError):
        read_trace(file)


def test_a_lone_array_is_no_trace(tmp_path: pathlib.Path) -> None:
    with (tmp_path / "trace.npz").open("wb") as file:
        np.save(file, np.zeros(3))
    with pytest.raises(TraceError, match="the arrays of a trace"):
        read_trace(tmp_path / "trace.npz")


def test_a_pickled_array_is_never_loaded(tmp_path: pathlib.Path) -> None:
    np.savez(tmp_path / "trace.npz", header=np.array([{"a": 1}], dtype=object))
    with pytest.raises(TraceError, match="allow_pickle"):
        read_trace(tmp_path / "trace.npz")


def changed(file: pathlib.Path, line: int, **fields: Any) -> pathlib.Path:
    """The file with some fields of a line set, or left out where they are None."""
    lines = file.read_text().splitlines()
    tree = json.loads(lines[line]) | fields
    lines[line] = json.dumps({name: value for name, value in tree.items() if value is not None})
    file.write_text("\n".join(lines))
    return file


@pytest.mark.parametrize(
    ("line", "fields", "message"),
    [
        (0, {"version": 2}, r"line 1: found version 2, expected version 1; read it with"),
        (0, {"format": "other"}, r"line 1: found the format 'other'"),
        (0, {"num_experts": None}, r"line 1: found no 'num_experts'"),
        (0, {"layers": 7}, r"line 1: "),
        (1, {"loads_LE": None}, r"line 2: found no 'loads_LE'"),
        (1, {"loads_LE": [[1, 2], [3, 4]]}, r"line 2: found loads_LE of \[2, 2\], expected \[2, 5\]"),
        (1, {"loads_LE": [[1], [3, 4]]}, r"line 2: "),
        (1, {"loads_LE": [[-1, 0, 0, 0, 0]] * 2}, r"line 2: found a load that is no count"),
        (1, {"t_s": "soon"}, r"line 2: found could not convert"),
        (1, {"members": {"experts-0": {"busy_share": 1}}}, r"line 2: found no 'rows_per_s'"),
        (1, {"members": [1]}, r"line 2: "),
        (2, {"t_s": 0.0}, r"window 1: found 5\.25 s from 0\.0 s on, expected some time after 0\.0 s"),
        (2, {"duration_s": 0}, r"window 1: found 0\.0 s from"),
    ],
    ids=str,
)
def test_an_error_names_the_line_and_what_is_wrong(
    tmp_path: pathlib.Path, line: int, fields: dict[str, Any], message: str
) -> None:
    file = changed(written(tmp_path / "trace.jsonl", window(0.0), window(5.25)), line, **fields)
    with pytest.raises(TraceError, match=message):
        read_trace(file)


@pytest.mark.parametrize("name", ["t_s", "loads_LE", "members", "member_busy_share"])
def test_an_array_that_is_missing_is_named(tmp_path: pathlib.Path, name: str) -> None:
    file = written(tmp_path / "trace.npz", window(0.0, "experts-0"))
    with np.load(file) as stored:
        arrays = {key: stored[key] for key in stored.files if key != name}
    np.savez(file, allow_pickle=False, **arrays)
    with pytest.raises(TraceError, match=f"{name}: found nothing"):
        read_trace(file)


def test_arrays_of_different_lengths_are_refused(tmp_path: pathlib.Path) -> None:
    file = written(tmp_path / "trace.npz", window(0.0), window(6.0))
    with np.load(file) as stored:
        arrays = {key: stored[key] for key in stored.files}
    np.savez(file, allow_pickle=False, **arrays | {"tokens": arrays["tokens"][:1]})
    with pytest.raises(TraceError, match=r"tokens: found an array of \[1\], expected \[2\] in front"):
        read_trace(file)
