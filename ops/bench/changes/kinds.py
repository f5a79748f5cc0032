"""The kinds of change, the cluster that each is made to, and what it may cost."""

from __future__ import annotations

import dataclasses
from collections.abc import Awaitable, Callable, Mapping
from typing import Literal

from octet.errors import ConfigError
from ops.bench.changes.gaps import Summary
from ops.bench.changes.stage import Stage

Layout = Literal["elastic", "single copies", "replicas"]

SHORT_WINDOW = ("telemetry.window_s=1", "telemetry.step_s=0.25")
"""What few streams ask of the experts differs from one second to the next, so that there is reason to move some."""


def overrides(layout: Layout, num_experts: int) -> tuple[str, ...]:
    """Of the configuration."""
    return {
        "elastic": (*SHORT_WINDOW, f"pools.experts.redundant_experts={num_experts // 4}"),
        "single copies": ("pools.prefill.size=2", "pools.decode.size=2"),
        "replicas": (
            *SHORT_WINDOW,
            f"pools.experts.redundant_experts={num_experts}",
            "balancing.two_domains=true",
            "balancing.max_moves=1000000",
        ),
    }[layout]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Goal:
    """The most that the longest gap, or the longest wait for a first token, may be in any trial."""

    limit_s: float
    of: Literal["gap", "wait"] = "gap"
    beyond_quiet: bool = True

    def __str__(self) -> str:
        what = "to first token" if self.of == "wait" else "gap"
        return f"{what} ≤ {self.limit_s * 1e3:.0f} ms{' + quiet' if self.beyond_quiet else ''}"

    def found_s(self, summary: Summary) -> float:
        if self.of == "wait":
            return (summary.more_wait_s if self.beyond_quiet else summary.wait_s).max
        return (summary.more_gap_s if self.beyond_quiet else summary.gap_s).max

    def met(self, summary: Summary) -> bool:
        return self.found_s(summary) <= self.limit_s


async def _nothing(stage: Stage) -> None:
    pass


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    layout: Layout
    goal: Goal
    act: Callable[[Stage], Awaitable[float | None]]
    """Returns: of a loss, after how long the cluster went on without what was lost."""
    prepare: Callable[[Stage], Awaitable[None]] = _nothing
    """Before the trial begins."""


def _scale(pool: str, by: int, goal: Goal) -> Kind:
    async def prepare(stage: Stage) -> None:
        await stage.scale(pool, stage.sizes[pool] + (by < 0))

    async def act(stage: Stage) -> None:
        await stage.scale(pool, stage.sizes[pool] + max(by, 0))

    return Kind(layout="elastic", goal=goal, prepare=prepare, act=act)


def _kill(pool: str, layout: Layout, goal: Goal) -> Kind:
    return Kind(
        layout=layout,
        goal=goal,
        prepare=Stage.fill_replicas if layout == "replicas" else _nothing,
        act=lambda stage: stage.kill(pool),
    )


_JOIN = Goal(limit_s=0.1)
KINDS: Mapping[str, Kind] = {
    "rebalance": Kind(layout="elastic", goal=Goal(limit_s=0.05), prepare=Stage.find_moves, act=Stage.rebalance),
    "experts+1": _scale("experts", 1, _JOIN),
    "experts-1": _scale("experts", -1, _JOIN),
    "decode+1": _scale("decode", 1, _JOIN),
    "decode-1": _scale("decode", -1, _JOIN),
    "prefill+1": _scale("prefill", 1, _JOIN),
    "prefill-1": _scale("prefill", -1, _JOIN),
    "kill-shard": _kill("experts", "single copies", Goal(limit_s=2.0, beyond_quiet=False)),
    "kill-decode": _kill("decode", "single copies", Goal(limit_s=2.0, beyond_quiet=False)),
    "kill-prefill": _kill("prefill", "single copies", Goal(limit_s=2.0, of="wait")),
    "kill-router": Kind(layout="single copies", goal=Goal(limit_s=0.05), act=Stage.kill_router),
    "kill-replicated-shard": _kill("experts", "replicas", Goal(limit_s=0.5, beyond_quiet=False)),
}


def parse_kinds(text: str) -> tuple[str, ...]:
    """Names separated by commas; all if empty. Raises: ConfigError."""
    names = tuple(text.split(",")) if text else tuple(KINDS)
    for name in names:
        if name not in KINDS:
            raise ConfigError("bench changes --kinds", repr(name), f"one of {', '.join(KINDS)}")
    return names
