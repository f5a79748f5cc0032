"""The report as one HTML file that needs nothing else: `page.html` with the numbers put into it.

Shapes: `B` labels, `L` layers, `E` experts, `T` tokens, `K` experts per token.
"""

from __future__ import annotations

import json
import pathlib
from typing import Any

import numpy as np

from ops.specialise.palette import colours
from ops.specialise.report import Report, visible

_TEMPLATE = pathlib.Path(__file__).parent / "page.html"
_BITS = (0.5, 2.0)
"""As in the picture."""


def render_page(report: Report) -> str:
    # Within a script element only "</" could end it.
    data = json.dumps(_data(report), ensure_ascii=False, separators=(",", ":")).replace("</", "<\\/")
    return _TEMPLATE.read_text(encoding="utf-8").replace("__REPORT__", data)


def _data(report: Report) -> dict[str, Any]:
    specialised, prompt = report.specialised, report.prompt
    labels = zip(
        report.labels,
        colours(len(report.labels)),
        specialised.tokens_B.tolist(),
        report.documents_B,
        strict=True,
    )
    return {
        "model": report.model,
        "layers": report.layers,
        "num_experts": report.num_experts,
        "experts_per_token": report.experts_per_token,
        "labels": [
            {"name": name, "colour": colour, "tokens": tokens, "documents": documents}
            for name, colour, tokens, documents in labels
        ],
        "information": specialised.information_L.round(5).tolist(),
        "chance": specialised.chance_L.round(5).tolist(),
        "most_bits": float(np.clip(np.log2(specialised.lift_BLE.max()), *_BITS)),
        "lift": specialised.lift_BLE.round(2).transpose(1, 0, 2).tolist(),
        "share": specialised.share_LE.round(4).tolist(),
        "specialists": [
            [specialist.expert for specialist in report.specialists(layer)] for layer in range(len(report.layers))
        ],
        "triggers": [
            [[[visible(report.texts[t.token_id]), round(t.rate, 3)] for t in of_expert] for of_expert in of_layer]
            for of_layer in report.triggers
        ],
        "prompt": {
            "tokens": [
                {"shown": visible(report.texts[token_id]), "written": report.texts[token_id]}
                for token_id in prompt.token_ids
            ],
            "affinity": report.affinity_BLT.round(3).transpose(1, 0, 2).tolist(),
            "full": report.full_affinity,
            "experts": prompt.experts_LTK.tolist(),
            "weights": (prompt.weights_LTK / prompt.weights_LTK.sum(-1, keepdims=True)).round(3).tolist(),
        },
    }
