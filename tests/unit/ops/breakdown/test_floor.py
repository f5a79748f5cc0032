"""The floor counts every weight once."""

from __future__ import annotations

import json
import math
import pathlib

import pytest

from model.census import attention_tensors
from model.config import ModelConfig, read_config
from ops.bench.breakdown.floor import Work, attention_work, expert_work
from ops.bench.checkpoints import BENCH
from ops.bench.machine import Rates


@pytest.fixture
def config(tmp_path: pathlib.Path) -> ModelConfig:
    (tmp_path / "config.json").write_text(json.dumps(BENCH))
    return read_config(tmp_path)


def test_the_weights_are_those_of_the_census(config: ModelConfig) -> None:
    matrices = {name: shape for name, shape in attention_tensors(config).items() if len(shape) == 2}
    del matrices["model.embed_tokens.weight"]
    weights = sum(math.prod(shape) for shape in matrices.values())
    work = attention_work(config, 8, 0, 4)
    assert sum(part.num_bytes for part in work.values()) == 4 * weights
    assert sum(part.num_flops for part in work.values()) == 2 * 8 * weights


def test_attention_reads_every_position_of_every_sequence(config: ModelConfig) -> None:
    work = attention_work(config, 2, 300, 4)["attention"]
    assert work.num_bytes == 300 * 16_384
    assert work.num_flops == 300 * 8 * 16 * 64 * 2 * 2


def test_an_expert_is_read_once_and_multiplied_by_each_of_its_rows(config: ModelConfig) -> None:
    work = expert_work(config, 3, 20, 4)
    assert work.num_bytes == 3 * 1_572_864
    assert work.num_flops == 20 * 2 * 3 * 512 * 256


def test_reading_and_multiplying_go_on_at_once() -> None:
    rates = Rates(threads=2, bytes_per_s=10.0, flops_per_s=100.0)
    assert Work(num_bytes=20, num_flops=100).seconds(rates) == 2.0
    assert Work(num_bytes=20, num_flops=1000).seconds(rates) == 10.0
    assert Work(num_bytes=20).seconds(rates.share(2)) == 4.0
