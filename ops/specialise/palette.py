"""One colour per label, the same in the text, the picture and the page."""

from __future__ import annotations

import colorsys

_OKABE_ITO = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#d55e00", "#56b4e9", "#b8a800", "#7f7f7f")
"""Told apart by people who see colours differently (Okabe and Ito, 2008); the yellow is darkened for white paper."""


def colours(num_labels: int) -> list[str]:
    """As `#rrggbb`; beyond the eighth they are spread around the circle of hues."""
    if num_labels <= len(_OKABE_ITO):
        return list(_OKABE_ITO[:num_labels])
    around = [colorsys.hls_to_rgb(index / num_labels, 0.45, 0.7) for index in range(num_labels)]
    return ["#" + "".join(f"{round(255 * channel):02x}" for channel in rgb) for rgb in around]


def blended(colour: str, strength: float, background: str = "#ffffff") -> str:
    """The colour over a background; strength 0 is the background."""
    mixed = [
        round(int(below, 16) + (int(above, 16) - int(below, 16)) * min(max(strength, 0.0), 1.0))
        for above, below in zip(_channels(colour), _channels(background), strict=True)
    ]
    return "#" + "".join(f"{channel:02x}" for channel in mixed)


def _channels(colour: str) -> tuple[str, str, str]:
    return colour[1:3], colour[3:5], colour[5:7]
