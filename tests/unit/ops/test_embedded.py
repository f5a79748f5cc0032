import pathlib
from typing import Any

import pytest
import tokenizers
import torch
from transformers import Glm4MoeForCausalLM

from model.config import read_config, read_generation_defaults
from ops import embedded


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    out_dir = tmp_path_factory.mktemp("embedded") / "new"
    embedded.write(out_dir)
    return out_dir


@pytest.fixture(scope="module")
def loaded() -> tuple[Any, dict[str, Any]]:
    """The model as transformers loads it, whose types do not fit its own use, and what it reports of the loading."""
    load: Any = Glm4MoeForCausalLM.from_pretrained
    model, report = load(embedded.DEFAULT_DIR, dtype=torch.float32, output_loading_info=True)
    return model, report


def test_the_committed_files_are_what_the_script_makes(made: pathlib.Path) -> None:
    names = {file.name for file in made.iterdir()}
    assert names == {file.name for file in embedded.DEFAULT_DIR.iterdir()}
    assert [n for n in sorted(names) if (made / n).read_bytes() != (embedded.DEFAULT_DIR / n).read_bytes()] == []


def test_it_is_small_enough_to_ship() -> None:
    assert sum(file.stat().st_size for file in embedded.DEFAULT_DIR.iterdir()) < 6_000_000


def test_octet_reads_its_config() -> None:
    config = read_config(embedded.DEFAULT_DIR)
    assert (config.vocab_size, config.mtp_layers, config.moe_layers) == (1024, range(4, 5), range(1, 4))
    assert config.eos_token_ids == (1016, 1021, 1023)
    assert read_generation_defaults(embedded.DEFAULT_DIR).temperature == 0.0


def test_its_tokenizer_has_every_byte_and_the_special_tokens_last() -> None:
    tokenizer = tokenizers.Tokenizer.from_file(str(embedded.DEFAULT_DIR / "tokenizer.json"))
    assert tokenizer.get_vocab_size() == embedded.VOCAB_SIZE
    assert [tokenizer.id_to_token(token_id) for token_id in range(1016, 1024)] == list(embedded.SPECIAL_TOKENS)
    text = "".join(map(chr, range(0x500))) + "🦀漢字 The kettle on the stove."
    assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_transformers_finds_every_tensor_and_leaves_only_the_mtp_layer(loaded: tuple[Any, dict[str, Any]]) -> None:
    _, report = loaded
    assert not report["missing_keys"]
    assert not report["mismatched_keys"]
    assert {key.startswith("model.layers.4.") for key in report["unexpected_keys"]} == {True}


@pytest.mark.parametrize("prompt", ["The kettle", "1 2 3 4", "A"])
def test_greedy_output_varies_and_does_not_stop_by_chance(loaded: tuple[Any, dict[str, Any]], prompt: str) -> None:
    tokenizer = tokenizers.Tokenizer.from_file(str(embedded.DEFAULT_DIR / "tokenizer.json"))
    ids = tokenizer.encode(prompt).ids
    new_ids = loaded[0].generate(torch.tensor([ids]), max_new_tokens=40)[0, len(ids) :].tolist()
    assert len(new_ids) == 40
    assert len(set(new_ids)) > 20


def test_the_command_writes_where_it_is_told(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["embedded", str(tmp_path / "out")])
    embedded.main()
    assert (tmp_path / "out" / "model.safetensors").exists()
