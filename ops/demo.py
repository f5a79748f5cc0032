"""`octet demo`: the whole system on one machine, on the embedded model."""

from __future__ import annotations

import time

from rich.console import Console

from cluster.launch import launch
from octet.client import Client
from octet.config import load_config
from ops.progress import StartDisplay
from ops.render import print_status

_PROMPTS = ("The history of bread begins", "When the weather turns cold, a machine", "Eight letters make")


def demo() -> None:
    """Start one prefill worker, one decode worker and two expert shards; generate; show; stop."""
    console = Console(highlight=False)
    started_s = time.monotonic()
    with StartDisplay(Console(stderr=True)) as display:
        cluster = launch(load_config(overrides=["frontend.port=0"]), display.show)
    try:
        console.print(f"ready on {cluster.address} after {time.monotonic() - started_s:.1f} s")
        with Client(cluster.address, timeout_s=60.0) as client:
            for prompt in _PROMPTS:
                _answer(client, prompt, console)
            print_status(client.status(), console)
    finally:
        cluster.stop()


def _answer(client: Client, prompt: str, console: Console) -> None:
    console.print(f"\n[bold]{prompt}[/]", end="")
    started_s, num_tokens = time.monotonic(), 0
    for chunk in client.stream(prompt, max_new_tokens=32):
        console.print(chunk.text, end="", markup=False)
        num_tokens += len(chunk.token_ids)
    console.print(f"\n[dim]{num_tokens} tokens in {time.monotonic() - started_s:.2f} s[/]")
