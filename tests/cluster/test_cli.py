"""The command line against a running cluster."""

from __future__ import annotations

import json
import pathlib
import subprocess
import sys
from collections.abc import Callable

import pytest

from cluster.launch import RunningCluster
from octet.client import Client

Run = Callable[..., subprocess.CompletedProcess[str]]
_OCTET = str(pathlib.Path(sys.executable).parent / "octet")


@pytest.fixture
def octet(embedded: RunningCluster) -> Run:
    def run(*args: str) -> subprocess.CompletedProcess[str]:
        command = [_OCTET, *args, "--grpc", embedded.address]
        return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)

    return run


def test_generate_prints_the_text_that_the_api_gives(octet: Run, client: Client) -> None:
    expected = client.generate("A quiet morning", max_new_tokens=8).choices[0].text
    assert octet("generate", "A quiet morning", "--max-new-tokens", "8").stdout == expected + "\n"
    assert octet("generate", "A quiet morning", "--max-new-tokens", "8", "--stream").stdout == expected + "\n"


def test_generate_takes_token_ids_and_prints_json(octet: Run, client: Client) -> None:
    expected = client.generate([5, 6, 7], max_new_tokens=4).choices[0].token_ids
    done = octet("generate", "5,6,7", "--token-ids", "--json", "--max-new-tokens", "4")
    assert json.loads(done.stdout)["choices"][0]["token_ids"] == list(expected)


def test_a_refused_request_is_exit_code_1(octet: Run) -> None:
    done = octet("generate", "x", "--top-p", "7")
    assert done.returncode == 1
    assert "sampling.top_p" in done.stderr


def test_status_shows_members_and_experts(octet: Run) -> None:
    assert all(name in octet("status").stdout for name in ("prefill-0", "decode-0", "experts-1", "balancedness"))
    status = json.loads(octet("status", "--json").stdout)
    assert [len(counts["tokens"]) for counts in status["expert_counts"]] == [32, 32, 32]
