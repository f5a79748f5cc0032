"""The least time that a decode step can take: bytes that must be read, numbers that must be multiplied."""

from __future__ import annotations

import dataclasses

from model.config import ModelConfig
from ops.bench.machine import Rates


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    num_bytes: float = 0
    num_flops: float = 0

    def __add__(self, other: Work) -> Work:
        return Work(num_bytes=self.num_bytes + other.num_bytes, num_flops=self.num_flops + other.num_flops)

    def seconds(self, rates: Rates) -> float:
        """Reading and multiplying at the same time, each at its full rate (the roofline)."""
        return max(self.num_bytes / rates.bytes_per_s, self.num_flops / rates.flops_per_s)


def attention_work(config: ModelConfig, num_sequences: int, num_attended: float, element_bytes: int) -> dict[str, Work]:
    """What an attention worker has to do in a decode step, by the parts of `ops.bench.breakdown.probes`.

    Activations are left out: they are small, and stay in caches.
    """
    hidden, layers = config.hidden_size, config.num_hidden_layers
    query_width = config.num_attention_heads * config.head_dim
    kv_width = config.num_key_value_heads * config.head_dim
    num_dense, num_moe = layers - len(config.moe_layers), len(config.moe_layers)
    shared = config.moe_intermediate_size * config.n_shared_experts
    numbers = {
        "attention_linear": layers * hidden * (2 * query_width + 2 * kv_width),
        "mlp_linear": 3 * hidden * (num_dense * config.intermediate_size + num_moe * shared),
        "gate_linear": num_moe * hidden * config.n_routed_experts,
        "head_linear": hidden * config.vocab_size,
    }
    work = {part: _product(count, num_sequences, element_bytes) for part, count in numbers.items()}
    # Each position's key and value is read once; each query head multiplies both.
    work["attention"] = Work(
        num_bytes=num_attended * config.kv_bytes_per_token(element_bytes, 0),
        num_flops=num_attended * layers * 4 * query_width,
    )
    return work


def expert_work(config: ModelConfig, num_experts: float, num_pairs: float, element_bytes: int) -> Work:
    """Of `num_experts` experts that are read, and `num_pairs` rows that are multiplied with one each."""
    numbers = 3 * config.hidden_size * config.moe_intermediate_size
    return Work(num_bytes=num_experts * numbers * element_bytes, num_flops=2 * num_pairs * numbers)


def _product(count: int, rows: int, element_bytes: int) -> Work:
    return Work(num_bytes=count * element_bytes, num_flops=2 * count * rows)
