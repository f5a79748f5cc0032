"""Which experts a token goes to, and with what weight.

Shapes: `T` tokens, `H` hidden, `E` experts, `K` experts per token, `G` groups.
"""

from __future__ import annotations

import functools
import importlib
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from model.config import ModelConfig
from model.linear import PackedMatrix, linear
from model.threads import in_parts
from model.weights import GateWeights

FEW_TOKENS = 64
"""Up to so many, what a layer does about its rows is one compiled call for all of them; with more, threads share it."""

CompiledGate = tuple[Any, ...]
"""What `router.gate_cpu.select` takes between the rows and the scores."""


class Gate:
    """The auxiliary-loss-free sigmoid gate of DeepSeek-V3 as Glm4Moe has it, in fp32.

    The correction bias chooses experts but does not weigh them. With groups, only experts of the `topk_group` groups
    with the largest sums of their two best scores are eligible.
    """

    def __init__(self, weights: GateWeights, config: ModelConfig) -> None:
        """Made ready here, so that no request waits for a compiler."""
        self._weights, self._config = weights, config
        self.top_k = config.num_experts_per_tok
        self.compiled: CompiledGate | None = None
        """For `FEW_TOKENS`, on a CPU with packed weights."""
        if weights.correction_bias.device.type == "cpu":
            gate_cpu()
            self._choice = (
                weights.correction_bias.numpy(),
                config.n_group,
                config.topk_group,
                config.norm_topk_prob,
                np.float32(config.routed_scaling_factor),
            )
            if isinstance(weights.weight, PackedMatrix):
                self.compiled = (weights.weight.panels.numpy(), *self._choice)

    def select(self, x_TH: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Expert ids `[T, K]` (int64) and weights `[T, K]` (fp32)."""
        weight, bias = self._weights.weight, self._weights.correction_bias
        if bias.device.type != "cpu":
            return _choose(linear(x_TH.float(), weight), bias, self._config)
        # In one compiled pass: a dozen small operators cost more than the choice itself.
        shape = len(x_TH), self.top_k
        ids_TK, weights_TK = np.empty(shape, np.int64), np.empty(shape, np.float32)
        if self.compiled is None:
            scores_TE = linear(x_TH.float(), weight).numpy()
            gate_cpu().choose(scores_TE, *self._choice, ids_TK, weights_TK)
        else:
            self._select_in_parts(x_TH.float().numpy(), self.compiled, ids_TK, weights_TK)
        return torch.from_numpy(ids_TK), torch.from_numpy(weights_TK)

    @staticmethod
    def _select_in_parts(
        x_TH: npt.NDArray[np.float32],
        compiled: CompiledGate,
        ids_TK: npt.NDArray[np.int64],
        weights_TK: npt.NDArray[np.float32],
    ) -> None:
        num_tokens, panels = len(x_TH), compiled[0]
        scores_TE = np.empty((num_tokens, len(compiled[1])), np.float32)

        def select(first: int, last: int) -> None:
            rows = slice(first, last)
            gate_cpu().select(x_TH[rows], *compiled, scores_TE[rows], ids_TK[rows], weights_TK[rows])

        in_parts(select, num_tokens, 2 * num_tokens * panels.size)


def _choose(
    scores_TE: torch.Tensor, correction_bias_E: torch.Tensor, config: ModelConfig
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same in torch's operators, for GPUs."""
    scores_TE = scores_TE.sigmoid()
    choice_TE = scores_TE + correction_bias_E
    if config.topk_group < config.n_group:
        choice_TE = choice_TE.masked_fill(~_eligible(choice_TE, config), -torch.inf)
    expert_ids_TK = choice_TE.topk(config.num_experts_per_tok, dim=-1, sorted=False).indices
    weights_TK = scores_TE.gather(1, expert_ids_TK)
    if config.norm_topk_prob:
        weights_TK = weights_TK / (weights_TK.sum(-1, keepdim=True) + 1e-20)
    return expert_ids_TK, weights_TK * config.routed_scaling_factor


def _eligible(choice_TE: torch.Tensor, config: ModelConfig) -> torch.Tensor:
    grouped_TGE = choice_TE.view(len(choice_TE), config.n_group, -1)
    group_scores_TG = grouped_TGE.topk(2, dim=-1).values.sum(-1)
    groups = group_scores_TG.topk(config.topk_group, dim=-1, sorted=False).indices
    mask_TG = torch.zeros_like(group_scores_TG, dtype=torch.bool).scatter(1, groups, True)
    return mask_TG.repeat_interleave(grouped_TGE.shape[2], dim=1)


@functools.cache
def gate_cpu() -> ModuleType:
    # Imported here, so that GPU workers do without numba.
    return importlib.import_module("router.gate_cpu")
