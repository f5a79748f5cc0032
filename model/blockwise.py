"""Attention in parts: over a few of the keys at a time, the parts being put together exactly.

Each part is normalised by itself and says by how much (the log of the sum of its exponentials), which is all that it
takes to combine parts (Dao et al., FlashAttention, 2022). No part has a mask: keys are either all visible, or are the
queries' own positions.

Shapes: `T` queries, `Q` and `N` query and KV heads, `G = Q / N`, `S` keys, `D` head dim.
"""

from __future__ import annotations

import dataclasses

import torch


@dataclasses.dataclass(frozen=True, slots=True)
class Part:
    """Attention over some of the keys. fp32 once parts have been merged: there may be hundreds of them."""

    out_TQD: torch.Tensor
    log_sum_TQ: torch.Tensor


def attend(q_TQD: torch.Tensor, k_SND: torch.Tensor, v_SND: torch.Tensor, *, causal: bool, scale: float) -> Part:
    """
    Args:
        causal: the keys are those of the queries' own positions, `S = T`; otherwise every query sees every key.
    """
    num_kv, group = k_SND.shape[1], q_TQD.shape[1] // k_SND.shape[1]
    # KV heads are the batch, and their keys are broadcast over the G query heads.
    q_NGTD = q_TQD.view(len(q_TQD), num_kv, group, -1).permute(1, 2, 0, 3)
    k_NGSD, v_NGSD = (x.transpose(0, 1).unsqueeze(1).expand(-1, group, -1, -1) for x in (k_SND, v_SND))
    # What scaled_dot_product_attention would call: it alone keeps the sums to itself.
    if q_TQD.device.type == "cpu":
        flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        out_NGTD, log_sum_NGT = flash(q_NGTD, k_NGSD, v_NGSD, 0.0, causal, scale=scale)
    elif q_TQD.dtype in (torch.bfloat16, torch.float16) and q_TQD.shape[2] % 8 == 0:
        flash = torch.ops.aten._scaled_dot_product_flash_attention
        out_NGTD, log_sum_NGT = flash(q_NGTD, k_NGSD, v_NGSD, 0.0, causal, scale=scale)[:2]
    else:
        out_NGTD, log_sum_NGT = _attend_by_definition(q_NGTD, k_NGSD, v_NGSD, causal, scale)
    return Part(out_NGTD.permute(2, 0, 1, 3).flatten(1, 2), log_sum_NGT.permute(2, 0, 1).flatten(1, 2).float())


def merge(first: Part, second: Part) -> Part:
    """Attention over the keys of both."""
    log_sum_TQ = torch.logaddexp(first.log_sum_TQ, second.log_sum_TQ)
    share_TQ1 = (second.log_sum_TQ - log_sum_TQ).exp().unsqueeze(2)
    return Part(torch.lerp(first.out_TQD.float(), second.out_TQD.float(), share_TQ1), log_sum_TQ)


def _attend_by_definition(
    q_NGTD: torch.Tensor, k_NGSD: torch.Tensor, v_NGSD: torch.Tensor, causal: bool, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """For devices and precisions that have no kernel; scores take `Q · T · S` numbers."""
    scores_NGTS = torch.matmul(q_NGTD.float(), k_NGSD.float().transpose(2, 3)) * scale
    if causal:
        hidden_TS = torch.ones(scores_NGTS.shape[2:], dtype=torch.bool, device=q_NGTD.device).triu(1)
        scores_NGTS.masked_fill_(hidden_TS, -torch.inf)
    log_sum_NGT = scores_NGTS.logsumexp(3)
    weights_NGTS = (scores_NGTS - log_sum_NGT.unsqueeze(3)).exp()
    return torch.matmul(weights_NGTS, v_NGSD.float()).to(q_NGTD.dtype), log_sum_NGT
