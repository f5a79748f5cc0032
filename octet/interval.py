"""Which numbers a field takes, for whoever reads one: a request, a config, a checkpoint."""

from __future__ import annotations

import dataclasses
import math


@dataclasses.dataclass(frozen=True, slots=True)
class Interval:
    """The finite numbers from `low` to `high`."""

    low: float = -math.inf
    high: float = math.inf
    above_low: bool = False
    """Whether `low` is not one of them."""

    def __contains__(self, number: float) -> bool:
        return math.isfinite(number) and self.low <= number <= self.high and not (self.above_low and number == self.low)

    def __str__(self) -> str:
        """What an error says was expected."""
        if math.isfinite(self.low) and math.isfinite(self.high):
            return f"a number in {'(' if self.above_low else '['}{self.low:g}, {self.high:g}]"
        if math.isfinite(self.low):
            return f"a number {'>' if self.above_low else '≥'} {self.low:g}"
        return "a finite number"
