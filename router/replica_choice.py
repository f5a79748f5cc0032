"""Which replica of its expert each row of a batch goes to: one compiled pass, a function of batch and placement alone.

Workers need not talk, and a step that is run again chooses alike. Two regimes, told apart by the rows per expert hit:

- With many, shards compute: rows are divided so that every shard gets as many. Optimal fractions are a linear programme
  (DeepSeek's LPLB solves it with an interior-point method); the shards of one expert after the other are levelled
  instead, in sweeps, which comes to the same optimum but for rounding. Experts are exchanged then until no two shards
  divide more than one between them.
- With few, shards read weights: an expert that is hit goes to one replica alone, so that none is read twice, and
  replicas are chosen so that the shard that reads most reads as few as possible (METRO, arXiv 2512.09277). That is a
  semi-matching: greedy, then paths that relieve the fullest shard (Harvey et al., J. Algorithms 59, 2006).

Shapes: `T` tokens, `K` experts per token, `E` experts, `R` replicas, `X` shards, `M` experts hit that have replicas.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np

_compile: Any = numba.njit(nogil=True, cache=True, error_model="numpy")
_MAX_SWEEPS = 24


@_compile  # type: ignore[untyped-decorator]
def choose_replicas(
    expert_ids: Any, physical: Any, shard_of: Any, replicas: Any, num_shards: Any, few_rows: Any, slots: Any
) -> None:
    """
    Args:
        expert_ids: `[T, K]`.
        physical: slots `[E, R]`.
        shard_of: their shards.
        replicas: `[E]`.
        few_rows: below so many rows per expert hit, reading weights is what costs.
        slots: `[T, K]` int32, written.
    """
    num_tokens, top_k = expert_ids.shape
    count, salt = np.zeros(len(replicas), np.int64), 0
    for token in range(num_tokens):
        for k in range(top_k):
            count[expert_ids[token, k]] += 1
            salt += expert_ids[token, k]
    movable, num_movable, hit = np.empty(len(replicas), np.int64), 0, 0
    fixed_rows, fixed_hits = np.zeros(num_shards, np.int64), np.zeros(num_shards, np.int64)
    for expert in range(len(replicas)):
        if count[expert] > 0:
            hit += 1
            if replicas[expert] > 1:
                movable[num_movable] = expert
                num_movable += 1
            else:
                fixed_rows[shard_of[expert, 0]] += count[expert]
                fixed_hits[shard_of[expert, 0]] += 1
    movable_M = movable[:num_movable]
    if num_tokens * top_k < few_rows * hit:
        _spare_reads(count, shard_of, replicas, movable_M, salt, fixed_hits, fixed_rows)
        for token in range(num_tokens):
            for k in range(top_k):
                expert = expert_ids[token, k]
                # What was counted is now the replica chosen, for experts that have several.
                slots[token, k] = physical[expert, count[expert] if replicas[expert] > 1 else 0]
        return
    quotas = np.zeros(physical.shape, np.int64)
    level_rows(count, shard_of, replicas, movable_M, fixed_rows, quotas)
    _gather(shard_of, replicas, movable_M, num_shards, quotas)
    _spend(expert_ids, physical, shard_of, replicas, num_shards, quotas, slots)


@_compile  # type: ignore[untyped-decorator]
def level_rows(count: Any, shard_of: Any, replicas: Any, movable: Any, rows: Any, quotas: Any) -> None:
    """Divide the rows of each expert in `movable` among its replicas, so that shards get as many.

    Args:
        count: `[E]` int64 rows of each expert.
        rows: `[X]` int64 rows that each shard has anyway; changed to what it gets.
        quotas: `[E, R]` int64, zero; written.
    """
    level, order = np.empty(shard_of.shape[1], np.int64), np.empty(shard_of.shape[1], np.int64)
    for _ in range(_MAX_SWEEPS):
        changed = False
        for expert in movable:
            width = replicas[expert]
            for replica in range(width):
                shard = shard_of[expert, replica]
                rows[shard] -= quotas[expert, replica]
                # Insertion sort: replicas are few.
                at = replica
                while at > 0 and level[at - 1] > rows[shard]:
                    level[at], order[at] = level[at - 1], order[at - 1]
                    at -= 1
                level[at], order[at] = rows[shard], replica
            # The lowest shards are raised to a common height as far as the rows go.
            used, below = 1, level[0]
            while used < width and level[used] * used - below < count[expert]:
                below += level[used]
                used += 1
            height, extra = divmod(count[expert] + below, used)
            for at in range(width):
                replica = order[at]
                quota = height + (at < extra) - level[at] if at < used else 0
                changed |= quota != quotas[expert, replica]
                quotas[expert, replica] = quota
                rows[shard_of[expert, replica]] += quota
        if not changed or len(movable) < 2:
            break


@_compile  # type: ignore[untyped-decorator]
def _gather(shard_of: Any, replicas: Any, movable: Any, num_shards: Any, quotas: Any) -> None:
    """Let no two shards divide more than one expert between them, as each reads all of its weights for fewer rows. Two
    that they divide exchange rows until one of them is on one of the shards alone; what each shard has to do stays.

    Args:
        quotas: `[E, R]`, changed.
    """
    divided, replica_of = np.full((num_shards, num_shards), -1, np.int64), np.empty(num_shards, np.int64)
    for expert in movable:
        for one in range(replicas[expert]):
            for two in range(one):
                if quotas[expert, one] == 0 or quotas[expert, two] == 0:
                    continue
                first, second = shard_of[expert, one], shard_of[expert, two]
                other = divided[first, second]
                if other >= 0:
                    for replica in range(replicas[other]):
                        replica_of[shard_of[other, replica]] = replica
                    other_one, other_two = replica_of[first], replica_of[second]
                    # One of the two is nothing, where the other expert has become whole since.
                    there = min(quotas[expert, one], quotas[other, other_two])
                    back = min(quotas[expert, two], quotas[other, other_one])
                    moved = there if there <= back else -back
                    quotas[expert, one] -= moved
                    quotas[expert, two] += moved
                    quotas[other, other_one] += moved
                    quotas[other, other_two] -= moved
                if quotas[expert, one] > 0 and quotas[expert, two] > 0:
                    divided[first, second] = divided[second, first] = expert


@_compile  # type: ignore[untyped-decorator]
def _spend(
    expert_ids: Any, physical: Any, shard_of: Any, replicas: Any, num_shards: Any, quotas: Any, slots: Any
) -> None:
    """Give quotas out to tokens in their order; a token prefers shards that it goes to anyway."""
    num_tokens, top_k = expert_ids.shape
    visited = np.full(num_shards, -1, np.int64)
    for token in range(num_tokens):
        for k in range(top_k):
            expert = expert_ids[token, k]
            if replicas[expert] == 1:
                slots[token, k] = physical[expert, 0]
                visited[shard_of[expert, 0]] = token
        for k in range(top_k):
            expert = expert_ids[token, k]
            if replicas[expert] == 1:
                continue
            best, best_known = -1, False
            for replica in range(replicas[expert]):
                if quotas[expert, replica] > 0:
                    known = visited[shard_of[expert, replica]] == token
                    if (
                        best < 0
                        or (known and not best_known)
                        or (known == best_known and quotas[expert, replica] > quotas[expert, best])
                    ):
                        best, best_known = replica, known
            quotas[expert, best] -= 1
            slots[token, k] = physical[expert, best]
            visited[shard_of[expert, best]] = token


@_compile  # type: ignore[untyped-decorator]
def _spare_reads(choice: Any, shard_of: Any, replicas: Any, movable: Any, salt: Any, hits: Any, rows: Any) -> None:
    """Choose one replica for each expert in `movable`, and write it to `choice`, which comes with its rows.

    Args:
        salt: where to begin among equals, so that different batches do not all prefer the same replica.
        hits: `[X]` experts hit that are on each shard anyway; changed to what it reads.
        rows: `[X]` their rows, which decide among equals; changed.
    """
    for expert in movable:
        best, best_shard = -1, -1
        for turn in range(replicas[expert]):
            replica = (turn + salt) % replicas[expert]
            shard = shard_of[expert, replica]
            if (
                best < 0
                or hits[shard] < hits[best_shard]
                or (hits[shard] == hits[best_shard] and rows[shard] < rows[best_shard])
            ):
                best, best_shard = replica, shard
        hits[best_shard] += 1
        rows[best_shard] += choice[expert]
        choice[expert] = best
    while _relieve(choice, shard_of, replicas, movable, hits):
        pass


@_compile  # type: ignore[untyped-decorator]
def _relieve(choice: Any, shard_of: Any, replicas: Any, movable: Any, hits: Any) -> Any:
    """Move experts along a path from a fullest shard to one that is emptier by two or more. False if there is none."""
    num_shards = len(hits)
    peak = hits.argmax()
    came_by = np.full(num_shards, -1, np.int64)
    came_from = np.full(num_shards, -1, np.int64)
    queue, head, tail = np.empty(num_shards, np.int64), 0, 1
    queue[0] = peak
    came_from[peak] = peak
    while head < tail:
        shard = queue[head]
        head += 1
        for expert in movable:
            if shard_of[expert, choice[expert]] != shard:
                continue
            for replica in range(replicas[expert]):
                other = shard_of[expert, replica]
                if came_from[other] >= 0:
                    continue
                came_from[other], came_by[other] = shard, expert
                queue[tail] = other
                tail += 1
                if hits[other] + 2 <= hits[peak]:
                    hits[other] += 1
                    hits[peak] -= 1
                    while other != peak:
                        expert = came_by[other]
                        for step in range(replicas[expert]):
                            if shard_of[expert, step] == other:
                                choice[expert] = step
                        other = came_from[other]
                    return True
    return False
