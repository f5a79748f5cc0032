"""Expert loads like those of a trained router: skewed, drifting, and sampled into batches.

For tests, benchmarks and the simulator. Shapes: `L` layers, `E` experts, `T` tokens, `K` experts per token.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Loads = npt.NDArray[np.float64]
_HALVINGS = 60


def skewed_loads(
    num_layers: int,
    num_experts: int,
    experts_per_token: int,
    rng: np.random.Generator,
    alpha: tuple[float, float] = (0.2, 1.0),
) -> Loads:
    """The share of tokens `[L, E]` that reach each expert; a layer sums to `experts_per_token`.

    Popularity falls as rank^-α with an α of its own per layer, uniform in `alpha`. A token takes the experts whose
    exponential clocks of these rates ring first, so an expert's share is about 1 − e^(−h·w), with h such that as many
    ring as a token takes. Which expert has which rank is random per layer.
    """
    ranks = np.arange(1, num_experts + 1)
    weights_LE = ranks ** -rng.uniform(*alpha, size=(num_layers, 1))
    low_L1, high_L1 = np.zeros((num_layers, 1)), np.full((num_layers, 1), 1e3 * num_experts)
    for _ in range(_HALVINGS):
        middle_L1 = (low_L1 + high_L1) / 2
        few_L1 = -np.expm1(-middle_L1 * weights_LE).sum(1, keepdims=True) < experts_per_token
        low_L1, high_L1 = np.where(few_L1, middle_L1, low_L1), np.where(few_L1, high_L1, middle_L1)
    return rng.permuted(-np.expm1(-low_L1 * weights_LE), axis=1)


def drifted(loads_LE: Loads, share: float, rng: np.random.Generator) -> Loads:
    """The loads after `share` (at most a half) of each layer's experts have swapped theirs with others of the rest."""
    moved_LE = loads_LE.copy()
    num_swaps = round(share * loads_LE.shape[1])
    for loads_E in moved_LE:
        one, other = rng.permutation(len(loads_E))[: 2 * num_swaps].reshape(2, num_swaps)
        loads_E[one], loads_E[other] = loads_E[other], loads_E[one]
    return moved_LE


def sampled_experts(
    loads_E: Loads, num_tokens: int, experts_per_token: int, rng: np.random.Generator
) -> npt.NDArray[np.int64]:
    """Distinct experts `[T, K]` of each token, which reach an expert about as often as its share in `loads_E` says."""
    rates_E = -np.log1p(-np.minimum(loads_E, 1 - 1e-12))
    rings_TE = rng.exponential(size=(num_tokens, len(loads_E))) / np.maximum(rates_E, 1e-12)
    return np.argpartition(rings_TE, experts_per_token - 1, axis=1)[:, :experts_per_token].astype(np.int64)
