"""Config files and overrides of any content: a config, or a ConfigError that names the field or the file.

`--hypothesis-profile=long` tries many more of them.
"""

# ruff: noqa: PT017 - an error is one of two outcomes.

import pathlib
import time
from typing import Any

import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st

from octet.config import OctetConfig, load_config
from octet.errors import ConfigError

SECTIONS = list(OctetConfig.model_fields)
NODES = [field.annotation for field in OctetConfig.model_fields.values()]
FIELDS = sorted({name for node in NODES for name in getattr(node, "model_fields", {})})
LAUGHS = "a0: &a0 [x]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]\n" for i in range(1, 60))
MERGES = "a0: &a0 {x: 1}\n" + "".join(f"a{i}: &a{i} {{<<: [*a{i - 1}, *a{i - 1}]}}\n" for i in range(1, 60))

scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.sampled_from([0, 1, 10**400, -1, 2**63]),
    st.floats(),
    st.text(max_size=5),
    st.dates(),
    st.binary(max_size=3),
)
values = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(FIELDS) | st.text(max_size=3) | st.integers(), inner, max_size=4)
    ),
    max_leaves=5,
)
sections = st.dictionaries(st.sampled_from(FIELDS), values, max_size=3) | values
trees = st.dictionaries(st.sampled_from(SECTIONS) | st.text(max_size=3), sections)
texts = st.text(alphabet="&*a:{}[]!<>-?|#%@`\"', \n\t012.e~", max_size=40) | st.text(max_size=20)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return tmp_path_factory.mktemp("configs") / "config.yaml"


def check(file: pathlib.Path | None, overrides: list[str]) -> None:
    try:
        found = load_config(file, overrides)
    except ConfigError as error:
        assert error.field
        assert len(str(error)) < 4000
        str(error).encode()
        return
    assert OctetConfig.model_validate(found.model_dump()) == found


@settings(max_examples=max(40, settings().max_examples // 3))
@given(tree=trees)
def test_any_tree_is_a_config_or_a_typed_error(file: pathlib.Path, tree: dict[str, Any]) -> None:
    file.write_text(yaml.safe_dump(tree))
    check(file, [])


@given(data=texts.map(str.encode) | st.binary(max_size=40))
@example(data=b"a: !!python/object/apply:os.system [id]")
@example(data=b"kv: {page_size: " + b"1" * 5000 + b"}")
@example(data=b"model: 2001-99-99")
@example(data=b"a: &a [*a]")
@example(data=b"&a model: {? *a : *a}")
@example(data=b"\xff\xfe")
@example(data=b"[" * 200)
@example(data=b"- " * 200)
@example(data=b"{a: " * 200)
def test_any_bytes_are_a_config_or_a_typed_error(file: pathlib.Path, data: bytes) -> None:
    file.write_bytes(data)
    check(file, [])


@pytest.mark.parametrize("text", [LAUGHS, MERGES, "model: &a {path: *a}", "a: " * 100_000])
def test_what_is_much_when_it_is_written_out_is_refused_soon(file: pathlib.Path, text: str) -> None:
    file.write_text(text)
    started_s = time.thread_time()
    with pytest.raises(ConfigError, match="invalid YAML"):
        load_config(file)
    assert time.thread_time() - started_s < 5


@given(
    overrides=st.lists(
        st.builds("{}.{}={}".format, st.sampled_from(SECTIONS), st.sampled_from(FIELDS), texts | scalars.map(str))
        | st.builds("{}={}".format, texts, texts)
        | texts,
        max_size=3,
    )
)
@example(overrides=["." * 500 + "=1"])
@example(overrides=["lane.timeout_s=.inf"])
@example(overrides=["lane.timeout_s=.nan"])
@example(overrides=["model=" + "[" * 200])
def test_any_overrides_are_a_config_or_a_typed_error(overrides: list[str]) -> None:
    check(None, overrides)


@pytest.mark.parametrize("value", [".inf", ".nan", "-.inf"])
def test_no_number_is_infinite(value: str) -> None:
    with pytest.raises(ConfigError, match=r"lane\.timeout_s"):
        load_config(None, [f"lane.timeout_s={value}"])
