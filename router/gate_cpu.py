"""The gate's choice of experts on a CPU, as one compiled pass over the scores; see `router.gate`.

Shapes: `T` tokens, `E` experts, `K` experts per token, `G` groups.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from model.linear_cpu import linear_panels
from model.rows_cpu import exp
from model.vectors_cpu import declare, inner


@inner  # type: ignore[untyped-decorator]
def _largest(values: Any, taken: Any, first: Any, last: Any) -> Any:
    """The first of the largest values that are not taken; NaN is never larger."""
    best = -1
    for i in range(first, last):
        if not taken[i] and (best < 0 or values[i] > values[best]):
            best = i
    return best


@inner  # type: ignore[untyped-decorator]
def _keep_largest(values: Any, numbers: Any, row: Any) -> None:
    """Which of the values are the largest, best first, in one pass: few are better than those kept already.

    Args:
        numbers: `[T, K]`, of which one row is written.
    """
    count, top_k = 0, numbers.shape[1]
    for i in range(values.shape[0]):
        value, at = values[i], count
        if count < top_k:
            count += 1
        elif value > values[numbers[row, top_k - 1]]:
            at = top_k - 1
        else:
            continue
        while at > 0 and value > values[numbers[row, at - 1]]:
            numbers[row, at] = numbers[row, at - 1]
            at -= 1
        numbers[row, at] = i


@declare("void(f4[:,::1], f4[::1], i8, i8, b1, f4, i8[:,::1], f4[:,::1])")  # type: ignore[untyped-decorator]
def choose(
    scores: Any, bias: Any, n_group: Any, topk_group: Any, normalise: Any, factor: Any, expert_ids: Any, weights: Any
) -> None:
    """
    Args:
        scores: `[T, E]` before the sigmoid; changed.
        bias: `[E]`, added to choose.
        normalise: whether weights are divided by their sum.
        factor: what they are multiplied with.
        expert_ids: `[T, K]`, written; best first, and of equals the one with the lowest number.
        weights: `[T, K]`, written.
    """
    num_tokens, num_experts = scores.shape
    top_k, group_size = expert_ids.shape[1], num_experts // n_group
    choice, taken = np.empty(num_experts, np.float32), np.zeros(num_experts, np.bool_)
    group_scores, group_taken = np.empty(n_group, np.float32), np.empty(n_group, np.bool_)
    for token in range(num_tokens):
        for expert in range(num_experts):
            # exp(-87) is 0 beside 1, and exp(87) is infinite enough: both ends keep their limit.
            score = np.float32(1) / (np.float32(1) + exp(min(-scores[token, expert], np.float32(87))))
            scores[token, expert] = score
            choice[expert] = score + bias[expert]
        if topk_group < n_group:
            for group in range(n_group):
                first, last = group * group_size, (group + 1) * group_size
                best = _largest(choice, taken, first, last)
                taken[best] = True
                second = _largest(choice, taken, first, last)
                taken[best] = False
                group_scores[group] = choice[best] + choice[second]
            group_taken[:] = False
            for _ in range(topk_group):
                group_taken[_largest(group_scores, group_taken, 0, n_group)] = True
            for group in range(n_group):
                if not group_taken[group]:
                    choice[group * group_size : (group + 1) * group_size] = -np.inf
        _keep_largest(choice, expert_ids, token)
        total = np.float32(0)
        for k in range(top_k):
            weights[token, k] = scores[token, expert_ids[token, k]]
            total += weights[token, k]
        divisor = total + np.float32(1e-20) if normalise else np.float32(1)
        for k in range(top_k):
            weights[token, k] = weights[token, k] / divisor * factor


@declare(  # type: ignore[untyped-decorator]
    "void(f4[:,::1], f4[:,:,::1], f4[::1], i8, i8, b1, f4, f4[:,::1], i8[:,::1], f4[:,::1])"
)
def select(
    x: Any,
    panels: Any,
    bias: Any,
    n_group: Any,
    topk_group: Any,
    normalise: Any,
    factor: Any,
    scores: Any,
    expert_ids: Any,
    weights: Any,
) -> None:
    """The scores of `x`, too, `[T, H]` by the gate's `panels`, and the choice by them."""
    linear_panels(x, panels, np.empty(0, np.float32), scores, 0, len(panels))
    choose(scores, bias, n_group, topk_group, normalise, factor, expert_ids, weights)
