"""Clusters whose members are played."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """No process of this machine is killed for a played one."""
    monkeypatch.setattr("cluster.control.membership.node_id", lambda: "another")
