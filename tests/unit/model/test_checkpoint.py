from __future__ import annotations

import json
import pathlib
import random
import subprocess
import sys
import threading
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import model.checkpoint
from model.census import is_gate_tensor, mtp_tensors, optional_mtp_tensors, required_tensors
from model.checkpoint import Checkpoint
from model.config import read_config
from model.load_progress import LoadProgress
from model.weights import load_attention_weights
from octet.errors import CheckpointError

Tensors = dict[str, torch.Tensor]


@pytest.fixture
def rng() -> random.Random:
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    torch.manual_seed(seed)
    return random.Random(seed)


@pytest.fixture
def model_dir(tmp_path: pathlib.Path, rng: random.Random) -> pathlib.Path:
    """A directory that holds only a `config.json`, of random sizes and with one MTP layer."""
    num_kv_heads = rng.randint(1, 3)
    fields = {
        "architectures": ["Glm4MoeForCausalLM"],
        "vocab_size": rng.randint(10, 60),
        "hidden_size": rng.randint(4, 30),
        "intermediate_size": rng.randint(4, 30),
        "moe_intermediate_size": rng.randint(3, 20),
        "num_hidden_layers": rng.randint(2, 3),
        "num_attention_heads": num_kv_heads * rng.randint(1, 3),
        "num_key_value_heads": num_kv_heads,
        "head_dim": 4 * rng.randint(1, 4),
        "n_routed_experts": rng.randint(2, 5),
        "num_experts_per_tok": 2,
        "first_k_dense_replace": 1,
        "use_qk_norm": True,
        "attention_bias": rng.random() < 0.5,
        "num_nextn_predict_layers": 1,
    }
    (tmp_path / "config.json").write_text(json.dumps(fields))
    return tmp_path


def tensors_for(model_dir: pathlib.Path, dtype: torch.dtype = torch.float32, *, mtp: bool = False) -> Tensors:
    config = read_config(model_dir)
    shapes = required_tensors(config) | (mtp_tensors(config) if mtp else {})
    return {name: torch.randn(shape).to(dtype) for name, shape in shapes.items()}


def write_single(model_dir: pathlib.Path, tensors: Tensors) -> pathlib.Path:
    save_file(tensors, model_dir / "model.safetensors")
    return model_dir


def write_sharded(model_dir: pathlib.Path, tensors: Tensors, num_files: int = 3) -> dict[str, str]:
    """Writes the files and their index; returns the weight map."""
    files = [f"model-{number + 1:05}-of-{num_files:05}.safetensors" for number in range(num_files)]
    for number, file in enumerate(files):
        save_file({name: tensors[name] for name in list(tensors)[number::num_files]}, model_dir / file)
    weight_map = {name: files[number % num_files] for number, name in enumerate(tensors)}
    write_index(model_dir, {"weight_map": weight_map})
    return weight_map


def write_index(model_dir: pathlib.Path, index: object) -> None:
    (model_dir / "model.safetensors.index.json").write_text(json.dumps(index))


def refusal(model_dir: pathlib.Path) -> CheckpointError:
    with pytest.raises(CheckpointError) as raised:
        Checkpoint.open(model_dir)
    return raised.value


def assert_says(error: CheckpointError, file: str, subject: str, found: str, expected: str) -> None:
    assert (error.file, error.subject) == (file, subject), str(error)
    after_found, after_expected = str(error).partition("found ")[2].split(", expected ", maxsplit=1)
    assert found in after_found, str(error)
    assert expected in after_expected, str(error)


# What opens


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_single_file_opens(model_dir: pathlib.Path, dtype: torch.dtype) -> None:
    tensors = tensors_for(model_dir, dtype)
    checkpoint = Checkpoint.open(write_single(model_dir, tensors))
    assert checkpoint.config == read_config(model_dir)
    assert checkpoint.model_dir == model_dir
    assert not checkpoint.has_mtp
    assert {name: (info.shape, info.dtype) for name, info in checkpoint.tensors.items()} == {
        name: (tuple(tensor.shape), dtype) for name, tensor in tensors.items()
    }


def test_a_sharded_checkpoint_knows_the_file_of_each_tensor(model_dir: pathlib.Path) -> None:
    weight_map = write_sharded(model_dir, tensors_for(model_dir, mtp=True))
    checkpoint = Checkpoint.open(model_dir)
    assert {name: info.file for name, info in checkpoint.tensors.items()} == weight_map
    assert checkpoint.has_mtp


def test_files_reached_by_links_open(model_dir: pathlib.Path) -> None:
    write_sharded(model_dir, tensors_for(model_dir), num_files=1)
    blob = model_dir / "blob"
    (model_dir / "model-00001-of-00001.safetensors").rename(blob)
    (model_dir / "model-00001-of-00001.safetensors").symlink_to(blob)
    assert Checkpoint.open(model_dir).tensors


def test_mtp_may_repeat_the_embedding_and_the_head(model_dir: pathlib.Path) -> None:
    optional = {name: torch.randn(shape) for name, shape in optional_mtp_tensors(read_config(model_dir)).items()}
    checkpoint = Checkpoint.open(write_single(model_dir, tensors_for(model_dir, mtp=True) | optional))
    assert checkpoint.has_mtp
    assert optional.keys() <= checkpoint.tensors.keys()


def test_dtypes_may_differ_within_a_checkpoint(model_dir: pathlib.Path) -> None:
    tensors = tensors_for(model_dir, torch.bfloat16)
    tensors |= {name: tensor.float() for name, tensor in tensors.items() if name.endswith("e_score_correction_bias")}
    assert Checkpoint.open(write_single(model_dir, tensors)).tensors["model.norm.weight"].dtype == torch.bfloat16


# What is refused


def test_a_directory_without_weights_is_refused(model_dir: pathlib.Path) -> None:
    assert_says(refusal(model_dir), "model.safetensors", "", "no such file", "model.safetensors.index.json")


def test_a_missing_tensor_is_refused(model_dir: pathlib.Path, rng: random.Random) -> None:
    tensors = tensors_for(model_dir)
    name = rng.choice(sorted(tensors))
    shape = list(tensors.pop(name).shape)
    error = refusal(write_single(model_dir, tensors))
    assert_says(error, "model.safetensors", name, "nothing", f"shape {shape}")


def test_a_tensor_of_the_wrong_shape_is_refused(model_dir: pathlib.Path, rng: random.Random) -> None:
    tensors = tensors_for(model_dir)
    name = rng.choice(sorted(tensors))
    shape = list(tensors[name].shape)
    tensors[name] = torch.randn(shape[0] + 1, *shape[1:])
    error = refusal(write_single(model_dir, tensors))
    assert_says(error, "model.safetensors", name, f"{list(tensors[name].shape)}", f"{shape}, from config.json")


def test_an_unknown_tensor_is_refused(model_dir: pathlib.Path) -> None:
    name = "model.layers.0.self_attn.o_proj.bias"
    tensors = tensors_for(model_dir) | {name: torch.randn(3)}
    error = refusal(write_single(model_dir, tensors))
    assert_says(error, "model.safetensors", name, "a tensor that the model does not have", "Glm4MoeForCausalLM")


def test_a_head_beside_the_embedding_that_it_is_tied_to_is_not_read(model_dir: pathlib.Path) -> None:
    """Some tools write it nevertheless; `transformers` ties it whatever it holds."""
    config = model_dir / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"tie_word_embeddings": True}))
    tensors = tensors_for(model_dir)
    embedding = tensors["model.embed_tokens.weight"]
    write_single(model_dir, tensors | {"lm_head.weight": torch.zeros_like(embedding)})
    weights = load_attention_weights(Checkpoint.open(model_dir), torch.float64, torch.device("cpu"))
    assert isinstance(weights.lm_head, torch.Tensor)
    assert torch.equal(weights.lm_head, embedding.double())
    write_single(model_dir, tensors | {"lm_head.weight": torch.zeros(3, 3)})
    assert_says(refusal(model_dir), "model.safetensors", "lm_head.weight", "shape [3, 3]", "from config.json")


@pytest.mark.parametrize(("dtype", "code"), [(torch.int8, "I8"), (torch.float64, "F64"), (torch.float8_e4m3fn, "F8")])
def test_an_unsupported_dtype_is_refused(model_dir: pathlib.Path, dtype: torch.dtype, code: str) -> None:
    tensors = tensors_for(model_dir)
    tensors["model.norm.weight"] = tensors["model.norm.weight"].to(dtype)
    error = refusal(write_single(model_dir, tensors))
    assert_says(error, "model.safetensors", "model.norm.weight", code, "F32, BF16 or F16")


def test_half_an_mtp_layer_is_refused(model_dir: pathlib.Path, rng: random.Random) -> None:
    tensors = tensors_for(model_dir, mtp=True)
    name = rng.choice(sorted(mtp_tensors(read_config(model_dir))))
    del tensors[name]
    assert_says(refusal(write_single(model_dir, tensors)), "model.safetensors", name, "nothing", "a tensor of shape")


def test_only_the_optional_part_of_an_mtp_layer_is_refused(model_dir: pathlib.Path) -> None:
    optional = {name: torch.randn(shape) for name, shape in optional_mtp_tensors(read_config(model_dir)).items()}
    error = refusal(write_single(model_dir, tensors_for(model_dir) | optional))
    assert "the MTP layers must be there with all their tensors, or with none" in str(error)


def test_an_index_entry_without_its_tensor_is_refused(model_dir: pathlib.Path) -> None:
    tensors = tensors_for(model_dir)
    weight_map = write_sharded(model_dir, tensors)
    name, file = next(iter(weight_map.items()))
    others = {other: tensors[other] for other in weight_map if weight_map[other] == file and other != name}
    save_file(others, model_dir / file)
    assert_says(refusal(model_dir), "model.safetensors.index.json", name, f"no such tensor in {file}", file)


def test_an_index_entry_that_names_the_wrong_file_is_refused(model_dir: pathlib.Path) -> None:
    weight_map = write_sharded(model_dir, tensors_for(model_dir), num_files=2)
    name, right = next(iter(weight_map.items()))
    wrong = next(file for file in weight_map.values() if file != right)
    write_index(model_dir, {"weight_map": weight_map | {name: wrong}})
    assert_says(refusal(model_dir), "model.safetensors.index.json", name, right, wrong)


def test_a_tensor_that_the_index_omits_is_refused(model_dir: pathlib.Path, rng: random.Random) -> None:
    weight_map = write_sharded(model_dir, tensors_for(model_dir))
    name = rng.choice(sorted(weight_map))
    file = weight_map.pop(name)
    write_index(model_dir, {"weight_map": weight_map})
    assert_says(refusal(model_dir), "model.safetensors.index.json", name, file, "an entry for it")


def test_a_tensor_that_lies_in_two_files_is_refused(model_dir: pathlib.Path) -> None:
    tensors = tensors_for(model_dir)
    weight_map = write_sharded(model_dir, tensors, num_files=2)
    name, other = next(iter(weight_map)), list(weight_map.values())[1]
    save_file({key: tensors[key] for key in tensors if weight_map[key] == other or key == name}, model_dir / other)
    assert_says(refusal(model_dir), "model.safetensors.index.json", name, other, weight_map[name])


def test_a_missing_file_of_the_index_is_refused(model_dir: pathlib.Path) -> None:
    file = write_sharded(model_dir, tensors_for(model_dir))["lm_head.weight"]
    (model_dir / file).unlink()
    assert_says(refusal(model_dir), file, "", "No such file", "a readable safetensors file")


@pytest.mark.parametrize(
    "file", ["../x.safetensors", "/etc/x.safetensors", "a/x.safetensors", "..", "", "x.bin", "x\0.safetensors", 7, None]
)
def test_an_index_may_only_name_files_beside_it(model_dir: pathlib.Path, file: object) -> None:
    write_index(model_dir, {"weight_map": {"lm_head.weight": file}})
    assert_says(refusal(model_dir), "model.safetensors.index.json", "lm_head.weight", repr(file), "the plain name")


@pytest.mark.parametrize("index", [[], {}, {"weight_map": {}}, {"weight_map": ["a"]}, {"weight_map": None}])
def test_an_index_that_is_no_index_is_refused(model_dir: pathlib.Path, index: object) -> None:
    write_index(model_dir, index)
    assert refusal(model_dir).file == "model.safetensors.index.json"


def test_an_index_that_is_no_json_is_refused(model_dir: pathlib.Path) -> None:
    (model_dir / "model.safetensors.index.json").write_text("{")
    assert_says(refusal(model_dir), "model.safetensors.index.json", "", "invalid JSON", "a JSON object")


def test_a_truncated_file_is_refused_with_both_sizes(model_dir: pathlib.Path, rng: random.Random) -> None:
    file = write_single(model_dir, tensors_for(model_dir)) / "model.safetensors"
    content = file.read_bytes()
    header_end = 8 + int.from_bytes(content[:8], "little")
    cut = rng.randrange(header_end, len(content))
    file.write_bytes(content[:cut])
    assert_says(refusal(model_dir), "model.safetensors", "", f"{cut} bytes", f"{len(content)} bytes")


def test_a_file_that_ends_within_its_header_is_refused_with_both_sizes(model_dir: pathlib.Path) -> None:
    file = write_single(model_dir, tensors_for(model_dir)) / "model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[:50])
    header_end = 8 + int.from_bytes(content[:8], "little")
    assert_says(refusal(model_dir), "model.safetensors", "", "50 bytes", f"{header_end} bytes")


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"1234",
        b"\xff" * 20,
        b"\x02\0\0\0\0\0\0\0[]",
        b"\x04\0\0\0\0\0\0\0null",
        b'\x08\0\0\0\0\0\0\0{"a": 1}',
        b"\x08\0\0\0\0\0\0\0\xff\xff\xff\xff\xff\xff\xff\xff",
        b"PK\x03\x04 this is a zip file of pickles, not a safetensors file",
    ],
)
def test_a_file_of_something_else_is_refused(model_dir: pathlib.Path, content: bytes) -> None:
    (model_dir / "model.safetensors").write_bytes(content)
    assert_says(refusal(model_dir), "model.safetensors", "", "", "")


def test_a_directory_in_place_of_a_file_is_refused(model_dir: pathlib.Path) -> None:
    (model_dir / "model.safetensors").mkdir()
    assert_says(refusal(model_dir), "model.safetensors", "", "", "a readable safetensors file")


# What is read


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_is_read_is_what_was_written(
    model_dir: pathlib.Path, rng: random.Random, stored: torch.dtype, dtype: torch.dtype
) -> None:
    written = tensors_for(model_dir, stored, mtp=True)
    write_sharded(model_dir, written)
    names = rng.sample(sorted(written), len(written) // 2)
    read = Checkpoint.open(model_dir).read(names, dtype)
    assert list(read) == names
    for name, tensor in read.items():
        expected = written[name].to(torch.float32 if is_gate_tensor(name) else dtype)
        torch.testing.assert_close(tensor, expected, rtol=0, atol=0)


def test_tensors_larger_than_a_mapping_are_read_in_pieces(
    model_dir: pathlib.Path, rng: random.Random, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = tensors_for(model_dir)
    write_sharded(model_dir, written)
    monkeypatch.setattr(model.checkpoint, "_MAX_MAPPED_BYTES", rng.randint(1, 2000))
    progress = LoadProgress(0.0)
    read = Checkpoint.open(model_dir).read(written, torch.float32, progress=progress)
    torch.testing.assert_close(read, written, rtol=0, atol=0)
    snapshot = progress.snapshot(1.0)
    assert (snapshot.tensors_done, snapshot.bytes_done) == (snapshot.tensors_total, snapshot.bytes_total)


def test_a_gate_is_read_in_fp32_whatever_the_dtype(model_dir: pathlib.Path) -> None:
    written = tensors_for(write_single(model_dir, tensors_for(model_dir)))
    read = Checkpoint.open(model_dir).read(written, torch.bfloat16)
    fp32 = {name for name, tensor in read.items() if tensor.dtype == torch.float32}
    assert fp32 == set(filter(is_gate_tensor, written)) != set()


def test_a_destination_is_filled_in_place_and_decides_the_dtype(model_dir: pathlib.Path) -> None:
    written = tensors_for(model_dir)
    checkpoint = Checkpoint.open(write_single(model_dir, written))
    gate, up, other = (f"model.layers.1.mlp.experts.1.{part}_proj.weight" for part in ("gate", "up", "down"))
    width = written[gate].shape[0]
    fused = torch.zeros(2 * width, written[gate].shape[1], dtype=torch.float64)
    into = {gate: fused[:width], up: fused[width:], "model.norm.weight": torch.zeros(1)}
    read = checkpoint.read([gate, up, other], torch.bfloat16, into=into)
    torch.testing.assert_close(fused, torch.cat((written[gate], written[up])).double(), rtol=0, atol=0)
    assert read[gate] is into[gate]
    assert read[other].dtype == torch.bfloat16


def test_a_destination_may_have_any_strides(model_dir: pathlib.Path) -> None:
    written = tensors_for(model_dir)
    name = "model.embed_tokens.weight"
    transposed = torch.zeros(written[name].shape[::-1])
    Checkpoint.open(write_single(model_dir, written)).read([name], torch.float32, into={name: transposed.T})
    torch.testing.assert_close(transposed.T, written[name], rtol=0, atol=0)


def test_a_destination_of_the_wrong_shape_is_refused(model_dir: pathlib.Path) -> None:
    checkpoint = Checkpoint.open(write_single(model_dir, tensors_for(model_dir)))
    with pytest.raises(ValueError, match=r"'model\.norm\.weight': found shape \[1\], expected"):
        checkpoint.read(["model.norm.weight"], torch.float32, into={"model.norm.weight": torch.zeros(1)})


def test_a_name_that_is_not_there_is_refused(model_dir: pathlib.Path) -> None:
    checkpoint = Checkpoint.open(write_single(model_dir, tensors_for(model_dir)))
    with pytest.raises(CheckpointError, match=r"'model\.layers\.7': found nothing"):
        checkpoint.read(["model.layers.7"], torch.float32)


def test_what_was_read_survives_its_file(model_dir: pathlib.Path) -> None:
    written = tensors_for(model_dir)
    read = Checkpoint.open(write_single(model_dir, written)).read(written, torch.float32)
    (model_dir / "model.safetensors").write_bytes(b"")
    torch.testing.assert_close(read, written, rtol=0, atol=0)
    assert len({tensor.untyped_storage().data_ptr() for tensor in read.values()}) == len(read)


@pytest.mark.parametrize("fault", ["removed", "truncated", "replaced"])
def test_a_file_that_changed_since_it_was_opened_is_refused(model_dir: pathlib.Path, fault: str) -> None:
    written = tensors_for(model_dir)
    checkpoint = Checkpoint.open(write_single(model_dir, written))
    file = model_dir / "model.safetensors"
    if fault == "removed":
        file.unlink()
    elif fault == "truncated":
        file.write_bytes(file.read_bytes()[:-1])
    else:
        save_file({name: torch.zeros(2, *tensor.shape) for name, tensor in written.items()}, file)
    with pytest.raises(CheckpointError, match=r"^model\.safetensors"):
        checkpoint.read(written, torch.float32)


RESIDENT = """
import gc, pathlib, re, sys, torch
from model.checkpoint import Checkpoint

def kib(field):
    return int(re.search(field + r":\\s+(\\d+)", pathlib.Path("/proc/self/status").read_text())[1])

checkpoint = Checkpoint.open(pathlib.Path(sys.argv[1]))
torch.zeros(8, dtype=torch.bfloat16).float()
names = list(checkpoint.tensors)
checkpoint.read(names[:1], torch.bfloat16)
gc.collect()
pathlib.Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
before = kib("VmRSS")
into = None
if sys.argv[2] == "into":
    into = {name: torch.empty(checkpoint.tensors[name].shape, dtype=torch.bfloat16) for name in names}
read = checkpoint.read(names, torch.bfloat16, into=into)
weights = sum(tensor.nbytes for tensor in read.values()) / 1024
print((kib("VmRSS") - before) / weights, (kib("VmHWM") - before) / weights, weights)
"""


@pytest.mark.skipif(not pathlib.Path("/proc/self/clear_refs").exists(), reason="reads /proc")
@pytest.mark.parametrize("destination", ["into", "none"])
def test_loading_takes_the_memory_of_the_weights_and_little_more(tmp_path: pathlib.Path, destination: str) -> None:
    fields = {
        "architectures": ["Glm4MoeForCausalLM"],
        "vocab_size": 20_000,
        "hidden_size": 512,
        "intermediate_size": 2048,
        "moe_intermediate_size": 512,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "n_routed_experts": 16,
        "num_experts_per_tok": 2,
    }
    (tmp_path / "config.json").write_text(json.dumps(fields))
    shapes = required_tensors(read_config(tmp_path))
    write_single(tmp_path, {name: torch.full(shape, 0.5).bfloat16() for name, shape in shapes.items()})
    command = [sys.executable, "-c", RESIDENT, str(tmp_path), destination]
    root = pathlib.Path(__file__).parents[3]
    output = subprocess.run(command, check=True, capture_output=True, text=True, timeout=120, cwd=root).stdout
    resident, peak, weights_kib = map(float, output.split())
    assert weights_kib > 90_000
    assert 0.9 < resident <= 1.15
    limit_kib = model.checkpoint._MAX_MAPPED_BYTES / 1024
    assert peak <= 1.15 + limit_kib / weights_kib


# Progress


def test_progress_is_counted_in_stored_bytes(model_dir: pathlib.Path) -> None:
    written = tensors_for(model_dir, torch.bfloat16)
    checkpoint = Checkpoint.open(write_single(model_dir, written))
    progress = LoadProgress(started_s=100.0)
    names = list(written)
    checkpoint.read(names[:3], torch.float32, progress=progress)
    progress.expect(1, 10**6)
    total = sum(written[name].nbytes for name in names[:3])
    snapshot = progress.snapshot(104.0)
    assert (snapshot.tensors_done, snapshot.tensors_total) == (3, 4)
    assert (snapshot.bytes_done, snapshot.bytes_total) == (total, total + 10**6)
    assert (snapshot.elapsed_s, snapshot.rate_bytes_s) == (4.0, total / 4)
    assert snapshot.eta_s == pytest.approx(10**6 / (total / 4))


def test_progress_knows_no_rate_before_the_first_byte() -> None:
    progress = LoadProgress(started_s=5.0)
    progress.expect(1, 100)
    for now_s in (4.0, 5.0, 6.0):
        assert (progress.snapshot(now_s).rate_bytes_s, progress.snapshot(now_s).eta_s) == (0.0, None)


def test_progress_adds_up_over_threads(model_dir: pathlib.Path) -> None:
    written = tensors_for(model_dir)
    checkpoint = Checkpoint.open(write_single(model_dir, written))
    progress = LoadProgress(0.0)
    results: list[Any] = []

    def read() -> None:
        results.append(checkpoint.read(written, torch.float32, progress=progress))

    threads = [threading.Thread(target=read) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for result in results:
        torch.testing.assert_close(result, written, rtol=0, atol=0)
    assert progress.snapshot(1.0).tensors_done == 4 * len(written)
    assert progress.snapshot(1.0).eta_s == 0.0
