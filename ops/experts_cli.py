"""The commands `octet experts …`: what experts do, in a file and as a report."""

from __future__ import annotations

import pathlib
from typing import Annotated

import typer
from rich.console import Console

from ops.connection import DEFAULT_ADDRESS, Address, connect

experts = typer.Typer(no_args_is_help=True, help="Record what experts do, and report what they respond to.")


@experts.command()
def record(
    file: Annotated[pathlib.Path, typer.Argument(help="FILE.jsonl or FILE.npz; see docs/telemetry.md.")],
    grpc: Address = DEFAULT_ADDRESS,
    seconds: Annotated[float, typer.Option(min=0.1, help="How long; Ctrl-C ends it earlier.")] = 60.0,
    step: Annotated[float, typer.Option(min=0.1, help="Seconds in one window.")] = 5.0,
) -> None:
    """Write a running cluster's telemetry to a file that `octet simulate` reads."""
    from ops.record import record as run

    with connect(grpc, timeout_s=30.0) as client:
        run(client, file, seconds, step, Console(stderr=True, highlight=False))


@experts.command()
def report(
    model_dir: Annotated[pathlib.Path | None, typer.Argument(help="Hugging Face directory; default: embedded.")] = None,
    corpus: Annotated[
        pathlib.Path | None,
        typer.Option(help="A directory of LABEL.txt files, or a .jsonl file; default: Octet's own."),
    ] = None,
    out: Annotated[
        pathlib.Path | None, typer.Option(help="FILE.html, FILE.png or FILE.txt; default: print it.")
    ] = None,
    prompt: Annotated[str | None, typer.Option(help="Text to be shown token by token.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Shuffles labels, to tell what is chance.")] = 0,
) -> None:
    """Run a labelled corpus through a model in this process, and show which experts fire on what."""
    from cluster.planning import EMBEDDED_MODEL
    from ops.specialise.command import report as run

    run(model_dir or EMBEDDED_MODEL, corpus, prompt, out, seed)
