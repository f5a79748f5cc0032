"""Octet's one-process engine as a peer; see `ops.bench.peers.engines` for what it reads and writes."""

from __future__ import annotations

import contextlib
import json
import pathlib
import random
import sys

from model.host_memory import keep_freed_memory
from model.threads import set_num_threads
from octet.config import DecodeConfig
from octet.request import Sampling
from ops.bench.peers.engines import claim_stdout, serve, timed
from ops.local import LocalEngine, make_request

_PAGE_SIZE, _TIMEOUT_S = 16, 600.0


def main() -> None:
    replies = claim_stdout()
    checkpoint, *numbers, settings = sys.argv[1:]
    sampling = json.loads(settings)
    threads, max_sequences, max_len = map(int, numbers)
    keep_freed_memory()
    set_num_threads(threads, own=True)
    engine = LocalEngine(
        pathlib.Path(checkpoint),
        num_pages=max_sequences * -(-max_len // _PAGE_SIZE),
        page_size=_PAGE_SIZE,
        max_model_len=max_len,
        decode=DecodeConfig(max_batch=max_sequences),
    )

    def generate(prompts: list[list[int]], new_tokens: int) -> list[int]:
        requests = [
            make_request(prompt, max_new_tokens=new_tokens, sampling=Sampling(seed=random.getrandbits(63), **sampling))
            for prompt in prompts
        ]
        return [len(choices[0]) for choices in engine.generate(requests, _TIMEOUT_S)]

    with contextlib.closing(engine):
        serve("octet in one process", timed(generate), sys.stdin, replies)


if __name__ == "__main__":
    main()
