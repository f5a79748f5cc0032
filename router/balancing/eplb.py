"""The interface of DeepSeek's Expert Parallelism Load Balancer, for callers that have it already.

https://github.com/deepseek-ai/EPLB; the algorithm behind it is this package's.
"""

from __future__ import annotations

import torch

from octet.errors import ConfigError
from router.balancing.planner import plan
from router.balancing.topology import Budget, Topology


def rebalance_experts(
    weight: torch.Tensor, num_replicas: int, num_groups: int, num_nodes: int, num_gpus: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Replicate and pack the experts of every layer.

    Hierarchical, with each group of experts on one node, if `num_nodes` divides `num_groups`; global otherwise. Unlike
    the original, no GPU gets two replicas of an expert.

    Args:
        weight: load of each logical expert, `[layers, experts]`.
        num_replicas: physical experts per layer, a multiple of `num_gpus`.
        num_gpus: a multiple of `num_nodes`.

    Returns: (phy2log, log2phy, logcnt), all int64: the logical expert of each physical one `[layers, num_replicas]`;
    the physical experts of each logical one `[layers, experts, most replicas]`, with -1 behind the last; and how many
    those are `[layers, experts]`. Physical expert `i` is on GPU `i // (num_replicas // num_gpus)`.

    Raises: ConfigError.
    """
    num_experts = weight.shape[1]
    if num_gpus < 1 or num_nodes < 1 or num_gpus % num_nodes:
        raise ConfigError("num_gpus", num_gpus, f"a multiple of num_nodes ({num_nodes})")
    if num_replicas % num_gpus or not num_experts <= num_replicas <= num_experts * num_gpus:
        expected = f"a multiple of {num_gpus} GPUs from {num_experts} to {num_experts * num_gpus}"
        raise ConfigError("num_replicas", num_replicas, expected)
    gpus_per_node = num_gpus // num_nodes
    topology = Topology(
        slots=(num_replicas // num_gpus,) * num_gpus,
        nodes=tuple(gpu // gpus_per_node for gpu in range(num_gpus)),
        num_groups=num_groups if num_groups % num_nodes == 0 else 1,
    )
    placement = plan(weight.detach().double().cpu().numpy(), topology, Budget(), None).placement
    arrays = (placement.physical_to_logical, placement.logical_to_physical, placement.num_replicas)
    phy2log, log2phy, logcnt = (torch.from_numpy(array.astype("int64")) for array in arrays)
    return phy2log, log2phy, logcnt
