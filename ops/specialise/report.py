"""The report as a value: what the text, the picture and the page show.

Shapes: `L` layers, `E` experts, `T` tokens, `K` experts per token, `B` labels, `D` documents.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from model.tokenizer import Tokenizer
from ops.specialise.corpus import Document
from ops.specialise.measure import (
    Specialisation,
    Trigger,
    affinities,
    count_experts,
    specialisation,
    triggers,
)
from ops.specialise.observe import Observer, Routing

PROMPT = (
    'The clock in the hall struck four. "Are you coming?" she asked.\n'
    "def area(r): return 3.14 * r ** 2\n"
    '{"name": "circle", "sides": 0, "tags": ["round"]}\n'
    "Hence x^2 + y^2 = r^2. Der Kreis ist rund."
)
"""A bit of everything, for whoever has no prompt at hand."""
_TRIGGERS = 6
_LEAST_AFFINITY = 0.1
_LEAST_CHOSEN = 20
"""Tokens of an expert below which its specialisation is left to chance."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Specialist:
    """An expert, and the label whose tokens it sees more than its share of."""

    layer: int
    """Index of the layer among those with experts."""
    expert: int
    label: int
    lift: float
    share: float
    """Of all tokens, labels weighing alike, those that go to it."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    model: str
    layers: tuple[int, ...]
    """The decoder layers with experts."""
    num_experts: int
    experts_per_token: int
    documents_B: tuple[int, ...]
    specialised: Specialisation
    chosen_LE: npt.NDArray[np.int64]
    """How many tokens chose each expert."""
    triggers: tuple[tuple[tuple[Trigger, ...], ...], ...]
    """By layer and expert."""
    texts: dict[int, str]
    """Tokens that occur, as they are written."""
    prompt: Routing
    affinity_BLT: npt.NDArray[np.float64]
    """Of the prompt's tokens; see `affinities`."""

    @property
    def labels(self) -> tuple[str, ...]:
        return self.specialised.labels

    @property
    def full_affinity(self) -> float:
        """Affinities from here on are drawn in full colour: the strongest of the prompt but for a few."""
        return max(_LEAST_AFFINITY, float(np.quantile(self.affinity_BLT.max(0), 0.98)))

    def specialists(self, layer: int) -> list[Specialist]:
        """The experts of a layer that were seen often enough, the most specialised first."""
        lift_BE, share_E = self.specialised.lift_BLE[:, layer], self.specialised.share_LE[layer]
        found = [
            Specialist(
                layer=layer,
                expert=expert,
                label=int(lift_BE[:, expert].argmax()),
                lift=float(lift_BE[:, expert].max()),
                share=float(share_E[expert]),
            )
            for expert in range(self.num_experts)
            if self.chosen_LE[layer, expert] >= _LEAST_CHOSEN
        ]
        return sorted(found, key=lambda specialist: (-specialist.lift, specialist.expert))


def make_report(
    model: str,
    observer: Observer,
    documents: Sequence[Document],
    prompt: str,
    rng: np.random.Generator,
    progress: Callable[[int], None] = lambda done: None,
) -> Report:
    """Run every document and the prompt through the model.

    Args:
        rng: shuffles labels, to tell what is chance.
        progress: told how many documents are done.
    """
    config = observer.config
    num_experts = config.n_routed_experts
    routings = []
    for done, document in enumerate(documents):
        progress(done)
        routings.append(observer.observe(document.text))
    counts_DLE = np.stack([count_experts(routing.experts_LTK, num_experts) for routing in routings])
    tokens_D = np.array([len(routing.token_ids) for routing in routings])
    labels_D = [document.label for document in documents]
    specialised = specialisation(labels_D, tokens_D, counts_DLE, rng)
    token_ids_T = np.concatenate([routing.token_ids for routing in routings])
    experts_LTK = np.concatenate([routing.experts_LTK for routing in routings], axis=1)
    asked = observer.observe(prompt)
    per_label = collections.Counter(labels_D)
    return Report(
        model=model,
        layers=tuple(config.moe_layers),
        num_experts=num_experts,
        experts_per_token=config.num_experts_per_tok,
        documents_B=tuple(per_label[label] for label in specialised.labels),
        specialised=specialised,
        chosen_LE=counts_DLE.sum(0),
        triggers=tuple(
            tuple(map(tuple, triggers(token_ids_T, experts_TK, num_experts, _TRIGGERS))) for experts_TK in experts_LTK
        ),
        texts=_texts(observer.tokenizer, {*token_ids_T.tolist(), *asked.token_ids}),
        prompt=asked,
        affinity_BLT=affinities(specialised, asked.experts_LTK, asked.weights_LTK),
    )


def _texts(tokenizer: Tokenizer, token_ids: set[int]) -> dict[int, str]:
    """Single tokens as text; those that are a part of a character only are shown in the vocabulary's own writing."""
    texts = {}
    for token_id in token_ids:
        text = tokenizer.decode([token_id], keep_special_tokens=True)
        texts[token_id] = (tokenizer.visible_token(token_id) or text) if "\ufffd" in text else text
    return texts


def visible(text: str) -> str:
    """One token on one line, with its spaces to be seen."""
    return text.replace(" ", "·").replace("\n", "↵").replace("\t", "⇥") or "∅"
