"""A real Prometheus collects what `octet metrics` offers, by the file that is shipped, and answers the dashboard."""

from __future__ import annotations

import contextlib
import json
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from typing import Any

import pytest
import yaml

from cluster.launch import RunningCluster
from octet.client import Client
from tests.clusters import wait_until

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(shutil.which("prometheus") is None, reason="there is no prometheus here"),
]
MONITORING = pathlib.Path(__file__).parents[2] / "deploy" / "monitoring"
_OCTET = str(pathlib.Path(sys.executable).parent / "octet")
_ASKED_S, _END_S = 60.0, 20.0
UNANSWERED = {"octet_pool_target"}
"""Without an autoscaler."""


@contextlib.contextmanager
def _process(*command: str, **options: Any) -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen(command, text=True, **options) as process:
        try:
            yield process
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(_END_S)


@pytest.fixture(scope="module")
def prometheus(embedded: RunningCluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Its address. It collects every second."""
    folder = tmp_path_factory.mktemp("prometheus")
    config = yaml.safe_load((MONITORING / "prometheus.yaml").read_text())
    config["global"]["scrape_interval"] = "1s"
    (job,) = config["scrape_configs"]
    metrics = (_OCTET, "metrics", "--grpc", embedded.address, "--port", "0")
    with _process(*metrics, stdout=subprocess.PIPE) as offering, socket.socket() as found:
        assert offering.stdout is not None
        offered = urllib.parse.urlsplit(offering.stdout.readline().split()[-1])
        job["static_configs"] = [{"targets": [offered.netloc]}]
        (folder / "config.yaml").write_text(yaml.safe_dump(config))
        found.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{found.getsockname()[1]}"
        found.close()
        files = (f"--config.file={folder}/config.yaml", f"--storage.tsdb.path={folder}/data")
        with (
            (folder / "log").open("w") as log,
            _process("prometheus", *files, f"--web.listen-address={address}", stderr=log),
        ):
            wait_until(lambda: _answers(address, "octet_up == 1") != [], _ASKED_S, "it has collected")
            yield address


def _answers(address: str, query: str) -> list[Any]:
    """Raises: HTTPError for a query that is none."""
    asked = urllib.parse.urlencode({"query": query})
    try:
        with urllib.request.urlopen(f"http://{address}/api/v1/query?{asked}", timeout=10) as answer:
            result: list[Any] = json.load(answer)["data"]["result"]
    except urllib.error.HTTPError:
        raise
    except OSError:
        return []  # it starts
    return result


def test_every_query_of_the_dashboard_is_answered(prometheus: str, embedded: RunningCluster) -> None:
    dashboard = json.loads((MONITORING / "grafana.json").read_text())
    variables = {each["name"]: each["query"] for each in dashboard["templating"]["list"]}
    assert variables["layer"] == "label_values(octet_layer_balancedness, layer)"
    queries = [
        target["expr"].replace("$__rate_interval", "10s").replace("$layer", "1")
        for panel in dashboard["panels"]
        for target in panel.get("targets", ())
    ]
    with Client(embedded.address, timeout_s=60) as client:

        def unanswered() -> set[str]:
            client.generate("The history of bread", max_new_tokens=30, ignore_eos=True)
            return {query for query in queries if not _answers(prometheus, query)}

        wait_until(lambda: unanswered() <= UNANSWERED, _ASKED_S, "the dashboard has no empty panel")
    assert _answers(prometheus, 'octet_layer_balancedness{layer="1"}')
