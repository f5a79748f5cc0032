"""Rotary position embedding, half-rotation layout, over the first dims of each head.

Shapes: `T` tokens, `N` heads, `D` head dim, `R` rotated dims.
"""

from __future__ import annotations

import math

import torch

from model.config import ModelConfig, RopeConfig


class RotaryEmbedding:
    """Cosines and sines by position, computed once in fp32 (Su et al., RoFormer, 2021)."""

    def __init__(self, config: ModelConfig, max_positions: int, device: torch.device) -> None:
        rotary_dim = int(config.head_dim * config.rope.partial_rotary_factor)
        inverse_frequencies, scale = _inverse_frequencies(config.rope, rotary_dim)
        angles = torch.outer(torch.arange(max_positions, dtype=torch.float32), inverse_frequencies)
        angles = torch.cat((angles, angles), dim=-1)
        self._rotary_dim = rotary_dim
        self._cos = (angles.cos() * scale).to(device)
        self._sin = (angles.sin() * scale).to(device)

    def at(self, positions_T: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines `[T, R]`, to be used by every layer of a step."""
        return self._cos[positions_T].to(dtype), self._sin[positions_T].to(dtype)

    def rotate(self, x_TND: torch.Tensor, cos_sin: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        """`[T, N, D]` with its first R dims rotated."""
        cos, sin = (part.unsqueeze(1) for part in cos_sin)
        rotated, passed = x_TND[..., : self._rotary_dim], x_TND[..., self._rotary_dim :]
        first, second = rotated.chunk(2, dim=-1)
        rotated = rotated * cos + torch.cat((-second, first), dim=-1) * sin
        return torch.cat((rotated, passed), dim=-1)


def _inverse_frequencies(rope: RopeConfig, rotary_dim: int) -> tuple[torch.Tensor, float]:
    exponents = torch.arange(0, rotary_dim, 2, dtype=torch.float32) / rotary_dim
    if rope.rope_type == "default":
        return 1.0 / rope.theta**exponents, 1.0
    return _yarn(rope, rotary_dim, exponents)


def _yarn(rope: RopeConfig, rotary_dim: int, exponents: torch.Tensor) -> tuple[torch.Tensor, float]:
    """YaRN (Peng et al., 2023): fast dims keep their frequency, slow ones are interpolated, a ramp lies between."""

    def correction_dim(rotations: float) -> float:
        period = rope.original_max_position_embeddings / (rotations * 2 * math.pi)
        return rotary_dim * math.log(period) / (2 * math.log(rope.theta))

    low, high = correction_dim(rope.beta_fast), correction_dim(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rotary_dim - 1)
    span = high - low if high != low else 0.001
    ramp = ((torch.arange(rotary_dim // 2, dtype=torch.float32) - low) / span).clamp(0, 1)
    frequencies = rope.theta**exponents
    return ramp / (rope.factor * frequencies) + (1 - ramp) / frequencies, _attention_factor(rope)


def _attention_factor(rope: RopeConfig) -> float:
    def mscale(weight: float) -> float:
        return 1.0 if rope.factor <= 1 else 0.1 * weight * math.log(rope.factor) + 1.0

    if rope.attention_factor is not None:
        return rope.attention_factor
    if rope.mscale and rope.mscale_all_dim:
        return mscale(rope.mscale) / mscale(rope.mscale_all_dim)
    return mscale(1.0)
