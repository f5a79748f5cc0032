"""The command line without a cluster."""

from __future__ import annotations

import io
import pathlib
import subprocess
import sys

import pytest
from rich.console import Console

from octet.config import load_config
from octet.errors import CheckpointError, RequestError
from octet.v1 import octet_pb2 as pb
from ops.check import check
from ops.render import as_json, print_status
from ops.request import parse_prompt

OCTET = str(pathlib.Path(sys.executable).parent / "octet")


def _plain(width: int = 100) -> tuple[Console, io.StringIO]:
    out = io.StringIO()
    return Console(file=out, width=width, color_system=None), out


def test_check_prints_the_census_of_every_pool() -> None:
    console, out = _plain()
    check(load_config(overrides=["pools.experts.size=4"]), console)
    text = out.getvalue()
    assert "1,919,968, 904,160 active per token" in text
    assert "MTP head      present" in text
    assert "4 × at most 1.1 MiB" in text
    assert "2,048 bytes per token" in text


def test_check_refuses_a_directory_that_is_no_checkpoint(tmp_path: pathlib.Path) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json"):
        check(load_config(overrides=[f"model.path={tmp_path}"]))


def test_an_error_is_one_line_on_stderr_and_exit_code_1(tmp_path: pathlib.Path) -> None:
    done = subprocess.run([OCTET, "check", str(tmp_path)], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.startswith("octet: config.json: found")
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("name", ["null", "4.6", "m #1"])
def test_a_models_directory_may_have_any_name(tmp_path: pathlib.Path, name: str) -> None:
    """Not the embedded model is checked, nor a directory whose name is the beginning of this one's."""
    (tmp_path / name).mkdir()
    (tmp_path / "m").mkdir()
    command = [OCTET, "check", name]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (1, "")
    # Wherever the line was broken.
    assert f"lookin{tmp_path}/{name}".replace(" ", "") in "".join(done.stderr.split())


def test_help_names_every_command() -> None:
    done = subprocess.run([OCTET, "--help"], capture_output=True, text=True, timeout=60, check=True)
    assert all(
        command in done.stdout
        for command in ("serve", "generate", "status", "check", "demo", "bench", "experts", "chaos")
    )


@pytest.mark.parametrize("text", ["1,2,3", "1 2 3", "1, 2, 3"])
def test_token_ids_may_be_separated_by_commas_or_spaces(text: str) -> None:
    assert parse_prompt(text, token_ids=True, chat=False) == [1, 2, 3]


def test_a_chat_prompt_is_a_users_message() -> None:
    assert parse_prompt("hi", token_ids=False, chat=True) == [("user", "hi")]


def test_token_ids_that_are_no_numbers_are_refused() -> None:
    with pytest.raises(RequestError, match="'one'"):
        parse_prompt("one", token_ids=True, chat=False)


def _status() -> pb.GetStatusResponse:
    member = pb.Member(
        worker_id="prefill-0",
        node_id="0123456789abcdef",
        state="READY",
        pid=1234567,
        kv_pages_total=16384,
        kv_pages_free=16383,
        resident_bytes=1600 * 2**20,
        running=10,
        waiting=10,
        tokens=30_000,
        cached_tokens=10_000,
    )
    return pb.GetStatusResponse(
        state="READY",
        pools=[pb.Pool(name="prefill", members=[member])],
        expert_counts=[pb.ExpertCounts(layer=1, tokens=[0, 5, 10], balancedness=0.5)],
    )


def test_the_status_page_fits_eighty_columns() -> None:
    console, out = _plain(width=80)
    print_status(_status(), console)
    assert "…" not in out.getvalue()
    assert out.getvalue().splitlines()[3].split() == [
        *("prefill-0", "READY", "012345", "1234567", "1600", "16383/16384", "10", "10", "30000", "25%"),
    ]
    assert max(map(len, out.getvalue().splitlines())) <= 80


def test_the_status_page_shows_the_share_of_drafts_that_were_accepted() -> None:
    status = _status()
    member = pb.Member(worker_id="decode-0", state="READY", drafted_tokens=200, accepted_tokens=150)
    status.pools.append(pb.Pool(name="decode", members=[member]))
    console, out = _plain()
    print_status(status, console)
    assert out.getvalue().splitlines()[4].split()[-1] == "75%"


def test_an_experts_bar_is_its_share_of_the_busiest() -> None:
    console, out = _plain()
    print_status(_status(), console)
    assert " ▄█" in out.getvalue()
    assert "2 (10)" in out.getvalue()


def test_json_has_fields_that_are_zero() -> None:
    assert '"live_requests": 0' in as_json(_status())
