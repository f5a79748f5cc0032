"""The files under `deploy/` agree with Ray's schema, with Octet's config tree, and with each other. No Ray starts."""

from __future__ import annotations

import ipaddress
import json
import pathlib
import subprocess
from collections import Counter
from typing import Any, NamedTuple

import jsonschema
import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

from octet.config import OctetConfig, load_config
from octet.errors import ConfigError

DEPLOY = pathlib.Path(__file__).parents[3] / "deploy"
RAY_UP_FILES = ["local.yaml", "aws.yaml"]
CONFIG_FILES = ["laptop.yaml", "cluster.yaml", "gpu-node.yaml", "many-experts.yaml", "fleet.yaml"]
POOLS = ["prefill", "decode", "experts"]
START_COMMANDS = ["head_start_ray_commands", "worker_start_ray_commands"]


def ray_up_file(name: str) -> dict[str, Any]:
    tree: dict[str, Any] = yaml.safe_load((DEPLOY / "ray-up" / name).read_text())
    return tree


def resources_that_the_pools_ask_for() -> Counter[str]:
    """Custom resource -> units that every member of every pool of cluster.yaml takes together."""
    units: Counter[str] = Counter()
    pools = load_config(DEPLOY / "cluster.yaml").pools
    for pool in (getattr(pools, name) for name in POOLS):
        for resource, amount in pool.resources.items():
            units[resource] += pool.size * amount
    return units


class RayCall(NamedTuple):
    """What a start command gave to `ray`."""

    arguments: list[str]
    auth_mode: str
    resources: dict[str, float]


def run_start_commands(commands: list[str], host: str, folder: pathlib.Path) -> list[RayCall]:
    """Run them as the launcher does, on a pretended `host` where `ray` only writes down how it was called.

    Raises: CalledProcessError if a command fails.
    """
    calls = folder / "calls"
    calls.write_text("")
    stubs = {"hostname": f"echo 203.0.113.1 {host}", "ray": f"printf '%s\\0' \"$RAY_AUTH_MODE\" \"$@\" '\n' >> {calls}"}
    for name, script in stubs.items():
        (folder / name).write_text(f"#!/bin/bash\n{script}\n")
        (folder / name).chmod(0o755)
    for command in commands:
        line = f"export RAY_HEAD_IP=192.0.2.10; {command}"
        environment = {"PATH": f"{folder}:/usr/bin:/bin", "HOME": str(folder)}
        subprocess.run(["bash", "-c", f"({line})"], env=environment, check=True, capture_output=True, timeout=30)
    parsed = []
    for call in calls.read_text().split("\0\n\0")[:-1]:
        auth_mode, *arguments = call.split("\0")
        given = [argument.partition("=")[2] for argument in arguments if argument.startswith("--resources=")]
        parsed.append(RayCall(arguments, auth_mode, json.loads(given[0]) if given else {}))
    return parsed


@pytest.mark.parametrize("name", RAY_UP_FILES)
def test_ray_accepts_the_file(name: str) -> None:
    validate_config(prepare_config(ray_up_file(name)))


@pytest.mark.parametrize("name", RAY_UP_FILES)
def test_ray_refuses_the_file_with_a_misspelt_key(name: str) -> None:
    tree = ray_up_file(name)
    tree["setup_comands"] = tree.pop("setup_commands")
    with pytest.raises(jsonschema.ValidationError, match="setup_comands"):
        validate_config(prepare_config(tree))


@pytest.mark.parametrize("pool", POOLS)
def test_an_aws_node_type_offers_what_its_pool_asks_for(pool: str) -> None:
    node_type = ray_up_file("aws.yaml")["available_node_types"][pool]
    asked = getattr(load_config(DEPLOY / "cluster.yaml").pools, pool)
    offered = {resource: units * node_type["min_workers"] for resource, units in node_type["resources"].items()}
    assert offered == {resource: units * asked.size for resource, units in asked.resources.items()}


def test_the_aws_head_offers_no_pool_a_place() -> None:
    tree = ray_up_file("aws.yaml")
    assert tree["head_node_type"] == "head"
    assert tree["available_node_types"]["head"]["resources"] == {}


def test_the_aws_cluster_has_a_fixed_size() -> None:
    tree = ray_up_file("aws.yaml")
    workers = [node_type for name, node_type in tree["available_node_types"].items() if name != "head"]
    assert all(node_type["min_workers"] == node_type["max_workers"] for node_type in workers)
    assert tree["max_workers"] == sum(node_type["max_workers"] for node_type in workers)


def test_the_local_workers_together_offer_what_the_pools_ask_for(tmp_path: pathlib.Path) -> None:
    tree = ray_up_file("local.yaml")
    offered: Counter[str] = Counter()
    for host in tree["provider"]["worker_ips"]:
        _, start = run_start_commands(tree["worker_start_ray_commands"], host, tmp_path)
        offered.update(start.resources)
    assert offered == resources_that_the_pools_ask_for()


def test_a_local_worker_that_no_pool_knows_does_not_join(tmp_path: pathlib.Path) -> None:
    commands = ray_up_file("local.yaml")["worker_start_ray_commands"]
    with pytest.raises(subprocess.CalledProcessError) as failure:
        run_start_commands(commands, "192.0.2.3", tmp_path)  # a prefix of two listed addresses
    assert b"no pool for this host" in failure.value.stderr
    assert b"start" not in (tmp_path / "calls").read_bytes()


def test_local_addresses_are_documentation_only() -> None:
    provider = ray_up_file("local.yaml")["provider"]
    reserved = ipaddress.ip_network("192.0.2.0/24")
    assert all(ipaddress.ip_address(host) in reserved for host in [provider["head_ip"], *provider["worker_ips"]])


@pytest.mark.parametrize("name", RAY_UP_FILES)
@pytest.mark.parametrize("key", START_COMMANDS)
def test_every_ray_command_runs_with_token_authentication(name: str, key: str, tmp_path: pathlib.Path) -> None:
    calls = run_start_commands(ray_up_file(name)[key], "192.0.2.11", tmp_path)
    assert [(call.arguments[0], call.auth_mode) for call in calls] == [("stop", "token"), ("start", "token")]


@pytest.mark.parametrize("name", RAY_UP_FILES)
def test_the_token_reaches_every_node(name: str) -> None:
    assert ray_up_file(name)["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"


@pytest.mark.parametrize("name", RAY_UP_FILES)
def test_the_dashboard_listens_on_localhost_only(name: str, tmp_path: pathlib.Path) -> None:
    _, start = run_start_commands(ray_up_file(name)["head_start_ray_commands"], "192.0.2.10", tmp_path)
    assert "--head" in start.arguments
    assert [a for a in start.arguments if a.startswith("--dashboard-host")] == ["--dashboard-host=127.0.0.1"]


@pytest.mark.parametrize("name", RAY_UP_FILES)
def test_the_header_says_how_to_serve(name: str) -> None:
    header = (DEPLOY / "ray-up" / name).read_text().partition("\ncluster_name:")[0]
    assert "octet serve --address auto -c deploy/cluster.yaml " in header


@pytest.mark.parametrize("name", CONFIG_FILES)
def test_an_example_config_loads(name: str) -> None:
    load_config(DEPLOY / name)


def test_no_example_config_goes_untested() -> None:
    assert sorted(file.name for file in DEPLOY.glob("*.yaml")) == sorted(CONFIG_FILES)


def test_the_laptop_config_is_the_defaults_in_full() -> None:
    file = DEPLOY / "laptop.yaml"
    assert load_config(file) == OctetConfig()
    assert yaml.safe_load(file.read_text()) == OctetConfig().model_dump()


@pytest.mark.parametrize("name", CONFIG_FILES)
def test_a_misspelt_key_is_refused_with_the_nearest_name(name: str, tmp_path: pathlib.Path) -> None:
    altered = tmp_path / name
    altered.write_text((DEPLOY / name).read_text().replace("\n  prefill:\n", "\n  prefil:\n"))
    with pytest.raises(ConfigError, match=r"did you mean 'pools\.prefill'"):
        load_config(altered)


@pytest.mark.parametrize("name", RAY_UP_FILES)
def test_whatever_a_node_installs_beside_octet_is_pinned_as_well(name: str) -> None:
    """Another version may ask for what the constraints exclude, and then nothing is installed."""
    lines = (DEPLOY.parent / "constraints.txt").read_text().splitlines()
    pinned = {line.partition("==")[0] for line in lines if "==" in line}
    installs = [command for command in ray_up_file(name)["setup_commands"] if "pip install --constraint" in command]
    assert installs
    for command in installs:
        packages = command.partition("constraints.txt")[2].split()
        assert set(packages) - {"~/octet"} <= pinned
