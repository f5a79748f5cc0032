"""Our engine against `transformers`: logits at every position, and greedy continuations of concurrent requests.

`make_reference` and the reasons for redrawing inputs are in `conftest.py`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import pathlib
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch

from model.batch import Span
from ops.local import LocalEngine, make_request
from tests.numerics.conftest import MakeReference
from tests.reference import Case, Reference

LENGTHS = (1, 2, 63, 64, 65, 300)
NUM_NEW_TOKENS = 64
TOLERANCE = 1e-4
EOS = (3, *range(17, 500, 40))
YARN = {"factor": 6.25, "original_max_position_embeddings": 48}


def as_flat_rope(model_dir: pathlib.Path) -> None:
    """Older checkpoints have `rope_theta`, `rope_scaling` and `partial_rotary_factor` instead of `rope_parameters`."""
    file = model_dir / "config.json"
    config = json.loads(file.read_text())
    rope = config.pop("rope_parameters")
    config["rope_theta"] = rope.pop("rope_theta")
    config["partial_rotary_factor"] = rope.pop("partial_rotary_factor")
    config["rope_scaling"] = rope
    file.write_text(json.dumps(config))


def rope(rope_type: str, partial_rotary_factor: float = 0.5, **more: float) -> dict[str, Any]:
    return {"rope_type": rope_type, "rope_theta": 10000.0, "partial_rotary_factor": partial_rotary_factor, **more}


VARIANTS: dict[str, dict[str, Any]] = {
    "baseline": {},
    "groups": {"n_group": 4, "topk_group": 2},
    "no_qk_norm": {"use_qk_norm": False},
    "no_attention_bias": {"attention_bias": False},
    "tied_embeddings": {"tie_word_embeddings": True},
    "no_dense_layer": {"first_k_dense_replace": 0},
    "three_dense_layers": {"first_k_dense_replace": 3},
    "wide_heads": {"head_dim": 24},
    "unnormalised_weights": {"norm_topk_prob": False},
    "two_shared_experts": {"n_shared_experts": 2},
    "full_rotary": {"rope_parameters": rope("default", partial_rotary_factor=1.0)},
    "160_experts": {"n_routed_experts": 160, "num_experts_per_tok": 8},
    "yarn": {"rope_parameters": rope("yarn", **YARN)},
    "yarn_flat": {"rope_parameters": rope("yarn", **YARN), "rewrite": as_flat_rope},
    "flat_rope": {"rope_parameters": rope("default", partial_rotary_factor=0.25), "rewrite": as_flat_rope},
    "several_eos": {"eos_token_id": list(EOS)},
    "bf16_weights": {"dtype": torch.bfloat16},
    "fp16_weights": {"dtype": torch.float16},
    "several_files": {"max_shard_size": "200KB"},
}


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """One variant: our engine, the reference, and fresh prompts of every length."""

    engine: LocalEngine
    reference: Reference
    cases: Sequence[Case]


@pytest.fixture(scope="module", params=VARIANTS)
def subject(request: pytest.FixtureRequest, make_reference: MakeReference) -> Iterator[Subject]:
    reference = make_reference(request.param, **VARIANTS[request.param])
    eos = VARIANTS[request.param].get("eos_token_id", ())
    engine = LocalEngine(reference.model_dir, num_pages=128)
    yield Subject(engine=engine, reference=reference, cases=reference.cases(LENGTHS, NUM_NEW_TOKENS, eos))
    engine.close()


def test_logits_of_a_whole_prompt_agree_at_every_position(subject: Subject) -> None:
    for case in subject.cases:
        (logits_TV,) = logits_of(subject.engine, [case.prompt], lambda left: left)
        assert relative_error(logits_TV, case.logits_TV) < TOLERANCE, f"a prompt of {len(case.prompt)}"


def test_logits_of_prompts_in_mixed_chunks_agree_at_every_position(subject: Subject) -> None:
    all_logits = logits_of(subject.engine, [case.prompt for case in subject.cases], random_chunk)
    for case, logits_TV in zip(subject.cases, all_logits, strict=True):
        assert relative_error(logits_TV, case.logits_TV) < TOLERANCE, f"a prompt of {len(case.prompt)}"


def test_concurrent_greedy_requests_continue_as_in_transformers(subject: Subject) -> None:
    stop_token_ids = subject.engine.config.eos_token_ids
    requests = [
        make_request(case.prompt, max_new_tokens=NUM_NEW_TOKENS, stop_token_ids=stop_token_ids)
        for case in subject.cases
    ]
    answers = subject.engine.generate(requests)
    assert answers == [[case.continuation] for case in subject.cases]


def test_any_of_several_eos_tokens_ends_a_continuation_as_in_transformers(make_reference: MakeReference) -> None:
    reference = make_reference("several_eos", **VARIANTS["several_eos"])
    cases = reference.cases([4] * 16, NUM_NEW_TOKENS, EOS)
    with contextlib.closing(LocalEngine(reference.model_dir, num_pages=128)) as engine:
        stop_token_ids = engine.config.eos_token_ids
        requests = [
            make_request(case.prompt, max_new_tokens=NUM_NEW_TOKENS, stop_token_ids=stop_token_ids) for case in cases
        ]
        answers = engine.generate(requests)
    assert answers == [[case.continuation] for case in cases]
    assert len({answer[-1] for (answer,) in answers if len(answer) < NUM_NEW_TOKENS}) > 1, "nothing was shown"


def test_the_variant_of_several_files_has_several(make_reference: MakeReference) -> None:
    model_dir = make_reference("several_files", **VARIANTS["several_files"]).model_dir
    assert len(list(model_dir.glob("*.safetensors"))) > 2


def logits_of(engine: LocalEngine, prompts: Sequence[Sequence[int]], chunk: Callable[[int], int]) -> list[torch.Tensor]:
    """Logits `[T, V]` of each prompt, computed together; `chunk` says how many of the tokens left come next."""
    runner = engine.runner
    tables = [runner.pool.allocate(runner.pool.pages_for(len(prompt))) or [] for prompt in prompts]
    done = [0] * len(prompts)
    logits: list[list[torch.Tensor]] = [[] for _ in prompts]
    while unfinished := [index for index, prompt in enumerate(prompts) if done[index] < len(prompt)]:
        sizes = [chunk(len(prompts[index]) - done[index]) for index in unfinished]
        spans = [
            Span(
                token_ids=prompts[index][done[index] : done[index] + size],
                start=done[index],
                pages=tables[index],
                # As in a prompt, or as in an answer.
                by_token=size == 1 and random.random() < 0.5,
            )
            for index, size in zip(unfinished, sizes, strict=True)
        ]
        for index, span, hidden_TH in zip(unfinished, spans, runner.run(spans), strict=True):
            logits[index].append(runner.logits(hidden_TH))
            done[index] = span.stop
    runner.pool.release(list(itertools.chain.from_iterable(tables)))
    return [torch.cat(parts) for parts in logits]


def random_chunk(left: int) -> int:
    """Often a single token, which may take the other way through attention."""
    return min(left, random.choice((1, 2, 5, 16, 17, 50, 100)))


def relative_error(actual_TV: torch.Tensor, expected_TV: torch.Tensor) -> float:
    return ((actual_TV - expected_TV).abs().max() / expected_TV.abs().max()).item()
