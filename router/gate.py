"""Which experts a token goes to, and with what weight.

Shapes: `T` tokens, `H` hidden, `E` experts, `K` experts per token, `G` groups.
"""

from __future__ import annotations

import torch

from model.config import ModelConfig
from model.linear import linear
from model.weights import GateWeights


def select_experts(x_TH: torch.Tensor, gate: GateWeights, config: ModelConfig) -> tuple[torch.Tensor, torch.Tensor]:
    """The auxiliary-loss-free sigmoid gate of DeepSeek-V3 as Glm4Moe has it, in fp32.

    The correction bias chooses experts but does not weigh them. With groups, only experts of the `topk_group` groups
    with the largest sums of their two best scores are eligible.

    Returns: expert ids `[T, K]` (int64) and weights `[T, K]` (fp32).
    """
    scores_TE = linear(x_TH.float(), gate.weight).sigmoid()
    choice_TE = scores_TE + gate.correction_bias
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
