from __future__ import annotations

import os

import pytest

from octet.errors import LaneTimeoutError
from ops.chaos.observe import num_ports
from router.group import Group, GroupStore
from tests.exchange_conformance import SECRET


def test_a_group_that_nobody_else_joins_leaves_no_port_open_whoever_keeps_the_error() -> None:
    store = GroupStore.host("127.0.0.1", 5.0, SECRET)
    before = num_ports([os.getpid()])
    with pytest.raises(LaneTimeoutError, match="rank 0 of 2") as kept:
        Group(store, "alone", 0, 2, "127.0.0.1", connect_s=0.3, transfer_s=1.0)
    assert kept.value.__traceback__ is not None
    assert num_ports([os.getpid()]) == before
