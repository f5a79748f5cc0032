"""Probes name what exists, charge what the table shows, and go away again."""

from __future__ import annotations

import pkgutil

import pytest

from ops.bench.breakdown.probes import PROBES, Probe
from ops.bench.breakdown.report import GROUPS

CHARGED_BESIDES = {"engine", "send", "unpack", "rest", "experts_wait", "way_wait"}


@pytest.mark.parametrize("probe", PROBES, ids=lambda probe: f"{probe.owner}.{probe.attribute}")
def test_a_probe_names_a_function_of_the_product(probe: Probe) -> None:
    assert callable(getattr(pkgutil.resolve_name(probe.owner), probe.attribute))


def test_every_part_is_in_one_row_of_the_table() -> None:
    shown = [part for parts in GROUPS.values() for part in parts]
    charged = {probe.part for probe in PROBES} - {"exchange_wait"} | CHARGED_BESIDES
    assert sorted(shown) == sorted(charged)
