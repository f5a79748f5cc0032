"""Who runs when, on which prompts."""

from __future__ import annotations

import contextlib
import io
import pathlib
from collections.abc import Sequence

import pytest
from rich.console import Console

from octet.errors import ConfigError
from ops.bench.machine import Machine
from ops.bench.peers import command
from ops.bench.peers.command import PeersOptions, as_json, bench_peers, print_trials, run_rounds
from ops.bench.peers.contestants import Size
from ops.bench.peers.environments import PeerError

MACHINE = Machine(cpu="cpu", cores=2, memory_gib=24, gpu="", python="3.11", torch="2.13", date="2026-11-25", load=0.0)


class Recorded:
    """A contestant that takes as long as it has tokens to make."""

    def __init__(self, name: str, log: list[tuple[str, int, int]], token_s: float) -> None:
        self.name, self.version, self._log, self._token_s = name, f"{name} 1", log, token_s
        self.prompts: list[Sequence[Sequence[int]]] = []

    def run(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> float:
        self._log.append((self.name, len(prompts), new_tokens))
        self.prompts.append(prompts)
        return 1.0 + self._token_s * len(prompts) * (new_tokens - 1)

    def close(self) -> None:
        return


@pytest.fixture
def options(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> PeersOptions:
    monkeypatch.setattr(command, "_REST_S", 0.0)
    return PeersOptions(peers=("vllm",), streams=(1, 4), prompt_tokens=6, new_tokens=10, rounds=2, env_dir=tmp_path)


def test_why_a_peer_is_left_out_is_shown_as_it_is(options: PeersOptions, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*of_what: object) -> None:
        raise PeerError("vllm", "no package [/x] [abc]")

    monkeypatch.setattr(command, "PEERS", {"vllm": refuse})
    monkeypatch.setattr(command, "ClusterContestant", lambda *of_what: Recorded("octet", [], 0.1))
    monkeypatch.setattr(command, "WholeAnswers", lambda cluster: cluster)
    size = Size(checkpoint=options.env_dir, threads=1, max_sequences=1, max_len=9)
    out = io.StringIO()
    with contextlib.ExitStack() as closing:
        command._start(options, size, closing, Console(file=out, width=200))
    assert out.getvalue() == "left out: peer 'vllm': no package [/x] [abc]\n"


def test_contestants_take_turns_and_begin_by_turns(options: PeersOptions) -> None:
    log: list[tuple[str, int, int]] = []
    ours, theirs = Recorded("octet", log, 0.1), Recorded("vllm", log, 0.2)
    trials = run_rounds([ours, theirs], options, vocab_size=100)
    a, b = "octet", "vllm"
    orders = [[name for name, streams, tokens in log if (streams, tokens) == (4, 11)]]
    assert orders == [[a, a, b, b, b, b, a, a, a, a, b, b]]
    assert len(log) == 3 * 2 * 2 * (8 + 2)
    assert [len(of_pair) for of_pair in trials.values()] == [2] * 4
    assert trials["octet", 4][0].decode_rate == pytest.approx(10.0)


def test_all_get_the_same_prompts_and_no_prompt_comes_twice(options: PeersOptions) -> None:
    log: list[tuple[str, int, int]] = []
    ours, theirs = Recorded("octet", log, 0.1), Recorded("vllm", log, 0.2)
    run_rounds([ours, theirs], options, vocab_size=10_000)
    assert ours.prompts == theirs.prompts
    flat = [tuple(prompt) for prompts in ours.prompts for prompt in prompts]
    assert len(set(flat)) == len(flat)
    assert {len(prompt) for prompt in flat} == {6}


def test_the_table_holds_ratios_against_their_goals(options: PeersOptions) -> None:
    log: list[tuple[str, int, int]] = []
    contestants = [Recorded("octet", log, 0.1), Recorded("octet-whole", log, 0.05), Recorded("vllm", log, 0.2)]
    trials = run_rounds(contestants, options, vocab_size=100)
    out = io.StringIO()
    console = Console(file=out, width=160, color_system=None, highlight=False)
    versions = {contestant.name: contestant.version for contestant in contestants}
    print_trials(MACHINE, versions, trials, options, console)
    assert "2.00 (2.00–2.00) ≥ 1" in out.getvalue()
    assert "4.00 (4.00–4.00) ≥ 1" in out.getvalue()
    assert "1.00 (1.00–1.00) < 1.2" in out.getvalue()
    report = as_json(MACHINE, versions, trials, options)
    assert {(result["contestant"], result["streams"]) for result in report["results"]} == {
        (name, streams) for name in ("octet", "octet-whole", "vllm") for streams in (1, 4)
    }
    for result in report["results"]:
        of_decode = {ours: kinds["decode"]["median"] for ours, kinds in result["ratios"].items()}
        expected = {"octet": 2.0, "octet-whole": 4.0} if result["contestant"] == "vllm" else {}
        assert of_decode == pytest.approx(expected)


def test_a_peer_takes_part_once(tmp_path: pathlib.Path) -> None:
    with pytest.raises(ConfigError, match=r"--peers.*local more than once"):
        bench_peers(None, PeersOptions(peers=("local", "vllm", "local"), env_dir=tmp_path), None)


def test_an_unknown_peer_is_refused_before_anything_starts(tmp_path: pathlib.Path) -> None:
    with pytest.raises(ConfigError, match="sglang"):
        bench_peers(None, PeersOptions(peers=("sglang",), env_dir=tmp_path), None)
