from __future__ import annotations

import socket

import pytest

from cluster.launch import launch
from octet.config import load_config
from octet.errors import ConfigError


def test_an_address_at_which_nobody_listens_is_refused_at_once() -> None:
    with socket.socket() as taken:
        # Bound, so that nobody else listens there meanwhile.
        taken.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(ConfigError, match=f"'ray.address': found '{address}'.*nothing answers there"):
            launch(load_config(None, [f"ray.address={address}"]))
