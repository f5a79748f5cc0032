"""A cluster on a Ray whose node has an IPv6 address: stores, wires, mailboxes and the API are there."""

from __future__ import annotations

import json
import os
import pathlib
import secrets
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence

import pytest

from octet.client import Client
from ops.chaos.cable import why_not
from tests.alone import own_ray, serving

HOST = "fd00:77::1"
"""Ray takes a loopback address for the machine's other one."""
pytestmark = [pytest.mark.long, pytest.mark.timeout(300), pytest.mark.skipif(bool(why_not()), reason=why_not())]


@pytest.fixture
def host() -> Iterator[str]:
    """A network namespace that has this address."""
    name = f"octet-ipv6-{os.getpid()}"

    def ip(*arguments: str) -> None:
        subprocess.run(["ip", *arguments], check=True, capture_output=True, timeout=30)

    ip("netns", "add", name)
    try:
        ip("-n", name, "link", "set", "lo", "up")
        ip("-n", name, "address", "add", f"{HOST}/128", "dev", "lo", "nodad")
        yield name
    finally:
        ip("netns", "del", name)


def test_a_cluster_serves_and_grows_over_ipv6(
    host: str, tmp_path: pathlib.Path, checkpoint: pathlib.Path, answers: Mapping[tuple[int, ...], Sequence[int]]
) -> None:
    file = tmp_path / "answers.json"
    file.write_text(json.dumps([[prompt, answer] for prompt, answer in answers.items()]))
    within = ["ip", "netns", "exec", host, sys.executable, "-m", "tests.cluster.test_ipv6"]
    done = subprocess.run(
        [*within, str(checkpoint), str(file)],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
        env={**os.environ, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(16)},
    )
    assert done.returncode == 0, f"{done.stdout}{done.stderr[-3000:]}"


def main(model_dir: str, answers_file: str) -> None:
    """A program of its own, since it is on another host."""
    fields = ["--set", f"frontend.host={HOST}", "--set", "kv.memory_gib=0.05"]
    with (
        tempfile.TemporaryDirectory() as folder,
        own_ray({}, HOST) as ray_address,
        serving(pathlib.Path(folder) / "log", "--address", ray_address, *fields, model_dir) as address,
        Client(address, timeout_s=60) as client,
    ):
        assert address.startswith(f"[{HOST}]:")
        client.scale(prefill=2, decode=2, experts=3)
        for prompt, answer in json.loads(pathlib.Path(answers_file).read_text()):
            told = client.generate(prompt, max_new_tokens=len(answer), ignore_eos=True)
            assert list(told.choices[0].token_ids) == answer


if __name__ == "__main__":
    main(*sys.argv[1:])
