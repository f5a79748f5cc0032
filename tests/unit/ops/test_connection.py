"""The command line against a server that speaks TLS."""

from __future__ import annotations

import asyncio
import pathlib

import grpc
import pytest
from typer.testing import CliRunner

from octet.client import CallError
from octet.errors import ConfigError
from ops.cli import app
from tests.unit.certificates import make_certificates, needs_openssl
from tests.unit.ops.played import Answering, playing

COMMAND = ["generate", "1 2", "--token-ids", "--timeout", "5"]


@needs_openssl
async def test_a_command_makes_sure_of_the_server_and_says_who_asks(tmp_path: pathlib.Path) -> None:
    keys = make_certificates(tmp_path, "server", "client")
    read = {name: (keys / name).read_bytes() for name in ("server.key", "server.pem", "client.pem")}
    chain = [(read["server.key"], read["server.pem"])]
    credentials = grpc.ssl_server_credentials(chain, read["client.pem"], require_client_auth=True)
    known = ["--tls-ca", "server.pem", "--tls-cert", "client.pem", "--tls-key", "client.key"]
    async with playing(Answering(("ab", "c")), credentials) as address:

        def run(*options: str) -> str:
            in_place = [option if option.startswith("--") else str(keys / option) for option in options]
            result = CliRunner().invoke(app, [*in_place, *COMMAND, "--grpc", address])
            if result.exception is not None:
                raise result.exception
            return result.stdout

        assert await asyncio.to_thread(run, *known) == "abc\n"
        for options in ([], known[:2]):
            with pytest.raises(CallError, match="UNAVAILABLE"):
                await asyncio.to_thread(run, *options)
        with pytest.raises(ConfigError, match=r"'tls\.ca'.*nobody\.pem"):
            await asyncio.to_thread(run, "--tls-ca", "nobody.pem")
