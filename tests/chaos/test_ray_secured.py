"""A token and transport security between the processes of Ray."""

from __future__ import annotations

import os
import pathlib
import secrets
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import ray.util

from octet.client import Client
from tests.alone import own_ray, serving

pytestmark = [pytest.mark.long, pytest.mark.timeout(300)]
Answers = Mapping[tuple[int, ...], Sequence[int]]


def _connects(address: str, env: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
    """Whether a driver gets in, and how much of Ray is free."""
    code = """if True:
    import ray, sys
    ray.init(sys.argv[1], log_to_driver=False)
    print("connected", ray.available_resources()["CPU"], "of", ray.cluster_resources()["CPU"])
    """
    try:
        return subprocess.run(
            [sys.executable, "-c", code, address],
            env={**os.environ, **env},
            capture_output=True,
            text=True,
            timeout=45,
        )
    except subprocess.TimeoutExpired:
        return subprocess.CompletedProcess(code, 1, "", "no answer")


@pytest.fixture
def token(tmp_path: pathlib.Path) -> dict[str, str]:
    file = tmp_path / "auth_token"
    file.write_text(secrets.token_hex(32))
    return {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(file)}


@pytest.fixture
def certificates(tmp_path: pathlib.Path) -> dict[str, str]:
    """An authority, and a certificate of this host that it has signed, by the commands of docs/cluster.md."""
    if shutil.which("openssl") is None:
        pytest.skip("makes certificates with openssl")
    make = """
    openssl req -x509 -newkey rsa:2048 -nodes -days 2 -keyout ca.key -out ca.crt -subj /CN=octet-ca
    openssl req -newkey rsa:2048 -nodes -keyout node.key -out node.csr -subj /CN=octet-node
    printf 'subjectAltName=IP:%s,IP:127.0.0.1,DNS:localhost\\n' "$HOST_IP" > node.ext
    openssl x509 -req -in node.csr -CA ca.crt -CAkey ca.key -CAcreateserial -days 2 -extfile node.ext -out node.crt
    """
    env = {**os.environ, "HOST_IP": ray.util.get_node_ip_address()}
    subprocess.run(["sh", "-ec", make], cwd=tmp_path, check=True, capture_output=True, timeout=60, env=env)
    return {
        "RAY_USE_TLS": "1",
        "RAY_TLS_SERVER_CERT": str(tmp_path / "node.crt"),
        "RAY_TLS_SERVER_KEY": str(tmp_path / "node.key"),
        "RAY_TLS_CA_CERT": str(tmp_path / "ca.crt"),
    }


@pytest.mark.parametrize("secured", [(), ("certificates",)], ids=["token", "token and TLS"])
def test_a_cluster_starts_and_serves_on_a_ray_that_asks_who_comes(
    tmp_path: pathlib.Path,
    checkpoint: pathlib.Path,
    answers: Answers,
    token: dict[str, str],
    secured: tuple[str, ...],
    request: Any,
) -> None:
    env = dict(token)
    for name in secured:
        env |= request.getfixturevalue(name)
    prompt, answer = next(iter(answers.items()))
    with own_ray(env) as address:
        with (
            serving(
                tmp_path / "serve.log",
                *("--address", address, "--set", "kv.memory_gib=0.05", str(checkpoint)),
                env=env,
            ) as grpc_address,
            Client(grpc_address, timeout_s=60) as client,
        ):
            told = client.generate(list(prompt), max_new_tokens=len(answer), ignore_eos=True)
            assert list(told.choices[0].token_ids) == list(answer)
            client.scale(experts=3)
        known = _connects(address, env)
        assert "connected 8.0 of 8.0" in known.stdout, f"{known.stdout}{known.stderr}"
        stranger = {**env, "RAY_AUTH_TOKEN": "0" * 64, "RAY_AUTH_TOKEN_PATH": ""}
        assert "connected" not in _connects(address, stranger).stdout
        if secured:
            assert "connected" not in _connects(address, {**env, "RAY_USE_TLS": "0"}).stdout
