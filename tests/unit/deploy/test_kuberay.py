"""The files for Kubernetes agree with its schema, with KubeRay's fields, with Octet's config and with each other.

No Kubernetes starts. `tests/cluster/test_kuberay.py` runs the pods' commands.
"""

from __future__ import annotations

import copy
import pathlib
import subprocess
import tomllib
from typing import Any

import jsonschema
import kubernetes_validate
import pytest

from octet.config import OctetConfig, load_config
from tests.kuberay import FILE, HEAD, Group, documents, groups, quantity

ROOT = FILE.parents[2]
CONFIG = "deploy/cluster.yaml"
GROUPS = groups()
POOLS = ["prefill", "decode", "experts"]


def _fields(**fields: Any) -> dict[str, Any]:
    return {"type": "object", "properties": fields, "additionalProperties": False, "required": list(fields)}


_TEXTS = {"type": "object", "additionalProperties": {"type": "string"}}
_GROUP = {"rayStartParams": _TEXTS, "template": {"type": "object"}}
_WORKERS = _fields(
    groupName={"type": "string"},
    **{key: {"type": "integer"} for key in ("replicas", "minReplicas", "maxReplicas")},
    resources=_TEXTS,
    **_GROUP,
)
_WORKERS["required"].remove("resources")
RAY_CLUSTER = _fields(
    apiVersion={"const": "ray.io/v1"},
    kind={"const": "RayCluster"},
    metadata=_fields(name={"type": "string"}),
    spec=_fields(
        rayVersion={"type": "string"},
        authOptions=_fields(mode={"enum": ["disabled", "token"]}),
        headGroupSpec=_fields(**_GROUP),
        workerGroupSpecs={"type": "array", "items": _WORKERS},
    ),
)
"""Of the fields in KubeRay's reference of its API, those that are used here."""


@pytest.fixture(scope="module")
def config() -> OctetConfig:
    return load_config(ROOT / CONFIG)


def by_kubernetes(document: dict[str, Any]) -> None:
    """Raises: ValidationError. A field that it doesn't know is one too."""
    kubernetes_validate.validate(document, kubernetes_validate.latest_version(), strict=True)


@pytest.mark.parametrize("kind", ["Service", "NetworkPolicy"])
def test_kubernetes_accepts_what_is_its_own(kind: str) -> None:
    by_kubernetes(documents()[kind])


@pytest.mark.parametrize("group", GROUPS.values(), ids=list(GROUPS))
def test_kubernetes_accepts_a_groups_pods(group: Group) -> None:
    by_kubernetes(group.pod)


def test_a_misspelt_field_of_a_pod_is_refused() -> None:
    pod = copy.deepcopy(GROUPS["prefill"].pod)
    pod["spec"]["containers"][0]["volumeMount"] = pod["spec"]["containers"][0].pop("volumeMounts")
    with pytest.raises(Exception, match="volumeMount"):
        by_kubernetes(pod)


def test_the_ray_cluster_has_kuberays_fields_only() -> None:
    jsonschema.validate(documents()["RayCluster"], RAY_CLUSTER)


@pytest.mark.parametrize("pool", POOLS)
def test_a_group_offers_what_its_pool_asks_for(pool: str, config: OctetConfig) -> None:
    group, asked = GROUPS[pool], getattr(config.pools, pool)
    offered = {resource: units * group.replicas for resource, units in group.resources.items()}
    assert offered == {resource: units * asked.size for resource, units in asked.resources.items()}
    (units,) = group.resources.values()
    limits = group.ray_container["resources"]["limits"]
    assert units * asked.num_gpus == quantity(limits["nvidia.com/gpu"])
    assert units * asked.num_cpus <= quantity(limits["cpu"])


def test_no_pool_finds_a_place_elsewhere() -> None:
    for group in GROUPS.values():
        if group.name not in POOLS:
            assert group.resources == {}
            assert "--num-cpus=0" in group.ray_start("head").split()


def test_the_cluster_has_a_fixed_size() -> None:
    workers = [group.spec for group in GROUPS.values() if group.name != HEAD]
    assert all(spec["minReplicas"] == spec["replicas"] == spec["maxReplicas"] for spec in workers)


def test_every_container_has_the_image_of_this_version() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    images = {container["image"] for group in GROUPS.values() for container in group.pod["spec"]["containers"]}
    assert images == {f"{project['name']}:{project['version']}"}
    pins = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
    assert documents()["RayCluster"]["spec"]["rayVersion"] == pins["ray"]


def test_every_pod_that_loads_the_model_has_its_volume() -> None:
    for group in GROUPS.values():
        mounts = group.ray_container.get("volumeMounts", [])
        assert [mount["mountPath"] for mount in mounts] == ([] if group.name == HEAD else ["/models"])
        volumes = {volume["name"] for volume in group.pod["spec"].get("volumes", [])}
        assert {mount["name"] for mount in mounts} <= volumes
    environment = GROUPS["serve"].environment("head")
    assert environment["MODEL"].startswith("/models/")


def test_the_config_is_in_the_image() -> None:
    docker = (FILE.parent / "Dockerfile").read_text()
    assert "WORKDIR /opt/octet\nCOPY . .\n" in docker
    assert GROUPS["serve"].environment("head")["CONFIG"] == f"/opt/octet/{CONFIG}"


def test_the_image_gets_all_that_is_installed() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    let_in = {
        line[1:] for line in (FILE.parent / "Dockerfile.dockerignore").read_text().splitlines() if line.startswith("!")
    }
    packages = {pattern.rstrip("*") for pattern in project["tool"]["setuptools"]["packages"]["find"]["include"]}
    files = {"pyproject.toml", "constraints.txt", project["project"]["readme"], *project["project"]["license-files"]}
    assert packages | files | {"deploy"} == let_in
    assert all((ROOT / name).exists() for name in let_in)


def test_the_serving_container_joins_ray_and_then_becomes_octet(tmp_path: pathlib.Path) -> None:
    calls = tmp_path / "calls"
    for name in ("ray", "octet"):
        (tmp_path / name).write_text(f"#!/bin/bash\nprintf '%s\\0' {name} \"$@\" '\n' >> {calls}\n")
        (tmp_path / name).chmod(0o755)
    serve = GROUPS["serve"]
    tini, dashes, *command = serve.command("octet-head-svc")
    assert (tini, dashes) == ("tini", "--")
    environment = {**serve.environment("octet-head-svc"), "PATH": f"{tmp_path}:/usr/bin:/bin"}
    subprocess.run(command, env=environment, check=True, capture_output=True, timeout=30)
    joins, serves = [call.split("\0") for call in calls.read_text().split("\0\n\0")[:-1]]
    assert joins[:2] == ["ray", "start"]
    assert "--block" not in joins, "it would never come to the next line"
    assert set(joins[2:]) == set(serve.ray_start("octet-head-svc").split()[2:]) - {"--block"}
    assert serves == ["octet", "serve", "--address", "auto", "-c", environment["CONFIG"], environment["MODEL"]]


def test_octet_is_not_started_where_ray_is_not(tmp_path: pathlib.Path) -> None:
    for name, script in {"ray": "exit 1", "octet": f"touch {tmp_path}/served"}.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{script}\n")
        (tmp_path / name).chmod(0o755)
    serve = GROUPS["serve"]
    environment = {**serve.environment("head"), "PATH": f"{tmp_path}:/usr/bin:/bin"}
    done = subprocess.run(serve.command("head")[2:], env=environment, capture_output=True, timeout=30, check=False)
    assert done.returncode == 1
    assert not (tmp_path / "served").exists()


def test_resources_come_through_the_shell_as_they_are() -> None:
    """In the command that KubeRay runs, and where `eval` runs it."""
    command = GROUPS["experts"].ray_start("head")
    script = 'ray() { printf "%s\\n" "$@"; }; eval "${GENERATED/--block/}"'
    done = subprocess.run(
        ["bash", "-euc", script], env={"GENERATED": command}, capture_output=True, check=True, timeout=30
    )
    assert b'--resources={"octet_experts": 8}' in done.stdout.splitlines()


def test_the_service_and_the_policy_reach_the_pods(config: OctetConfig) -> None:
    name = documents()["RayCluster"]["metadata"]["name"]
    ports = {
        port["name"]: port["containerPort"]
        for container in GROUPS["serve"].pod["spec"]["containers"]
        for port in container["ports"]
    }
    assert ports == {"grpc": config.frontend.port, "metrics-octet": 9464}
    service = documents()["Service"]["spec"]
    assert service["selector"] == {"ray.io/cluster": name, "ray.io/group": "serve"}
    assert {port["targetPort"]: port["port"] for port in service["ports"]} == ports
    policy = documents()["NetworkPolicy"]["spec"]
    among, offered = policy["ingress"]
    assert policy["podSelector"] == among["from"][0]["podSelector"] == {"matchLabels": {"ray.io/cluster": name}}
    assert [port["port"] for port in offered["ports"]] == list(ports)


def test_a_pod_that_serves_is_ready_when_it_answers_and_has_time_to_end(config: OctetConfig) -> None:
    pod = GROUPS["serve"].pod["spec"]
    assert pod["containers"][0]["readinessProbe"]["grpc"] == {"port": config.frontend.port}
    assert pod["terminationGracePeriodSeconds"] >= config.frontend.drain_s + 15, "drained, actors end"
    assert config.frontend.host == "0.0.0.0"
