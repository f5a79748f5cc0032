"""The MTP head's drafts against an independent reference, and the same tokens with and without them.

`transformers` skips MTP layers, but has all of their parts but the joining of their two inputs: a checkpoint with an
MTP layer is one with one more decoder layer, and a few tensors beside it.

Shapes: `T` tokens, `H` hidden, `V` vocabulary.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import pathlib
from collections.abc import Sequence
from typing import Any

import pytest
import safetensors.torch
import torch
from transformers import Glm4MoeConfig, Glm4MoeForCausalLM

from decode.batch import RunningSequence
from decode.draft_length import DraftLength
from decode.speculation import MtpDrafter
from model.batch import Span
from model.runner import ModelRunner
from octet.config import DecodeConfig, PrefillConfig, SpeculationConfig
from ops.local import DECODE, PREFILL, LocalEngine, make_request
from tests.numerics.conftest import CONFIG, randomise
from tests.numerics.tasks import NUM_NEW_TOKENS, VOCAB_SIZE, Task, answers, draw_task
from tests.reference import ROUTING_MARGIN, Reference, gap, random_prompt

NUM_LAYERS = 3
TOLERANCE = 1e-4
ALWAYS_3 = SpeculationConfig(num_speculative_tokens=3, adaptive=False)


class MtpReference(Reference):
    """A random checkpoint with an MTP layer, and what that should make of tokens.

    The next token is mostly a function of the last one, plus what the layers add: so the head is often right, and often
    wrong.
    """

    def __init__(self, model_dir: pathlib.Path) -> None:
        fields = {**CONFIG, "num_hidden_layers": NUM_LAYERS + 1, "vocab_size": VOCAB_SIZE}
        glm4_moe: Any = Glm4MoeForCausalLM
        model: Any = glm4_moe(Glm4MoeConfig(**fields)).eval()
        randomise(model)
        self._heads = _make_predictable(model)
        model.save_pretrained(model_dir)
        _make_last_layer_mtp(model_dir, self._heads)
        super().__init__(model_dir)
        self._block = model.model.layers[NUM_LAYERS]
        self._gaps: list[float] = []
        self._block.mlp.gate.register_forward_hook(self._note_gap)

    @torch.inference_mode()
    def draft(self, token_ids: Sequence[int], drafted: Sequence[int]) -> tuple[torch.Tensor, float]:
        """Logits `[V]` of the draft after these, and by how much the choice of experts for it was decided."""
        model = self._model.model
        hidden_TH = model(torch.tensor([token_ids])).last_hidden_state[0, :-1]
        inputs = [self._join(token, hidden_H) for token, hidden_H in zip(token_ids[1:], hidden_TH, strict=True)]
        out_H = self._run(inputs)
        for token_id in drafted:
            inputs.append(self._join(token_id, out_H))
            out_H = self._run(inputs)
        logits_V: torch.Tensor = self._model.lm_head(out_H)
        return logits_V, self._gaps[-1]

    def _join(self, token_id: int, hidden_H: torch.Tensor) -> torch.Tensor:
        embedding_H = self._norm(self._model.model.embed_tokens.weight[token_id], "enorm")
        joined: torch.Tensor = self._heads["eh_proj"] @ torch.cat((embedding_H, self._norm(hidden_H, "hnorm")))
        return joined

    def _run(self, inputs: Sequence[torch.Tensor]) -> torch.Tensor:
        """The last position's output, from the first position on."""
        x_1TH = torch.stack(list(inputs)).unsqueeze(0)
        positions = torch.arange(len(inputs)).unsqueeze(0)
        rotary = self._model.model.rotary_emb(x_1TH, positions)
        y_1TH = self._block(x_1TH, attention_mask=None, position_ids=positions, position_embeddings=rotary)
        return self._norm(y_1TH[0, -1], "shared_head.norm")

    def _norm(self, x_H: torch.Tensor, name: str) -> torch.Tensor:
        eps: float = self._model.config.rms_norm_eps
        return self._heads[name] * x_H / (x_H.pow(2).mean() + eps).sqrt()

    def _note_gap(self, gate: Any, _: object, output: tuple[torch.Tensor, ...]) -> None:
        choice_TE = output[0].sigmoid() + gate.e_score_correction_bias
        self._gaps.append(gap(choice_TE[-1:], gate.top_k))


@torch.no_grad()
def _make_predictable(model: Any) -> dict[str, torch.Tensor]:
    """The likeliest token after v is a random other one; the head passes the embedding on, and a little of the rest."""
    hidden = CONFIG["hidden_size"]
    for name, tensor in model.named_parameters():
        if "o_proj" in name or "down_proj" in name:
            tensor.mul_(0.25)
    order = torch.randperm(VOCAB_SIZE)
    model.lm_head.weight[order.roll(1)] = model.model.embed_tokens.weight[order]
    heads = {name: 1 + 0.1 * torch.randn(hidden) for name in ("enorm", "hnorm", "shared_head.norm")}
    heads["eh_proj"] = torch.cat((0.15 * torch.eye(hidden), 0.02 * torch.randn(hidden, hidden)), dim=1)
    return heads


def _make_last_layer_mtp(model_dir: pathlib.Path, heads: dict[str, torch.Tensor]) -> None:
    config = json.loads((model_dir / "config.json").read_text())
    config |= {"num_hidden_layers": NUM_LAYERS, "num_nextn_predict_layers": 1}
    (model_dir / "config.json").write_text(json.dumps(config))
    file = model_dir / "model.safetensors"
    tensors = safetensors.torch.load_file(file)
    tensors |= {f"model.layers.{NUM_LAYERS}.{name}.weight": tensor for name, tensor in heads.items()}
    safetensors.torch.save_file(tensors, file, {"format": "pt"})


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> MtpReference:
    return MtpReference(tmp_path_factory.mktemp("checkpoint"))


@dataclasses.dataclass(frozen=True, slots=True)
class Drafted:
    """What one call of the drafter was given, and the logits that it drew each draft from."""

    token_ids: list[int]
    drafts: list[int]
    logits: list[torch.Tensor]


@pytest.fixture
def drafted(monkeypatch: pytest.MonkeyPatch) -> list[Drafted]:
    """Fills while an engine decodes a single sequence."""
    calls: list[Drafted] = []
    draft, forward = MtpDrafter.draft, ModelRunner.draft

    def noting_draft(self: MtpDrafter, sequences: Sequence[RunningSequence], lengths: Sequence[int]) -> list[list[int]]:
        (sequence,) = sequences
        calls.append(Drafted(list(sequence.token_ids), [], []))
        drafts = draft(self, sequences, lengths)
        calls[-1].drafts.extend(drafts[0])
        return drafts

    def noting_forward(self: ModelRunner, spans: Sequence[Span], hidden_BH: torch.Tensor) -> torch.Tensor:
        out_BH = forward(self, spans, hidden_BH)
        calls[-1].logits.append(self.logits(out_BH)[0])
        return out_BH

    monkeypatch.setattr(MtpDrafter, "draft", noting_draft)
    monkeypatch.setattr(ModelRunner, "draft", noting_forward)
    return calls


def check_drafts(reference: MtpReference, drafted: Sequence[Drafted]) -> None:
    compared = skipped = 0
    for call in drafted:
        for depth, logits_V in enumerate(call.logits):
            expected_V, margin = reference.draft(call.token_ids, call.drafts[:depth])
            if margin < ROUTING_MARGIN:
                skipped += 1
                continue
            torch.testing.assert_close(logits_V, expected_V, rtol=0, atol=TOLERANCE * expected_V.abs().max().item())
            compared += 1
    assert compared > 10 * skipped


ENGINES: dict[str, dict[str, Any]] = {
    "plain": {},
    "chunks_of_7": {"prefill": PrefillConfig(chunk_tokens=7)},
    "pages_of_4": {"page_size": 4},
    "two_shards": {"num_shards": 2},
    "micro_batches": {"ping_pong_rows": 2},
}


@pytest.mark.parametrize("name", ENGINES)
def test_drafts_are_those_of_the_reference(name: str, reference: MtpReference, drafted: list[Drafted]) -> None:
    for length in (1, 16, 37):
        (case,) = reference.cases([length], NUM_NEW_TOKENS)
        with contextlib.closing(LocalEngine(reference.model_dir, speculation=ALWAYS_3, **ENGINES[name])) as engine:
            engine.generate([make_request(case.prompt, max_new_tokens=NUM_NEW_TOKENS)])
    assert drafted
    check_drafts(reference, drafted)


def test_a_cached_prefix_gives_the_same_drafts(reference: MtpReference, drafted: list[Drafted]) -> None:
    """Prompts that part in the middle of a page, at its end, and one that is another's beginning."""
    (case,) = reference.cases([40], NUM_NEW_TOKENS)
    with contextlib.closing(LocalEngine(reference.model_dir, speculation=ALWAYS_3, page_size=8)) as engine:
        engine.generate([make_request(case.prompt, max_new_tokens=2)])
        drafted.clear()
        before = engine.load()[PREFILL].cached_tokens
        for prompt in (case.prompt, case.prompt[:24], case.prompt[:16] + random_prompt(9, VOCAB_SIZE)):
            if reference.judge(prompt).routing_margin > ROUTING_MARGIN:
                engine.generate([make_request(prompt, max_new_tokens=3)])
        assert engine.load()[PREFILL].cached_tokens > before
    check_drafts(reference, drafted)


def test_pauses_in_drafting_lose_nothing(
    reference: MtpReference, drafted: list[Drafted], monkeypatch: pytest.MonkeyPatch
) -> None:
    lengths = [0, 2, *[0] * 40, 3, 1, *[0] * 5, 2]
    monkeypatch.setattr(DraftLength, "choose", lambda *_: lengths.pop() if lengths else 1)
    (case,) = reference.cases([20], 100)
    speculation = SpeculationConfig(num_speculative_tokens=3)
    with contextlib.closing(LocalEngine(reference.model_dir, speculation=speculation)) as engine:
        assert engine.generate([make_request(case.prompt, max_new_tokens=100)]) == [[case.continuation]]
    check_drafts(reference, drafted)


@pytest.fixture(scope="module")
def tasks(reference: MtpReference) -> list[Task]:
    with contextlib.closing(LocalEngine(reference.model_dir)) as engine:
        greedy = [draw_task(reference, engine, length, sampled=False) for length in (1, 16, 50)]
        sampled = [draw_task(reference, engine, length, sampled=True) for length in (3, 32, 70)]
        siblings = [draw_task(reference, engine, length, sampled=True, choices=(0, 1, 2)) for length in (26, 32)]
        return [*greedy, *sampled, *siblings]


SPECULATING: dict[str, dict[str, Any]] = {
    **{f"{k}_drafts": {"speculation": SpeculationConfig(num_speculative_tokens=k, adaptive=False)} for k in (1, 2, 5)},
    "as_many_as_pay": {"speculation": SpeculationConfig(num_speculative_tokens=4)},
    **{name: {"speculation": ALWAYS_3, **arguments} for name, arguments in ENGINES.items()},
    "batches_of_3": {"speculation": ALWAYS_3, "decode": DecodeConfig(max_batch=3)},
}


@pytest.mark.parametrize("name", SPECULATING)
def test_tokens_are_the_same_with_drafts(name: str, reference: MtpReference, tasks: Sequence[Task]) -> None:
    with contextlib.closing(LocalEngine(reference.model_dir, **SPECULATING[name])) as engine:
        assert answers(engine, tasks) == [task.answer for task in tasks]
        load = engine.load()[DECODE]
        assert load.kv_pages_free == load.kv_pages_total
        assert load.accepted_tokens > 0
        assert load.accepted_tokens < load.drafted_tokens


def test_accepted_drafts_save_steps(reference: MtpReference) -> None:
    longest = 0
    with contextlib.closing(LocalEngine(reference.model_dir, speculation=ALWAYS_3)) as engine:
        for case in reference.cases([30, 7, 19, 44], 60):
            before = engine.load()[DECODE].accepted_tokens
            committed = _steps(engine, case.prompt, 60)
            num_accepted = engine.load()[DECODE].accepted_tokens - before
            assert [token_id for tokens in committed for token_id in tokens] == case.continuation
            # The first token comes from the prefill worker.
            assert len(committed) == 60 - num_accepted, f"{num_accepted} accepted, {list(map(len, committed))}"
            longest = max(longest, *map(len, committed))
    assert longest > 1, "no draft was right in four answers"


def _steps(engine: LocalEngine, prompt: Sequence[int], num_tokens: int) -> list[list[int]]:
    journal = engine.submit(make_request(prompt, max_new_tokens=num_tokens))
    steps: list[list[int]] = []
    while not journal.ended:
        if committed := engine.step():
            steps.append([event.token_id for event in committed])
    return steps


def test_evicted_sequences_are_recomputed_to_the_same_tokens(reference: MtpReference, tasks: Sequence[Task]) -> None:
    def num_evicted() -> int:
        with contextlib.closing(
            LocalEngine(reference.model_dir, page_size=4, decode_pages=40, speculation=ALWAYS_3)
        ) as engine:
            assert answers(engine, tasks) == [task.answer for task in tasks]
            load = engine.load()[DECODE]
            assert load.kv_pages_free == load.kv_pages_total
            return load.preemptions

    # Who gets pages before whom is up to threads: seldom, there are some for all.
    assert any(num_evicted() for _ in range(4)), "there were pages for all"
