"""`transformers` as the reference, and inputs on which rounding decides nothing.

Shapes: `T` tokens, `E` experts, `K` experts per token, `G` groups, `V` vocabulary.
"""

from __future__ import annotations

import dataclasses
import pathlib
import random
from collections.abc import Sequence
from typing import Any

import torch
from transformers import Glm4MoeForCausalLM

ROUTING_MARGIN = 5e-6
"""With random weights some decisions are ties but for rounding: two orders of summation, both right, then choose
different experts and all later logits differ. Such inputs say nothing about a defect, so they are drawn again. The
margin is a few times the change that other batches and chunks make to a gate's scores, which are of order 1: up to 2e-6
was seen, and a few inputs in ten are drawn again."""
ARGMAX_MARGIN = 1e-4
"""The same for the two largest logits, relative to the largest of all: the tolerance that logits are compared with."""
MAX_DRAWS = 60


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

    def check(self, prompt: Sequence[int], answer: Sequence[int]) -> None:
        """It is the greedy continuation, up to the first decision that is a tie but for rounding, if there is one."""
        (expected,) = self.greedy([prompt], len(answer))
        if list(answer) == expected:
            return
        at = next(i for i, (found, wanted) in enumerate(zip(answer, expected, strict=True)) if found != wanted)
        judgement = self.judge([*prompt, *expected[:at]])
        lead = argmax_margin(judgement.logits_TV[-1:])
        assert judgement.routing_margin < ROUTING_MARGIN or lead < ARGMAX_MARGIN, (
            f"token {at} is {answer[at]} instead of {expected[at]}, which leads by {lead:.2g}; "
            f"experts were chosen by {judgement.routing_margin:.2g} or more"
        )

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
            self._margins.append(gap(group_scores_TG, gate.topk_group))
            groups = group_scores_TG.topk(gate.topk_group, dim=-1).indices
            choice_TE = torch.stack([grouped_TGE[t, groups[t]].flatten() for t in range(len(groups))])
        self._margins.append(gap(choice_TE, gate.top_k))


def random_prompt(length: int, vocab_size: int = 512) -> list[int]:
    return [random.randrange(vocab_size) for _ in range(length)]


def argmax_margin(logits_TV: torch.Tensor) -> float:
    return gap(logits_TV, 1) / logits_TV.abs().max().item()


def gap(scores: torch.Tensor, k: int) -> float:
    """The smallest difference, over rows, of the k-th and the next largest score."""
    if k == scores.shape[1]:
        return torch.inf
    values = scores.topk(k + 1, dim=-1).values
    return float((values[:, k - 1] - values[:, k]).min())
