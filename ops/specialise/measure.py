"""How far experts are specialised, from which experts the tokens of labelled documents chose.

Shapes: `D` documents, `B` labels, `L` layers, `E` experts, `T` tokens, `K` experts per token, `V` different tokens.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

_SHUFFLES = 20
_LEAST_SEEN = 3
"""A token that an expert saw less often says nothing about it."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Specialisation:
    labels: tuple[str, ...]
    tokens_B: npt.NDArray[np.int64]
    share_BLE: Floats
    """Of a label's tokens, those that go to the expert (OLMoE, arXiv 2409.02060, §5.3, "domain specialization")."""
    information_L: Floats
    """What the choice of one expert tells about the label: their mutual information ÷ the entropy of the labels, all
    labels alike (Theil's uncertainty coefficient). 0 is nothing, 1 everything."""
    chance_L: Floats
    """The same with the labels shuffled among the documents: what experts tell about single documents anyway."""

    @property
    def share_LE(self) -> Floats:
        """Of all tokens, labels weighing alike, those that go to the expert."""
        share_LE: Floats = self.share_BLE.mean(0)
        return share_LE

    @property
    def lift_BLE(self) -> Floats:
        """How much more often a label's tokens go to the expert than those of all labels; 1 where none ever do."""
        share_1LE = self.share_LE[None]
        lift_BLE: Floats = np.divide(self.share_BLE, share_1LE, out=np.ones_like(self.share_BLE), where=share_1LE > 0)
        return lift_BLE


def count_experts(experts_LTK: npt.NDArray[np.integer], num_experts: int) -> npt.NDArray[np.int64]:
    """How many tokens chose each expert, `[L, E]`."""
    num_layers = len(experts_LTK)
    flat = experts_LTK.reshape(num_layers, -1).astype(np.int64) + num_experts * np.arange(num_layers)[:, None]
    return np.bincount(flat.ravel(), minlength=num_layers * num_experts).reshape(num_layers, num_experts)


def specialisation(
    labels_D: Sequence[str],
    tokens_D: npt.NDArray[np.int64],
    counts_DLE: npt.NDArray[np.int64],
    rng: np.random.Generator,
) -> Specialisation:
    """
    Args:
        tokens_D: tokens of each document, one at least.
        counts_DLE: those that chose each expert.
        rng: shuffles labels.
    """
    labels = tuple(sorted(set(labels_D)))
    of_D = np.array([labels.index(label) for label in labels_D])
    tokens_B, share_BLE = _shares(of_D, len(labels), tokens_D, counts_DLE)
    shuffled = [
        _information(_shares(rng.permutation(of_D), len(labels), tokens_D, counts_DLE)[1]) for _ in range(_SHUFFLES)
    ]
    return Specialisation(
        labels=labels,
        tokens_B=tokens_B,
        share_BLE=share_BLE,
        information_L=_information(share_BLE),
        chance_L=np.mean(shuffled, axis=0),
    )


def _shares(
    of_D: npt.NDArray[np.integer], num_labels: int, tokens_D: npt.NDArray[np.int64], counts_DLE: npt.NDArray[np.int64]
) -> tuple[npt.NDArray[np.int64], Floats]:
    member_BD = of_D == np.arange(num_labels)[:, None]
    tokens_B = member_BD @ tokens_D
    counts_BLE = np.tensordot(member_BD.astype(np.int64), counts_DLE, axes=1)
    share_BLE: Floats = counts_BLE / tokens_B[:, None, None]
    return tokens_B, share_BLE


def _information(share_BLE: Floats) -> Floats:
    """Mutual information of label and expert ÷ entropy of the label, by layer."""
    joint_BLE = share_BLE / share_BLE.sum((0, 2), keepdims=True)
    expected_BLE = joint_BLE.sum(0, keepdims=True) * joint_BLE.sum(2, keepdims=True)
    ratio_BLE = np.divide(joint_BLE, expected_BLE, out=np.ones_like(joint_BLE), where=joint_BLE > 0)
    information_L: Floats = (joint_BLE * np.log(ratio_BLE)).sum((0, 2)) / np.log(len(share_BLE))
    return information_L


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Trigger:
    """A token that an expert sees more often than chance would have it."""

    token_id: int
    seen: int
    """How often the expert was chosen for it."""
    rate: float
    """Of the token's occurrences."""


def triggers(
    token_ids_T: npt.NDArray[np.integer], experts_TK: npt.NDArray[np.integer], num_experts: int, most: int
) -> list[list[Trigger]]:
    """For each expert of one layer, the tokens that it responds to most, at most so many.

    Ranked by Dunning's log-likelihood ratio (Computational Linguistics 19, 1993) of the token among what the expert saw
    against what it did not: how often and how selectively both count. Only tokens above their expected rate.
    """
    kinds_V, index_T = np.unique(token_ids_T, return_inverse=True)
    seen_VE = np.bincount(
        (index_T[:, None] * num_experts + experts_TK).ravel(), minlength=len(kinds_V) * num_experts
    ).reshape(len(kinds_V), num_experts)
    total_V1 = np.bincount(index_T, minlength=len(kinds_V))[:, None]
    seen_1E = seen_VE.sum(0, keepdims=True)
    score_VE = _log_likelihood(seen_VE, total_V1, seen_1E, len(token_ids_T))
    attracted_VE = (seen_VE * len(token_ids_T) > total_V1 * seen_1E) & (seen_VE >= _LEAST_SEEN)
    score_VE = np.where(attracted_VE, score_VE, -np.inf)
    order_VE = np.argsort(-score_VE, axis=0, kind="stable")[:most]
    return [
        [
            Trigger(
                token_id=int(kinds_V[kind]),
                seen=int(seen_VE[kind, expert]),
                rate=float(seen_VE[kind, expert] / total_V1[kind, 0]),
            )
            for kind in order_VE[:, expert].tolist()
            if attracted_VE[kind, expert]
        ]
        for expert in range(num_experts)
    ]


def _log_likelihood(
    seen_VE: npt.NDArray[np.integer],
    total_V1: npt.NDArray[np.integer],
    seen_1E: npt.NDArray[np.integer],
    num_tokens: int,
) -> Floats:
    """G² of the tables (this token or another) × (this expert chosen or not)."""
    others_VE = seen_1E - seen_VE
    cells = (
        (seen_VE, total_V1 * seen_1E),
        (total_V1 - seen_VE, total_V1 * (num_tokens - seen_1E)),
        (others_VE, (num_tokens - total_V1) * seen_1E),
        (num_tokens - total_V1 - others_VE, (num_tokens - total_V1) * (num_tokens - seen_1E)),
    )
    score_VE: Floats = np.zeros(seen_VE.shape)
    for observed, expected in cells:
        ratio = np.divide(observed * num_tokens, expected, out=np.ones(seen_VE.shape), where=observed > 0)
        score_VE += 2 * observed * np.log(ratio)
    return score_VE


def affinities(
    specialised: Specialisation, experts_LTK: npt.NDArray[np.integer], weights_LTK: npt.NDArray[np.floating]
) -> Floats:
    """For which label each token's experts are specialists, `[B, L, T]`: the mean over its experts, by the weights that
    the gate gave them, of the lift's logarithm to base 2, bounded by ±4."""
    bits_BLE = np.log2(np.clip(specialised.lift_BLE, 1 / 16, 16))
    share_LTK = weights_LTK / weights_LTK.sum(-1, keepdims=True)
    rows_L = np.arange(len(experts_LTK))[:, None, None]
    affinity_BLT: Floats = (bits_BLE[:, rows_L, experts_LTK] * share_LTK).sum(-1)
    return affinity_BLT
