from __future__ import annotations

import pytest

from octet.config import load_config
from octet.errors import ConfigError
from ops.bench.changes.gaps import Answer, Summary, Window, Windows, summarize
from ops.bench.changes.kinds import KINDS, Goal, Layout, overrides, parse_kinds


def summary(gap_s: float, quiet_gap_s: float, first_s: float = 0.5) -> Summary:
    """Of one trial with these gaps."""
    begin_s = first_s + gap_s
    windows = Windows(
        before=Window(0.0, 0.1),
        during=Window(0.1, begin_s),
        quiet=Window(begin_s, begin_s + quiet_gap_s),
        duration_s=1.0,
        recovered_s=None,
        others=0.0,
        quiet_others=0.0,
    )
    return summarize([windows.trial([Answer(sent_s=0.0, times_s=[first_s, begin_s, begin_s + quiet_gap_s])])])


def test_a_goal_beyond_quiet_is_for_the_difference() -> None:
    assert Goal(limit_s=0.5).met(summary(1.0, 0.75))
    assert not Goal(limit_s=0.5).met(summary(1.5, 0.75))


def test_an_absolute_goal_does_not_look_at_quiet() -> None:
    assert not Goal(limit_s=0.5, beyond_quiet=False).met(summary(1.0, 0.75))
    assert Goal(limit_s=1.0, beyond_quiet=False).met(summary(1.0, 0.0))


def test_a_goal_for_the_first_token_does_not_look_at_gaps() -> None:
    goal = Goal(limit_s=1.0, of="wait")
    assert goal.met(summary(3.0, 0.5, first_s=1.0))
    assert not goal.met(summary(0.25, 0.25, first_s=1.5))


def test_a_goal_says_what_it_is() -> None:
    assert str(Goal(limit_s=0.05)) == "gap ≤ 50 ms + quiet"
    assert str(Goal(limit_s=2.0, of="wait", beyond_quiet=False)) == "to first token ≤ 2000 ms"


def test_all_kinds_are_measured_if_none_is_named() -> None:
    assert parse_kinds("") == tuple(KINDS)
    assert parse_kinds("rebalance,kill-shard") == ("rebalance", "kill-shard")


def test_an_unknown_kind_is_named() -> None:
    with pytest.raises(ConfigError, match="kill-frontend"):
        parse_kinds("rebalance,kill-frontend")


@pytest.mark.parametrize("layout", sorted({kind.layout for kind in KINDS.values()}))
def test_every_layout_is_a_configuration(layout: Layout) -> None:
    config = load_config(overrides=list(overrides(layout, 32)))
    assert config.pools.experts.size == 2
    assert config.pools.experts.redundant_experts == {"elastic": 8, "single copies": 0, "replicas": 32}[layout]
