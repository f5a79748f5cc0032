"""Small random checkpoints in the format of `transformers`, and `transformers` itself as the reference.

Shapes: `T` tokens, `E` experts, `K` experts per token, `G` groups, `V` vocabulary.
"""

from __future__ import annotations

import dataclasses
import pathlib
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
import transformers
from transformers import Glm4MoeConfig, Glm4MoeForCausalLM

ROUTING_MARGIN = 5e-6
"""With random weights some decisions are ties but for rounding: two orders of summation, both right, then choose
different experts and all later logits differ. Such inputs say nothing about a defect, so they are drawn again. The
margin is a few times the change that other batches and chunks make to a gate's scores, which are of order 1: up to 2e-6
was seen, and a few inputs in ten are drawn again."""
ARGMAX_MARGIN = 1e-4
"""The same for the two largest logits, relative to the largest of all: the tolerance that logits are compared with."""
MAX_DRAWS = 60

CONFIG: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 96,
    "moe_intermediate_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "n_routed_experts": 16,
    "num_experts_per_tok": 4,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "routed_scaling_factor": 2.5,
    "use_qk_norm": True,
    "attention_bias": True,
    "max_position_embeddings": 512,
    # Large enough that layers, not the embedding, decide the next token.
    "initializer_range": 0.15,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
}


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Judgement:
    """What the reference makes of a sequence."""

    logits_TV: torch.Tensor
    routing_margin: float
    """By how much the closest choice of experts, over all tokens and layers, was decided."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A prompt all of whose decisions, up to the end of its greedy continuation, are clear."""

    prompt: list[int]
    continuation: list[int]
    logits_TV: torch.Tensor
    """At every position of the prompt."""


class Reference:
    """A checkpoint and the `transformers` model that it holds, in fp32."""

    def __init__(self, model_dir: pathlib.Path) -> None:
        self.model_dir = model_dir
        glm4_moe: Any = Glm4MoeForCausalLM
        self._model = glm4_moe.from_pretrained(model_dir, dtype=torch.float32).eval()
        self._margins: list[float] = []
        for layer in self._model.model.layers:
            if hasattr(layer.mlp, "gate"):
                layer.mlp.gate.register_forward_hook(self._note_margin)

    @torch.inference_mode()
    def judge(self, token_ids: Sequence[int]) -> Judgement:
        self._margins.clear()
        logits_TV = self._model(torch.tensor([token_ids])).logits[0]
        return Judgement(logits_TV=logits_TV, routing_margin=min(self._margins, default=torch.inf))

    @torch.inference_mode()
    def greedy(self, prompts: Sequence[Sequence[int]], num_tokens: int, eos: Sequence[int] = ()) -> list[list[int]]:
        """`transformers.generate`'s continuations, an end-of-sequence token being the last of its own."""
        length = max(map(len, prompts))
        token_ids = torch.tensor([[0] * (length - len(prompt)) + list(prompt) for prompt in prompts])
        mask = torch.tensor([[0] * (length - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        rows = self._model.generate(
            token_ids,
            attention_mask=mask,
            do_sample=False,
            max_new_tokens=num_tokens,
            eos_token_id=list(eos) or None,
            pad_token_id=0,
        )
        continuations = rows[:, length:].tolist()
        ends = [next((i + 1 for i, token in enumerate(row) if token in eos), num_tokens) for row in continuations]
        return [row[:end] for row, end in zip(continuations, ends, strict=True)]

    def cases(self, lengths: Sequence[int], num_tokens: int, eos: Sequence[int] = ()) -> list[Case]:
        """Fresh prompts of these lengths with their clear greedy continuations."""
        cases: list[Case | None] = [None] * len(lengths)
        for _ in range(MAX_DRAWS):
            missing = [index for index, case in enumerate(cases) if case is None]
            if not missing:
                break
            prompts = [random_prompt(lengths[index], self._model.config.vocab_size) for index in missing]
            continuations = self.greedy(prompts, num_tokens, eos)
            for index, prompt, continuation in zip(missing, prompts, continuations, strict=True):
                cases[index] = self._case(prompt, continuation)
        found = [case for case in cases if case is not None]
        assert len(found) == len(lengths), f"{MAX_DRAWS} draws did not give clear prompts of {lengths} tokens"
        return found

    def _case(self, prompt: list[int], continuation: list[int]) -> Case | None:
        judgement = self.judge([*prompt, *continuation[:-1]])
        answers_TV = judgement.logits_TV[len(prompt) - 1 :]
        if judgement.routing_margin < ROUTING_MARGIN or argmax_margin(answers_TV) < ARGMAX_MARGIN:
            return None
        return Case(prompt=prompt, continuation=continuation, logits_TV=judgement.logits_TV[: len(prompt)])

    def _note_margin(self, gate: Any, _: object, output: tuple[torch.Tensor, ...]) -> None:
        choice_TE = output[0].sigmoid() + gate.e_score_correction_bias
        grouped_TGE = choice_TE.view(len(choice_TE), gate.num_group, -1)
        if gate.topk_group < gate.num_group:
            group_scores_TG = grouped_TGE.topk(2, dim=-1).values.sum(-1)
            self._margins.append(_gap(group_scores_TG, gate.topk_group))
            groups = group_scores_TG.topk(gate.topk_group, dim=-1).indices
            choice_TE = torch.stack([grouped_TGE[t, groups[t]].flatten() for t in range(len(groups))])
        self._margins.append(_gap(choice_TE, gate.top_k))


def random_prompt(length: int, vocab_size: int = CONFIG["vocab_size"]) -> list[int]:
    return [random.randrange(vocab_size) for _ in range(length)]


def argmax_margin(logits_TV: torch.Tensor) -> float:
    return _gap(logits_TV, 1) / logits_TV.abs().max().item()


def _gap(scores: torch.Tensor, k: int) -> float:
    """The smallest difference, over rows, of the k-th and the next largest score."""
    if k == scores.shape[1]:
        return torch.inf
    values = scores.topk(k + 1, dim=-1).values
    return float((values[:, k - 1] - values[:, k]).min())


MakeReference = Callable[..., Reference]


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """The matrices are small: on a busy machine, waiting for a second thread takes ten times as long as the work."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def fresh_seed() -> None:
    """Inputs are drawn afresh; a failing test shows how to draw them again."""
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    random.seed(seed)
    torch.manual_seed(seed)


@pytest.fixture(scope="session")
def make_reference(tmp_path_factory: pytest.TempPathFactory) -> MakeReference:
    """Makes a random checkpoint, once for each name.

    Args of what it returns: a name; `dtype` and `max_shard_size` of the files; `rewrite`, which may edit the
    directory; and fields of `config.json` to be set.
    """
    logging: Any = transformers.utils.logging
    logging.disable_progress_bar()
    made: dict[str, Reference] = {}

    def make(
        name: str,
        *,
        dtype: torch.dtype = torch.float32,
        max_shard_size: str = "1GB",
        rewrite: Callable[[pathlib.Path], None] | None = None,
        **fields: Any,
    ) -> Reference:
        if name not in made:
            model_dir = tmp_path_factory.mktemp("checkpoint")
            model: Any = Glm4MoeForCausalLM(Glm4MoeConfig(**{**CONFIG, **fields}))
            _randomise(model)
            model.to(dtype).save_pretrained(model_dir, max_shard_size=max_shard_size)
            if rewrite is not None:
                rewrite(model_dir)
            made[name] = Reference(model_dir)
        return made[name]

    return make


@torch.no_grad()
def _randomise(model: Any) -> None:
    """What `transformers` starts at one or at zero, so that leaving it out changes the logits."""
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if name.endswith("norm.weight"):
            tensor.normal_(1, 0.1)
        elif name.endswith("bias"):
            tensor.normal_(0, 0.05)
