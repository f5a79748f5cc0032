"""What `octet generate` prints, of a server that is played."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from typer.testing import CliRunner

from octet.client import Client
from octet.errors import RequestError
from ops.cli import app
from ops.request import run
from tests.unit.ops.played import Answering, playing

LATE_TEXT = ("", "é", "", " and", "")
"""A character comes in two tokens, and the last token says nothing."""


async def printed(
    answering: Answering, capsys: pytest.CaptureFixture[str], *, stream: bool, as_json: bool = False, **options: Any
) -> str:
    def ask(address: str) -> None:
        with Client(address, timeout_s=20.0) as client:
            run(client, [1, 2], options, stream=stream, as_json=as_json)

    async with playing(answering) as address:
        await asyncio.to_thread(ask, address)
    return capsys.readouterr().out


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("pieces", [LATE_TEXT, ("", "")])
async def test_text_that_is_empty_is_not_token_ids(
    pieces: tuple[str, ...], stream: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    assert await printed(Answering(pieces), capsys, stream=stream) == "".join(pieces) + "\n"


@pytest.mark.parametrize("stream", [False, True])
async def test_token_ids_are_printed_where_there_is_no_tokenizer(
    stream: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    out = await printed(Answering(("a", "b", "c"), has_tokenizer=False), capsys, stream=stream)
    assert out.split() == ["7", "8", "9"]
    assert out.endswith("\n")


async def test_choices_are_told_apart(capsys: pytest.CaptureFixture[str]) -> None:
    assert await printed(Answering(("a", "b")), capsys, stream=False, n=2) == "[0] ab\n[1] ab\n"
    told = await printed(Answering(("a", "b")), capsys, stream=True, as_json=True, n=2)
    decoder, at, indices = json.JSONDecoder(), 0, []
    while at < len(told):
        chunk, at = decoder.raw_decode(told, at)
        indices.append(chunk["index"])
        at += 1
    assert sorted(indices) == [0] * 3 + [1] * 3


async def test_several_choices_in_one_stream_of_text_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    answering = Answering()
    with pytest.raises(RequestError, match=r"'n': found 2, expected 1 with --stream; with --json"):
        await printed(answering, capsys, stream=True, n=2)
    assert answering.prompts == []


async def test_log_probabilities_are_told_as_json_alone(capsys: pytest.CaptureFixture[str]) -> None:
    answering = Answering()
    with pytest.raises(RequestError, match=r"'logprobs': found 0, expected none without --json"):
        await printed(answering, capsys, stream=False, logprobs=0)
    await printed(answering, capsys, stream=False, as_json=True, logprobs=0)
    assert [request.output.HasField("logprobs") for request in answering.requests] == [True]


async def test_every_option_of_the_command_line_is_in_the_request() -> None:
    sampling = {"temperature": 0.5, "top_p": 0.75, "top_k": 9, "min_p": 0.25, "seed": 5, "n": 1}
    sampling |= {"repetition_penalty": 1.5, "presence_penalty": -0.5, "frequency_penalty": 0.125}
    stopping = {"max_new_tokens": 4, "min_new_tokens": 2}
    words = [f"--{name.replace('_', '-')}={value}" for name, value in {**sampling, **stopping}.items()]
    words += ["--ignore-eos", "--stop=x", "--stop=yz", "--json", "--logprobs=3", "--priority=-7", "--timeout=20"]
    answering = Answering()
    async with playing(answering) as address:
        command = ["generate", "1 2", "--token-ids", "--grpc", address, *words]
        result = await asyncio.to_thread(CliRunner().invoke, app, command)
    assert result.exit_code == 0, result.output
    (request,) = answering.requests
    assert {name: getattr(request.sampling, name) for name in sampling} == sampling
    assert {name: getattr(request.stopping, name) for name in stopping} == stopping
    assert (request.stopping.ignore_eos, list(request.stopping.stop)) == (True, ["x", "yz"])
    assert (request.output.logprobs, request.priority) == (3, -7)


async def test_an_option_that_is_not_given_is_left_to_the_server() -> None:
    answering = Answering()
    async with playing(answering) as address:
        command = ["generate", "1 2", "--token-ids", "--grpc", address, "--timeout=20"]
        result = await asyncio.to_thread(CliRunner().invoke, app, command)
    assert result.exit_code == 0, result.output
    (request,) = answering.requests
    given = [
        field.name for part in (request.sampling, request.stopping, request.output) for field, _ in part.ListFields()
    ]
    # The client's own, so that a lost connection changes no token.
    assert given == ["seed"]
    assert request.priority == 0
