"""Choosing tokens on a CPU, as compiled passes over each row of logits; see `model.sampler`.

What top-k and top-p leave is found without an ordering of the vocabulary: values are counted by their leading bits, and
only those that share the bits of the boundary are sorted. In torch's operators, which order the whole row in fp64, a
draw takes as long as a layer of a small model.

Shapes: `B` rows, `V` vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from model.rows_cpu import exponentials, largest_of
from model.sampler import LEAST_TEMPERATURE, NO_TOKEN, SampleRow, uniform
from model.threads import in_parts
from model.vectors_cpu import address, declare, inner

_BLOCK = 256
"""Probabilities that are summed on their own: a draw looks for its block first, and then within it."""
_TINY = np.float32(1e-37)
"""Beside the most likely token's 1. The exponential function makes nothing smaller than e⁻⁸⁷, which counts as 0."""
_SHIFT = 20
"""Of a float's bits, those that a bin ignores. A bin for every sign, exponent and leading three bits."""
_BINS = 2 ** (32 - _SHIFT)
_OPERATIONS = 32
"""That a logit is worth, where threads share the rows."""


def sample(logits_BV: npt.NDArray[np.float32], rows: Sequence[SampleRow]) -> list[int]:
    """See `model.sampler.sample`."""
    tokens = [0] * len(rows)

    def choose(first: int, last: int) -> None:
        tokens[first:last] = _choose(logits_BV[first:last], rows[first:last])

    in_parts(choose, len(rows), _OPERATIONS * logits_BV.size, parts_per_thread=2)
    return tokens


def _choose(logits_BV: npt.NDArray[np.float32], rows: Sequence[SampleRow]) -> list[int]:
    size = logits_BV.shape[1]
    room = np.empty(size, np.float32), np.empty(size, np.float32), np.empty(_BINS, np.int64), np.empty(_BINS)
    times_V = np.zeros(size, np.int32)
    tokens = []
    for logits_V, row in zip(logits_BV, rows, strict=True):
        sampling, masked_ids = row.sampling, row.stopping.masked_ids(row.num_new_tokens)
        if sampling.penalized or masked_ids:
            logits_V = logits_V.copy()
        if sampling.penalized:
            token_ids = np.array([*row.token_ids, *row.drafted], np.int64)
            factors = sampling.repetition_penalty, sampling.presence_penalty, sampling.frequency_penalty
            penalize(logits_V, token_ids, row.num_prompt_tokens, *factors, times_V)
        if masked_ids:
            logits_V[list(masked_ids)] = -np.inf
        if sampling.greedy:
            # Of a row with NaN it finds that.
            token_id = int(logits_V.argmax())
            tokens.append(token_id if np.isfinite(logits_V[token_id]) else NO_TOKEN)
            continue
        point = uniform(sampling.seed, row.choice, row.position)
        kept = sampling.temperature, sampling.top_k, sampling.top_p, sampling.min_p
        tokens.append(draw(np.ascontiguousarray(logits_V), *kept, point, *room))
    return tokens


@declare("void(f4[::1], i8[::1], i8, f8, f8, f8, i4[::1])")  # type: ignore[untyped-decorator]
def penalize(
    logits: Any, token_ids: Any, num_prompt: Any, repetition: Any, presence: Any, frequency: Any, times: Any
) -> None:
    """Repetition penalty (Keskar et al., CTRL, 2019) over prompt and answer; presence and frequency over the answer.

    Args:
        logits: `[V]`, changed.
        token_ids: the prompt, and behind it the answer.
        times: `[V]`, zeros, before and after.
    """
    factor = np.float32(repetition)
    for token_id in token_ids:
        if times[token_id] == 0:
            times[token_id] = 1
            logits[token_id] = logits[token_id] / factor if logits[token_id] > 0 else logits[token_id] * factor
    times[token_ids] = 0
    for token_id in token_ids[num_prompt:]:
        times[token_id] += 1
    for token_id in token_ids[num_prompt:]:
        if times[token_id] > 0:
            logits[token_id] -= np.float32(presence + frequency * times[token_id])
            times[token_id] = 0


@inner  # type: ignore[untyped-decorator]
def _bin(bits: Any) -> Any:
    """Ascending with the float that has these bits."""
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return (ordered >> _SHIFT) + _BINS // 2


@inner  # type: ignore[untyped-decorator]
def _members(x: Any, bits: Any, wanted: Any, room: Any) -> Any:
    """Copy the values of one bin into `room`. Returns: how many."""
    count = 0
    for i in range(len(x)):
        if _bin(bits[i]) == wanted:
            room[count] = x[i]
            count += 1
    return count


@declare("f4(f4[::1], i8, i8[::1], f4[::1])")  # type: ignore[untyped-decorator]
def kth_largest(x: Any, k: Any, counts: Any, room: Any) -> Any:
    """
    Args:
        k: 1 … V.
        counts: `[bins]`, changed; likewise `room` `[V]`.
    """
    bits = x.view(np.int32)
    counts[:] = 0
    for i in range(len(x)):
        counts[_bin(bits[i])] += 1
    above, wanted = 0, _BINS - 1
    while above + counts[wanted] < k:
        above += counts[wanted]
        wanted -= 1
    count = _members(x, bits, wanted, room)
    return np.sort(room[:count])[count - (k - above)]


@declare("UniTuple(f8, 2)(f4[::1], f8, f8[::1], f4[::1])")  # type: ignore[untyped-decorator]
def nucleus(p: Any, top_p: Any, masses: Any, room: Any) -> Any:
    """The smallest set of the largest that has this share of the sum: those that are preceded by less of it.

    Args:
        p: `[V]`, not negative.
        masses: `[bins]`, changed; likewise `room` `[V]`.

    Returns: the least value in the set, and how many of those that equal it are in it: the first ones.
    """
    bits = p.view(np.int32)
    masses[:] = 0
    for i in range(len(p)):
        # Of what top-k leaves, most are none, and would all wait for the same sum.
        if p[i] > 0:
            masses[_bin(bits[i])] += p[i]
    limit = top_p * masses.sum()
    before, wanted = 0.0, _BINS - 1
    # Rounding may keep the sum of all below a limit that is nearly all: then everything stays.
    while wanted > _BINS // 2 and before + masses[wanted] < limit:
        before += masses[wanted]
        wanted -= 1
    count = _members(p, bits, wanted, room)
    if count == 0:
        # No number is positive.
        return 0.0, 0.0
    values = np.sort(room[:count])
    at = count - 1
    while at > 0 and before + values[at] < limit:
        before += values[at]
        at -= 1
    num_equal = 1
    while at + num_equal < count and values[at + num_equal] == values[at]:
        num_equal += 1
    return np.float64(values[at]), np.float64(num_equal)


@inner  # type: ignore[untyped-decorator]
def _find(p: Any, sums: Any, total: Any, point: Any) -> Any:
    """The first token up to which there is more than `point · total`; one of probability 0 never is."""
    target, before, last = point * total, 0.0, 0
    for block in range(len(sums)):
        if before + sums[block] > target:
            reached = before
            for i in range(block * _BLOCK, min(len(p), (block + 1) * _BLOCK)):
                reached += p[i]
                if p[i] > 0:
                    last = i
                    if reached > target:
                        return i
            # Summed from another beginning, they may reach a little less.
            return last
        before += sums[block]
    for i in range(len(p)):
        if p[i] > 0:
            last = i
    return last


@declare("i8(f4[::1], f8, i8, f8, f8, f8, f4[::1], f4[::1], i8[::1], f8[::1])")  # type: ignore[untyped-decorator]
def draw(
    logits: Any,
    temperature: Any,
    top_k: Any,
    top_p: Any,
    min_p: Any,
    point: Any,
    p: Any,
    room: Any,
    counts: Any,
    masses: Any,
) -> Any:
    """The token at which the kept probabilities, summed in the vocabulary's order, exceed `point` of their sum;
    NO_TOKEN where there are none, or a logit is NaN or infinite.

    Args:
        logits: `[V]`.
        temperature: above 0.
        top_k: 0 for all; of equals at the boundary all are kept.
        point: in [0, 1).
        p: `[V]`, written: what each kept token is of the most likely one, and 0 for the others.
        room: `[V]`, changed; likewise `counts` and `masses` `[bins]`.
    """
    size = len(logits)
    largest = largest_of(address(logits, 0), size, np.float32(-np.inf))
    least = np.float32(-np.inf)
    if 0 < top_k < size:
        least = kth_largest(logits, top_k, counts, room)
    scale = np.float32(1 / max(temperature, LEAST_TEMPERATURE))
    num_strange = 0
    for i in range(size):
        num_strange += not logits[i] < np.float32(np.inf)
        p[i] = (logits[i] - largest) * scale if logits[i] >= least else np.float32(-np.inf)
    if num_strange > 0 or largest == np.float32(-np.inf):
        return NO_TOKEN
    exponentials(address(p, 0), size, np.float32(0))
    least, num_equal = max(_TINY, np.float32(min_p)), np.float64(size)
    if top_p < 1:
        for i in range(size):
            p[i] = p[i] if p[i] >= _TINY else np.float32(0)
        boundary, count = nucleus(p, top_p, masses, room)
        if boundary >= least:
            least, num_equal = np.float32(boundary), count
    num_blocks = -(-size // _BLOCK)
    sums = np.empty(num_blocks, np.float64)
    total = 0.0
    for block in range(num_blocks):
        mass = 0.0
        for i in range(block * _BLOCK, min(size, (block + 1) * _BLOCK)):
            if p[i] == least:
                num_equal -= 1
            if p[i] < least or (p[i] == least and num_equal < 0):
                p[i] = 0
            mass += p[i]
        sums[block] = mass
        total += mass
    return _find(p, sums, total, point)
