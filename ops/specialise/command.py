"""`octet experts report`: a corpus through a model in this process, and what came of it in the form asked for."""

from __future__ import annotations

import importlib.util
import pathlib

import numpy as np
from rich.console import Console
from rich.progress import Progress
from rich.text import Text

from octet.errors import ConfigError
from ops.outputs import check_output
from ops.specialise.corpus import SHIPPED, read_corpus
from ops.specialise.observe import Observer
from ops.specialise.page import render_page
from ops.specialise.picture import draw_report
from ops.specialise.report import PROMPT, Report, make_report
from ops.specialise.text import print_report

_TEXT_WIDTH = 100
_SUFFIXES = (".html", ".png", ".txt")


def report(
    model_dir: pathlib.Path, corpus: pathlib.Path | None, prompt: str | None, out: pathlib.Path | None, seed: int
) -> None:
    """Run the corpus, and write the report; without a file, print it.

    Args:
        corpus: see `read_corpus`; None is the one that Octet ships.
        seed: shuffles the labels, to tell what is chance.

    Raises: ConfigError, CheckpointError.
    """
    _check(out, prompt)
    documents = read_corpus(corpus or SHIPPED)
    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("loading", total=len(documents))
        observer = Observer(model_dir)
        bar.update(task, description="reading")
        made = make_report(
            model_dir.resolve().name,
            observer,
            documents,
            prompt if prompt is not None else PROMPT,
            np.random.default_rng(seed),
            lambda done: bar.update(task, completed=done),
        )
    if out is None:
        print_report(made, Console(highlight=False))
    else:
        _write(out, made)
        Console(stderr=True, highlight=False).print(Text(f"the report is in {out}"))


def _check(out: pathlib.Path | None, prompt: str | None) -> None:
    """Better before the corpus is run than after."""
    if prompt is not None and not prompt.strip():
        raise ConfigError("--prompt", repr(prompt), "some text")
    if out is None:
        return
    if out.suffix not in _SUFFIXES:
        raise ConfigError("--out", str(out), f"a name that ends with {', '.join(_SUFFIXES)}")
    check_output("--out", out)
    if out.suffix == ".png" and importlib.util.find_spec("matplotlib") is None:
        raise ConfigError(
            "--out", "no matplotlib here", "the 'bench' extra", "install it with: pip install 'octet[bench]'"
        )


def _write(out: pathlib.Path, made: Report) -> None:
    if out.suffix == ".png":
        draw_report(out, made)
    elif out.suffix == ".html":
        out.write_text(render_page(made), encoding="utf-8")
    else:
        with out.open("w", encoding="utf-8") as file:
            print_report(made, Console(file=file, width=_TEXT_WIDTH, color_system=None, highlight=False))
