"""Reports about the embedded model, in every form."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import pathlib
import random
import re

import numpy as np
import pytest
from rich.console import Console
from typer.testing import CliRunner

from cluster.planning import EMBEDDED_MODEL
from octet.errors import CheckpointError, ConfigError
from ops.experts_cli import experts
from ops.local import LocalEngine, make_request
from ops.specialise.command import report as run
from ops.specialise.corpus import Document
from ops.specialise.measure import count_experts
from ops.specialise.observe import Observer
from ops.specialise.page import render_page
from ops.specialise.palette import blended, colours
from ops.specialise.picture import draw_report
from ops.specialise.report import Report, make_report, visible
from ops.specialise.text import print_report

WORDS = ("river", "stone", "the", "of", "walks", "quietly", "</script>", "$x$", "naïve", "\n", "\t", "   ")


def random_text(words: tuple[str, ...] = WORDS, length: int = 60) -> str:
    return " ".join(random.choices(words, k=length))


@pytest.fixture(scope="module")
def observer() -> Observer:
    return Observer(EMBEDDED_MODEL)


@pytest.fixture(scope="module")
def made(observer: Observer) -> Report:
    documents = [Document(label=label, text=random_text()) for label in ("left", "right") for _ in range(3)]
    documents += [Document(label="numbers", text=random_text(tuple("0123456789"))) for _ in range(3)]
    return make_report("embedded", observer, documents, "Tell me </script> 42!", np.random.default_rng())


def test_what_is_observed_is_what_the_serving_path_computes(observer: Observer) -> None:
    text = random_text(length=300)
    token_ids = observer.tokenizer.encode(text)
    routing = observer.observe(text)
    assert routing.token_ids == tuple(token_ids)
    with contextlib.closing(LocalEngine(EMBEDDED_MODEL)) as engine:
        engine.generate([make_request(token_ids, max_new_tokens=1)])
        served = engine.shards[0].counts()
    counts_LE = count_experts(routing.experts_LTK, observer.config.n_routed_experts)
    # Of the last layer, serving computes what the next token depends on.
    counts_LE[-1] = count_experts(routing.experts_LTK[-1:, -1:], observer.config.n_routed_experts)[0]
    assert {layer: served[layer].tolist() for layer in observer.config.moe_layers} == dict(
        zip(observer.config.moe_layers, counts_LE.tolist(), strict=True)
    )


def test_a_text_longer_than_the_context_is_read_in_pieces(observer: Observer) -> None:
    text = random_text(length=3000)
    routing = observer.observe(text)
    assert len(routing.token_ids) > 2048
    assert routing.experts_LTK.shape == (3, len(routing.token_ids), 8)


def test_a_text_is_read_alike_whatever_was_read_before(observer: Observer) -> None:
    text = random_text()
    first = observer.observe(text)
    observer.observe(random_text())
    np.testing.assert_array_equal(observer.observe(text).experts_LTK, first.experts_LTK)


def test_a_checkpoint_without_a_tokenizer_is_refused(tmp_path: pathlib.Path) -> None:
    for file in ("config.json", "model.safetensors"):
        (tmp_path / file).symlink_to(EMBEDDED_MODEL / file)
    with pytest.raises(CheckpointError, match=r"tokenizer\.json"):
        Observer(tmp_path)


def test_every_token_has_gone_to_eight_experts_in_every_layer(made: Report) -> None:
    assert made.chosen_LE.sum(1).tolist() == [8 * made.specialised.tokens_B.sum()] * 3


def test_digits_have_specialists_that_words_do_not_have(made: Report) -> None:
    specialised = made.specialised
    numbers = made.labels.index("numbers")
    assert specialised.information_L.sum() > specialised.chance_L.sum()
    for layer in range(3):
        # Of the words, too few are read for the order of all specialists to be more than chance.
        assert max(expert.lift for expert in made.specialists(layer) if expert.label == numbers) > 1.2


@pytest.mark.parametrize("width", [80, 140])
def test_the_text_fits_its_terminal(made: Report, width: int) -> None:
    out = io.StringIO()
    print_report(made, Console(file=out, width=width, color_system=None))
    lines = out.getvalue().splitlines()
    assert max(map(len, lines)) <= width
    assert any("responds to" in line for line in lines)
    assert sum(line.split()[:1] == [str(layer)] for layer in made.layers for line in lines) >= 3


def test_labels_are_shown_as_they_are(made: Report) -> None:
    labels = ("[bold]left[/x]", ":smile:", "[/red]")
    odd = dataclasses.replace(made, specialised=dataclasses.replace(made.specialised, labels=labels))
    out = io.StringIO()
    print_report(odd, Console(file=out, width=200, color_system=None))
    summary = out.getvalue().splitlines()[1]
    assert all(f"{label} " in summary for label in labels)


def test_a_files_name_is_shown_as_it_is(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "[" / "x] :smile: [y].txt"
    out.parent.mkdir()
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text("\n".join(json.dumps({"label": label, "text": random_text()}) for label in "ab"))
    run(EMBEDDED_MODEL, corpus, "Hello", out, seed=1)
    assert f"the report is in {out}".replace(" ", "") in "".join(capsys.readouterr().err.split())


def test_a_seed_that_is_none_is_a_usage_error() -> None:
    result = CliRunner().invoke(experts, ["report", "--seed", "-1"])
    assert result.exit_code == 2
    assert "--seed" in result.output


def test_the_page_carries_its_numbers_and_nothing_else(made: Report) -> None:
    page = render_page(made)
    data = re.search(r'<script id="report" type="application/json">(.*?)</script>', page, re.DOTALL)
    assert data is not None
    tree = json.loads(data[1])
    assert tree["model"] == "embedded"
    assert [label["name"] for label in tree["labels"]] == ["left", "numbers", "right"]
    assert np.array(tree["lift"]).shape == (3, 3, 32)
    assert "".join(token["written"] for token in tree["prompt"]["tokens"]) == "Tell me </script> 42!"
    assert np.array(tree["prompt"]["experts"]).shape == (3, len(tree["prompt"]["tokens"]), 8)
    assert not re.search(r"(src|href)\s*=|https?://|@import|url\(", page.replace(data[1], ""))


def test_the_picture_is_a_png(made: Report, tmp_path: pathlib.Path) -> None:
    draw_report(tmp_path / "report.png", made)
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "report.png").stat().st_size > 20_000


@pytest.mark.parametrize("suffix", [".html", ".png", ".txt"])
def test_the_command_writes_what_the_name_asks_for(tmp_path: pathlib.Path, suffix: str) -> None:
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text("\n".join(json.dumps({"label": label, "text": random_text()}) for label in "aabb"))
    out = tmp_path / f"report{suffix}"
    run(EMBEDDED_MODEL, corpus, "Hello", out, seed=1)
    beginning = {".html": b"<!doctype html>", ".png": b"\x89PNG", ".txt": b"What the experts of embedded"}
    assert out.read_bytes().startswith(beginning[suffix])


@pytest.mark.parametrize(
    ("out", "prompt", "message"),
    [
        ("report.pdf", None, r"--out.*\.html, \.png, \.txt"),
        ("nowhere/report.html", None, r"--out.*a directory that is there"),
        ("report.html", "  ", r"--prompt.*some text"),
    ],
)
def test_what_cannot_be_made_is_refused_at_once(
    tmp_path: pathlib.Path, out: str, prompt: str | None, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        run(EMBEDDED_MODEL, None, prompt, tmp_path / out, seed=0)


def test_a_picture_without_matplotlib_is_refused_with_the_way_to_get_it(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'octet\[bench\]'"):
        run(EMBEDDED_MODEL, None, None, tmp_path / "report.png", seed=0)


def test_whitespace_can_be_seen() -> None:
    assert [visible(text) for text in (" the", "\n\n", "\t", "")] == ["·the", "↵↵", "⇥", "∅"]


@pytest.mark.parametrize("num_labels", [2, 8, 30])
def test_every_label_has_a_colour_of_its_own(num_labels: int) -> None:
    assert len(set(colours(num_labels))) == num_labels
    assert all(re.fullmatch(r"#[0-9a-f]{6}", colour) for colour in colours(num_labels))


def test_a_colour_fades_into_its_background() -> None:
    assert blended("#2060a0", 0.0, "#ffffff") == blended("#2060a0", -3.0, "#ffffff") == "#ffffff"
    assert blended("#2060a0", 1.0, "#ffffff") == blended("#2060a0", 9.0, "#ffffff") == "#2060a0"
    assert blended("#000000", 0.5, "#ffffff") == "#808080"
