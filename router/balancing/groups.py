"""Expert groups that stay on one node each, so that a gate which limits a token's groups limits its nodes as well.

Shapes: `L` layers, `E` experts, `G` groups, `N` nodes, `S` slots.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from octet.errors import ConfigError
from router.balancing.pack import ANYWHERE
from router.balancing.topology import Topology

Ints = npt.NDArray[np.int64]


def home_nodes(loads_LE: npt.NDArray[np.float64], topology: Topology, table_LS: Ints) -> Ints:
    """The node `[L, E]` that each expert has to be on; ANYWHERE without groups, or where they do not fit the nodes.

    Groups that are whole on a node stay there. Otherwise a layer's groups are packed anew, by falling load onto the
    node with the least load per shard, as in DeepSeek's EPLB.

    Raises: ConfigError if the groups do not divide the experts.
    """
    num_layers, num_experts = loads_LE.shape
    homes_LE = np.full((num_layers, num_experts), ANYWHERE, dtype=np.int64)
    if topology.num_groups == 1 or topology.num_nodes == 1:
        return homes_LE
    if num_experts % topology.num_groups:
        raise ConfigError("topology.num_groups", topology.num_groups, f"a divisor of the {num_experts} experts")
    group_size = num_experts // topology.num_groups
    limits_N = _limits(topology, group_size)
    if limits_N.sum() < topology.num_groups:
        return homes_LE
    slots, nodes = np.array(topology.slots), np.array(topology.nodes)
    shards_N = np.bincount(nodes[slots > 0], minlength=topology.num_nodes)
    node_of_slot = np.repeat(nodes, topology.slots_per_shard)
    for layer, load_E in enumerate(loads_LE):
        homes_G = _present(table_LS[layer], node_of_slot, topology, group_size)
        if homes_G is None or (np.bincount(homes_G, minlength=topology.num_nodes) > limits_N).any():
            homes_G = _packed(load_E.reshape(topology.num_groups, -1).sum(1), limits_N, shards_N)
        homes_LE[layer] = np.repeat(homes_G, group_size)
    return homes_LE


def _limits(topology: Topology, group_size: int) -> Ints:
    """Groups per node: an equal number if the slots allow, and otherwise what they hold."""
    slots_N = np.bincount(topology.nodes, weights=topology.slots, minlength=topology.num_nodes).astype(np.int64)
    fit_N = slots_N // group_size
    even_N = np.minimum(fit_N, -(-topology.num_groups // topology.num_nodes))
    return even_N if even_N.sum() >= topology.num_groups else fit_N


def _present(table_S: Ints, node_of_slot: Ints, topology: Topology, group_size: int) -> Ints | None:
    held = table_S >= 0
    homes_G = np.full(topology.num_groups, ANYWHERE, dtype=np.int64)
    groups, nodes = table_S[held] // group_size, node_of_slot[held]
    homes_G[groups] = nodes
    return homes_G if (homes_G != ANYWHERE).all() and (homes_G[groups] == nodes).all() else None


def _packed(load_G: npt.NDArray[np.float64], limits_N: Ints, shards_N: Ints) -> Ints:
    homes_G, load_N, room_N = np.zeros(len(load_G), dtype=np.int64), np.zeros(len(limits_N)), limits_N.copy()
    for group in np.argsort(-load_G, kind="stable"):
        node = int(np.where(room_N > 0, load_N / np.maximum(shards_N, 1), np.inf).argmin())
        homes_G[group] = node
        load_N[node] += load_G[group]
        room_N[node] -= 1
    return homes_G
