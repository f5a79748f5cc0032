"""Model directories of any content: a checkpoint, or a CheckpointError that names the file.

`--hypothesis-profile=long` tries many more of them.
"""

# ruff: noqa: PT017 - an error is one of two outcomes.

import json
import math
import os
import pathlib
import struct
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from model.census import required_tensors
from model.checkpoint import Checkpoint
from model.config import ARCHITECTURE, read_config, read_generation_defaults
from model.tokenizer import Tokenizer
from octet.errors import CheckpointError, RequestError

EMBEDDED = pathlib.Path(__file__).parents[3] / "model" / "embedded"
CONFIG: dict[str, Any] = {
    "architectures": [ARCHITECTURE],
    "vocab_size": 8,
    "hidden_size": 4,
    "intermediate_size": 4,
    "moe_intermediate_size": 2,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 4,
    "n_routed_experts": 2,
    "num_experts_per_tok": 2,
    "num_nextn_predict_layers": 0,
}
FIELDS = [*CONFIG, "n_shared_experts", "first_k_dense_replace", "n_group", "topk_group", "norm_topk_prob", "hidden_act"]
FIELDS += ["routed_scaling_factor", "use_qk_norm", "rms_norm_eps", "tie_word_embeddings", "max_position_embeddings"]
FIELDS += ["rope_theta", "rope_scaling", "rope_parameters", "partial_rotary_factor", "eos_token_id"]
FIELDS += [
    "quantization_config",
    "temperature",
    "do_sample",
    "top_k",
    "max_new_tokens",
    "original_max_position_embeddings",
]
FILE = "model.safetensors"
OTHER = "other.safetensors"

numbers = st.sampled_from([-1, 0, 1, 2, 3, 2**31, 2**63, 10**400, 0.5, math.nan, math.inf, -0.0, 1e-320, 1e308])
scalars = numbers | st.none() | st.booleans() | st.text(max_size=5) | st.integers() | st.floats()
values = st.recursive(
    scalars | st.just("yarn"),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(FIELDS) | st.text(max_size=3), inner, max_size=4)
    ),
    max_leaves=6,
)
ropes = st.fixed_dictionaries(
    {"rope_type": st.sampled_from(["yarn", "default"]) | scalars},
    optional=dict.fromkeys(("factor", "rope_theta", "mscale", "truncate", "partial_rotary_factor"), scalars),
)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return tmp_path_factory.mktemp("fuzzed")


def write(directory: pathlib.Path, **contents: Any) -> None:
    """These files, of bytes or as JSON, and no others."""
    for file in directory.iterdir():
        file.unlink()
    for name, content in contents.items():
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        (directory / name).write_bytes(data)


def safetensors(header: Any, data: bytes, length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def valid_header(directory: pathlib.Path) -> tuple[dict[str, Any], int]:
    header: dict[str, Any] = {}
    end = 0
    for name, shape in required_tensors(read_config(directory)).items():
        begin, end = end, end + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [begin, end]}
    return header, end


def opens(directory: pathlib.Path) -> bool:
    try:
        Checkpoint.open(directory)
    except CheckpointError as error:
        assert error.file
        assert len(str(error)) < 4000
        return False
    return True


# --- configs ---


@given(
    changes=st.dictionaries(st.sampled_from(FIELDS), values | ropes, max_size=4),
    left_out=st.sets(st.sampled_from(list(CONFIG)), max_size=1),
)
def test_any_fields_are_a_config_or_a_typed_error(
    directory: pathlib.Path, changes: dict[str, Any], left_out: set[str]
) -> None:
    fields = {name: value for name, value in (CONFIG | changes).items() if name not in left_out}
    write(directory, **{"config.json": fields, "generation_config.json": changes})
    for read in (read_config, read_generation_defaults):
        try:
            read(directory)
        except CheckpointError as error:
            assert error.file in ("config.json", "generation_config.json")
            assert error.subject
    opens(directory)


@pytest.mark.parametrize("changes", [{"n_routed_experts": 10**6}, {"num_hidden_layers": 10**9}, {"head_dim": 10**400}])
def test_sizes_that_no_model_has_are_refused_before_anything_is_made(
    directory: pathlib.Path, changes: dict[str, Any]
) -> None:
    write(directory, **{"config.json": CONFIG | changes})
    with pytest.raises(CheckpointError, match=next(iter(changes))):
        read_config(directory)


@given(data=st.binary(max_size=60) | st.text(alphabet='{}[]":,1e', max_size=40).map(str.encode))
def test_any_bytes_are_a_config_or_a_typed_error(directory: pathlib.Path, data: bytes) -> None:
    write(directory, **{"config.json": data})
    with pytest.raises(CheckpointError, match=r"config\.json"):
        read_config(directory)


@pytest.mark.parametrize(
    "name", ["config.json", FILE, "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"]
)
def test_nobody_waits_for_a_pipe(directory: pathlib.Path, name: str) -> None:
    write(directory, **{"config.json": CONFIG, "tokenizer.json": (EMBEDDED / "tokenizer.json").read_bytes()})
    (directory / name).unlink(missing_ok=True)
    os.mkfifo(directory / name)
    open_any: Any = Checkpoint.open if name in ("config.json", FILE) else Tokenizer.open
    with pytest.raises(CheckpointError, match="no file"):
        open_any(directory)


def test_json_that_is_nested_too_deeply_is_refused(directory: pathlib.Path) -> None:
    write(directory, **{"config.json": b'{"a":' * 100_000})
    with pytest.raises(CheckpointError, match=r"config\.json: found invalid JSON"):
        read_config(directory)


# --- weights ---


offsets = st.integers(-2, 400) | st.sampled_from([-(2**63), 2**31, 2**63, 2**64, 2**70]) | scalars
entries = st.one_of(
    values,
    st.fixed_dictionaries(
        {
            "dtype": st.sampled_from(["BF16", "F32", "F64", "I8", "F8_E4M3", "X"]) | scalars,
            "shape": st.lists(st.integers(-1, 8) | numbers, max_size=4) | scalars,
            "data_offsets": st.lists(offsets, max_size=3) | scalars,
        }
    ),
)


@given(data=st.data())
def test_any_header_is_a_checkpoint_or_a_typed_error(directory: pathlib.Path, data: st.DataObject) -> None:
    write(directory, **{"config.json": CONFIG})
    header, size = valid_header(directory)
    for name in data.draw(st.lists(st.sampled_from(list(header)), max_size=3)):
        part = data.draw(st.sampled_from(["dtype", "shape", "data_offsets", "all", "none"]))
        if part == "none":
            header.pop(name, None)
        elif part == "all" or name not in header or not isinstance(header[name], dict) or part not in header[name]:
            header[name] = data.draw(entries)
        else:
            header[name][part] = data.draw(st.lists(offsets, max_size=4) | scalars)
    if data.draw(st.booleans()):
        header[data.draw(st.text(max_size=8) | st.just("__metadata__"))] = data.draw(entries)
    length = data.draw(st.none() | st.integers(0, 4000) | st.sampled_from([2**31, 2**63, 2**64 - 1]))
    size += data.draw(st.sampled_from([0, 0, 0, -1, 1, 100]))
    (directory / FILE).write_bytes(safetensors(header, bytes(size), length))
    opens(directory)


@pytest.mark.parametrize("end", [math.inf, -math.inf, math.nan, 1e400, 0.5, None, "1", [], True, 2**70])
def test_an_offset_may_be_anything(directory: pathlib.Path, end: object) -> None:
    write(directory, **{"config.json": CONFIG})
    header, size = valid_header(directory)
    header["model.embed_tokens.weight"] = {"dtype": None, "shape": None, "data_offsets": [0, end]}
    (directory / FILE).write_bytes(safetensors(header, bytes(size), None))
    with pytest.raises(CheckpointError):
        Checkpoint.open(directory)


@given(cut=st.integers(0, 3000), flips=st.lists(st.tuples(st.integers(0, 4000), st.integers(0, 255)), max_size=3))
def test_a_damaged_file_is_a_checkpoint_or_a_typed_error(
    directory: pathlib.Path, cut: int, flips: list[tuple[int, int]]
) -> None:
    write(directory, **{"config.json": CONFIG})
    header, size = valid_header(directory)
    content = bytearray(safetensors(header, bytes(size)))
    for position, byte in flips:
        content[position % len(content)] = byte
    (directory / FILE).write_bytes(content[: len(content) - cut] if not flips else content)
    opens(directory)


def test_what_is_whole_opens(directory: pathlib.Path) -> None:
    write(directory, **{"config.json": CONFIG})
    header, size = valid_header(directory)
    (directory / FILE).write_bytes(safetensors(header, bytes(size)))
    assert opens(directory)


@pytest.mark.parametrize("shape", [[2**40, 2**20], [2**63, 2], [2**64 - 1]])
def test_a_tensor_that_says_that_it_is_huge_takes_no_memory(directory: pathlib.Path, shape: list[int]) -> None:
    write(directory, **{"config.json": CONFIG})
    header, size = valid_header(directory)
    header["model.norm.weight"] = {"dtype": "BF16", "shape": shape, "data_offsets": [0, size]}
    (directory / FILE).write_bytes(safetensors(header, bytes(size)))
    assert not opens(directory)


def test_a_name_that_stands_twice_in_a_header_is_no_crash(directory: pathlib.Path) -> None:
    write(directory, **{"config.json": CONFIG})
    header, size = valid_header(directory)
    text = json.dumps(header)[:-1] + ', "model.norm.weight": ' + json.dumps(header["model.norm.weight"]) + "}"
    (directory / FILE).write_bytes(safetensors(text.encode(), bytes(size)))
    # The library takes the last one; then nothing lies in two places, unless the bytes of one are nobody's.
    opens(directory)


files = (
    st.sampled_from([FILE, OTHER, "../x.safetensors", "/etc/passwd", "a/b.safetensors", "missing.safetensors", "."])
    | scalars
)


@given(
    changes=st.dictionaries(st.integers(0, 30), files | values, max_size=3),
    extra=st.dictionaries(st.text(max_size=5), files, max_size=1),
)
def test_any_index_is_a_checkpoint_or_a_typed_error(
    directory: pathlib.Path, changes: dict[int, Any], extra: dict[str, Any]
) -> None:
    write(directory, **{"config.json": CONFIG})
    header, size = valid_header(directory)
    names = list(header)
    (directory / OTHER).write_bytes(safetensors(header, bytes(size)))
    weight_map: dict[str, Any] = dict.fromkeys(names, OTHER) | extra
    for number, file in changes.items():
        weight_map[names[number % len(names)]] = file
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    whole = all(file == OTHER for file in weight_map.values()) and set(weight_map) == set(names)
    assert opens(directory) == whole


# --- tokenizers ---


TOKENIZER = (EMBEDDED / "tokenizer.json").read_text()


def _paths(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Of a JSON value's parts; the vocabulary's and the merges' entries are alike."""
    keys = list(value) if isinstance(value, dict) else list(range(len(value))) if isinstance(value, list) else []
    return [path] + [found for key in keys[:12] for found in _paths(value[key], (*path, key))]


TOKENIZER_PATHS = _paths(json.loads(TOKENIZER))[1:]
kinds = st.sampled_from(
    ["BPE", "WordPiece", "Unigram", "ByteLevel", "Sequence", "Metaspace", "Replace", "Split", "Strip"]
)


def _used(directory: pathlib.Path, text: str, ids: list[int]) -> None:
    try:
        tokenizer = Tokenizer.open(directory)
    except CheckpointError as error:
        assert error.file.startswith("tokenizer")
        return
    assert tokenizer is not None
    try:
        found = tokenizer.encode(text)
    except RequestError:
        found = []
    decoded, detokenizer = tokenizer.decode(found + ids), tokenizer.detokenizer()
    streamed = "".join([*map(detokenizer.push, found + ids), detokenizer.finish()])
    assert isinstance(decoded + streamed, str)


@given(
    paths=st.lists(st.sampled_from(TOKENIZER_PATHS), min_size=1, max_size=3),
    data=st.data(),
    text=st.text(max_size=20),
    ids=st.lists(st.integers(0, 2**32 - 1), max_size=4),
)
def test_a_changed_tokenizer_works_or_is_a_typed_error(
    directory: pathlib.Path, paths: list[tuple[Any, ...]], data: st.DataObject, text: str, ids: list[int]
) -> None:
    changed = json.loads(TOKENIZER)
    for *parents, leaf in paths:
        part = changed
        try:
            for key in parents:
                part = part[key]
            part[leaf] = data.draw(values | kinds)
        except (TypeError, LookupError):
            continue
    write(directory, **{"tokenizer.json": changed})
    _used(directory, text, ids)


def test_a_tokenizer_that_the_library_panics_at_is_a_typed_error(directory: pathlib.Path) -> None:
    """A panic of its Rust code is a BaseException; found by 6,000 changed files."""
    changed = json.loads(TOKENIZER)
    changed["model"]["continuing_subword_prefix"] = "longer than what is merged"
    write(directory, **{"tokenizer.json": changed})
    with pytest.raises(CheckpointError, match=r"tokenizer\.json"):
        Tokenizer.open(directory)


@given(cut=st.integers(0, len(TOKENIZER)), at=st.integers(0, len(TOKENIZER)), byte=st.integers(0, 255))
def test_a_damaged_tokenizer_works_or_is_a_typed_error(directory: pathlib.Path, cut: int, at: int, byte: int) -> None:
    content = bytearray(TOKENIZER.encode())
    content[at % len(content)] = byte
    write(directory, **{"tokenizer.json": bytes(content[:cut] if byte % 2 else content)})
    _used(directory, "some words", [1, 2, 3])


@given(fields=st.dictionaries(st.sampled_from(["chat_template", "eos_token", "bos_token"]), values))
def test_any_tokenizer_config_works_or_is_a_typed_error(directory: pathlib.Path, fields: dict[str, Any]) -> None:
    write(directory, **{"tokenizer.json": TOKENIZER.encode(), "tokenizer_config.json": fields})
    _used(directory, "some words", [])


@given(text=st.text(st.characters(), max_size=20), ids=st.lists(st.integers(0, 2**32 - 1), max_size=8))
def test_any_text_is_tokens_or_a_typed_error(text: str, ids: list[int]) -> None:
    """Lone surrogates as well, which a template may write."""
    tokenizer = Tokenizer.open(EMBEDDED)
    assert tokenizer is not None
    for encode in (tokenizer.encode, lambda given: tokenizer.apply_chat_template([("user", given)])):
        try:
            tokenizer.decode(encode(text)).encode()
        except RequestError as error:
            assert not text.isprintable()
            str(error).encode()
    tokenizer.decode(ids).encode()
