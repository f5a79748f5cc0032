"""Prompts that are many blocks of keys, many chunks and many parts of a hand-off long."""

from __future__ import annotations

import contextlib
import random
import time

import pytest

from octet.config import PrefillConfig
from ops.bench.checkpoints import write_checkpoint
from ops.bench.longcontext import SMALL, measure
from ops.local import DECODE, PREFILL, LocalEngine, make_request
from tests.numerics.conftest import MakeReference
from tests.reference import MAX_DRAWS, Reference, argmax_margin, random_prompt

CONTEXT, PAGE_SIZE = 32768, 16
CLEAR = 1e-2
"""Of the two largest logits: a tie between experts somewhere in a long prompt changes the last logits by less."""


@pytest.fixture(scope="module")
def reference(make_reference: MakeReference) -> Reference:
    return make_reference(
        "long", num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=CONTEXT
    )


def clear_case(reference: Reference, length: int, num_tokens: int) -> tuple[list[int], list[int]]:
    """A prompt, and the greedy continuation by `transformers`."""
    for _ in range(MAX_DRAWS):
        prompt = random_prompt(length)
        (continuation,) = reference.greedy([prompt], num_tokens)
        if argmax_margin(reference.judge([*prompt, *continuation[:-1]]).logits_TV[-num_tokens:]) >= CLEAR:
            return prompt, continuation
    raise AssertionError(f"{MAX_DRAWS} draws gave no clear prompt of {length} tokens")


def until_settled(engine: LocalEngine, patience_s: float = 10.0) -> list[int]:
    """The free pages of both engines when no transfer holds any: the thread that sent them may be behind the answer."""
    deadline_s = time.monotonic() + patience_s
    while engine.load()[PREFILL].leases and time.monotonic() < deadline_s:
        engine.step()
    return [engine.load()[worker].kv_pages_free for worker in (PREFILL, DECODE)]


@pytest.mark.parametrize("chunk_tokens", [333, 512, 4096])
def test_a_prompt_of_many_chunks_continues_as_in_transformers(reference: Reference, chunk_tokens: int) -> None:
    prompt, continuation = clear_case(reference, random.randint(4500, 5000), 6)
    config = PrefillConfig(chunk_tokens=chunk_tokens)
    with contextlib.closing(LocalEngine(reference.model_dir, prefill=config, ping_pong_rows=64)) as engine:
        (answer,) = engine.generate([make_request(prompt, max_new_tokens=6)])
    assert answer == [continuation]


def test_a_sequence_may_fill_the_whole_context_and_every_page(reference: Reference) -> None:
    prompt, continuation = clear_case(reference, CONTEXT - 3, 3)
    with contextlib.closing(
        LocalEngine(reference.model_dir, num_pages=CONTEXT // PAGE_SIZE, page_size=PAGE_SIZE)
    ) as engine:
        (answer,) = engine.generate([make_request(prompt, max_new_tokens=3)])
        assert answer == [continuation]
        assert until_settled(engine) == [CONTEXT // PAGE_SIZE] * 2


def test_a_longer_prompt_takes_pages_and_little_else(tmp_path_factory: pytest.TempPathFactory) -> None:
    """What a prompt takes beside its pages: ids, and up to five parts of a hand-off, of 4 MiB each; 18 to 26 MiB."""
    model_dir = tmp_path_factory.mktemp("checkpoint")
    write_checkpoint(model_dir, {**SMALL, "num_hidden_layers": 2})
    measured = measure(model_dir, (2048, 16384))
    shorter, longer = measured.points
    assert longer.peak_bytes - shorter.peak_bytes < 32 * 2**20
    assert measured.kv_bytes_per_token == pytest.approx(measured.formula_bytes_per_token, rel=0.1)
