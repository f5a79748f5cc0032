"""The gRPC port with transport security, by certificates that are made for each run."""

from __future__ import annotations

import contextlib
import pathlib
from collections.abc import AsyncIterator

import pytest

from cluster.api.cluster_service import ClusterService
from cluster.api.generation_service import GenerationService
from cluster.api.grpc_service import GrpcServer
from octet.client import AsyncClient, CallError
from octet.config import FrontendConfig, TlsConfig, load_config
from octet.errors import ConfigError
from octet.tls import Tls
from tests.unit.certificates import make_certificates, needs_openssl
from tests.unit.cluster.operations import NoOperations
from tests.unit.cluster.played import PATIENT_S, playing


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A certificate of localhost, and others of a client."""
    return make_certificates(tmp_path_factory.mktemp("tls"), "server", "client", "stranger")


@contextlib.asynccontextmanager
async def serving(tls: TlsConfig) -> AsyncIterator[str]:
    async with playing() as cluster:
        server = GrpcServer(
            FrontendConfig(port=0, tls=tls),
            GenerationService(cluster.frontend, "model", 0, 10.0),
            ClusterService(NoOperations()),
        )
        try:
            yield f"127.0.0.1:{await server.start()}"
        finally:
            await server.stop(grace_s=0)


async def model_name(address: str, tls: Tls | None) -> str:
    async with AsyncClient(address, timeout_s=PATIENT_S, tls=tls) as client:
        name: str = (await client.model_info(timeout_s=5.0)).model
        return name


@needs_openssl
async def test_a_client_that_trusts_the_certificate_is_served(keys: pathlib.Path) -> None:
    config = TlsConfig(cert=str(keys / "server.pem"), key=str(keys / "server.key"))
    async with serving(config) as address:
        assert await model_name(address, Tls(ca=keys / "server.pem")) == "model"


@needs_openssl
@pytest.mark.parametrize("trusted", [None, "stranger.pem"], ids=["in the clear", "that trusts another"])
async def test_a_client_is_not_served(keys: pathlib.Path, trusted: str | None) -> None:
    config = TlsConfig(cert=str(keys / "server.pem"), key=str(keys / "server.key"))
    async with serving(config) as address:
        with pytest.raises(CallError, match="UNAVAILABLE"):
            await model_name(address, Tls(ca=keys / trusted) if trusted else None)


@needs_openssl
async def test_with_a_client_ca_a_client_has_to_show_its_certificate(keys: pathlib.Path) -> None:
    config = TlsConfig(cert=str(keys / "server.pem"), key=str(keys / "server.key"), client_ca=str(keys / "client.pem"))
    known = Tls(ca=keys / "server.pem", cert=keys / "client.pem", key=keys / "client.key")
    unknown = Tls(ca=keys / "server.pem", cert=keys / "stranger.pem", key=keys / "stranger.key")
    async with serving(config) as address:
        assert await model_name(address, known) == "model"
        for tls in (unknown, Tls(ca=keys / "server.pem")):
            with pytest.raises(CallError, match="UNAVAILABLE"):
                await model_name(address, tls)


async def test_a_file_that_is_not_there_is_named(tmp_path: pathlib.Path) -> None:
    missing = str(tmp_path / "missing.pem")
    with pytest.raises(ConfigError, match=r"'frontend\.tls\.key'.*missing\.pem"):
        async with serving(TlsConfig(cert=missing, key=missing)):
            pass


@pytest.mark.parametrize("fields", ["{cert: a}", "{key: a}", "{client_ca: a}"])
def test_half_a_configuration_is_refused(fields: str) -> None:
    with pytest.raises(ConfigError, match="come together"):
        load_config(None, [f"frontend.tls={fields}"])
