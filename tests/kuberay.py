"""What the KubeRay operator makes of the Ray cluster in `deploy/kuberay/octet.yaml`: commands and environments of pods.

By KubeRay 1.6: `setMissingRayStartParams`, `generateRayStartCommand`, `updateRayStartParamsResources` and `BuildPod` in
`ray-operator/controllers/ray/common/pod.go`.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
import re
from typing import Any

import yaml

FILE = pathlib.Path(__file__).parents[1] / "deploy" / "kuberay" / "octet.yaml"
HEAD = "head"
_GCS_PORT, _METRICS_PORT, _AGENT_PORT = 6379, 8080, 52365
_OVERWRITE = "ray.io/overwrite-container-cmd"
_UNITS = {"": 1, "Mi": 2**20, "Gi": 2**30}


def documents() -> dict[str, dict[str, Any]]:
    """By their kinds, of which each is there once."""
    found: dict[str, dict[str, Any]] = {}
    for document in yaml.safe_load_all(FILE.read_text()):
        assert found.setdefault(document["kind"], document) is document
    return found


@dataclasses.dataclass(frozen=True)
class Group:
    """The head's, or one of workers."""

    name: str
    spec: dict[str, Any]

    @property
    def replicas(self) -> int:
        count: int = 1 if self.name == HEAD else self.spec["replicas"]
        return count

    @property
    def pod(self) -> dict[str, Any]:
        """In Kubernetes' words, before the operator fills it in."""
        template = self.spec["template"]
        metadata = {"name": self.name, **template.get("metadata", {})}
        return {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": template["spec"]}

    @property
    def ray_container(self) -> dict[str, Any]:
        container: dict[str, Any] = self.pod["spec"]["containers"][0]
        return container

    @property
    def resources(self) -> dict[str, int]:
        """That a pod offers to Ray, besides CPUs and GPUs."""
        return {name: int(amount) for name, amount in self.spec.get("resources", {}).items()}

    def ray_start(self, head_address: str) -> str:
        """The command that the operator makes."""
        params: dict[str, str] = {**self.spec["rayStartParams"]}
        if self.resources:
            params["resources"] = f"'{json.dumps(self.resources)}'"
        if self.name == HEAD:
            params.setdefault("dashboard-host", "0.0.0.0")
        else:
            params["address"] = f"{head_address}:{_GCS_PORT}"
        params["metrics-export-port"] = str(_METRICS_PORT)
        params["dashboard-agent-listen-port"] = str(_AGENT_PORT)
        limits = self.ray_container["resources"]["limits"]
        params.setdefault("num-cpus", f"{quantity(limits['cpu']):.0f}")
        params["memory"] = f"{quantity(limits['memory']):.0f}"
        if "nvidia.com/gpu" in limits:
            params["num-gpus"] = limits["nvidia.com/gpu"]
        options = [f"--{name}={value}" for name, value in sorted(params.items())]
        head = ["--head"] if self.name == HEAD else []
        return " ".join(["ray", "start", *head, "--block", *options])

    def command(self, head_address: str) -> list[str]:
        """Of the Ray container, without what it finds in its environment."""
        if self.pod["metadata"].get("annotations", {}).get(_OVERWRITE) == "true":
            container = self.ray_container
            return [*container["command"], *container["args"]]
        return ["bash", "-c", "--", f"ulimit -n 65536; {self.ray_start(head_address)}"]

    def environment(self, head_address: str) -> dict[str, str]:
        """Of the Ray container: its own, and what the operator adds. The token's comes from a secret."""
        own = {variable["name"]: variable["value"] for variable in self.ray_container.get("env", [])}
        return {
            **own,
            "RAY_AUTH_MODE": documents()["RayCluster"]["spec"]["authOptions"]["mode"],
            "RAY_ADDRESS": f"{'127.0.0.1' if self.name == HEAD else head_address}:{_GCS_PORT}",
            "KUBERAY_GEN_RAY_START_CMD": self.ray_start(head_address),
        }


def groups() -> dict[str, Group]:
    """By name."""
    spec = documents()["RayCluster"]["spec"]
    workers = {group["groupName"]: Group(group["groupName"], group) for group in spec["workerGroupSpecs"]}
    return {HEAD: Group(HEAD, spec["headGroupSpec"]), **workers}


def quantity(text: str) -> float:
    """A number as Kubernetes writes it: "8", "250m", "96Gi"."""
    if text.endswith("m"):
        return float(text[:-1]) / 1000
    found = re.fullmatch(r"([\d.]+)(|Mi|Gi)", text)
    assert found, text
    return float(found[1]) * _UNITS[found[2]]
