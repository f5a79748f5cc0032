"""What `octet simulate` is asked for."""

from __future__ import annotations

import json
import pathlib
import random
from typing import Any

import pytest
from typer.testing import CliRunner

from octet.config import load_config
from octet.errors import ConfigError
from ops.cli import app
from ops.simulate.command import SimulateOptions, divided, simulate

POOLS = ("prefill", "decode", "experts")
TRACE = pathlib.Path("no-trace")


def test_all_gpus_are_used_but_what_no_member_has_room_for() -> None:
    draw = random.Random()
    for _ in range(200):
        sizes = {pool: draw.randint(1, 40) for pool in POOLS}
        each = {pool: draw.choice((0.1, 0.5, 1, 2, 8)) for pool in POOLS}
        gpus = draw.randint(24, 1024)
        found = divided(gpus, sizes, each)
        taken = sum(found[pool] * each[pool] for pool in POOLS)
        assert gpus - min(each.values()) - 1e-6 < taken < gpus + 1e-6
        factor = gpus / sum(sizes[pool] * each[pool] for pool in POOLS)
        assert all(found[pool] >= max(1, int(sizes[pool] * factor - 1e-6)) for pool in POOLS if factor >= 1)


@pytest.mark.parametrize(
    ("gpus", "each", "expected"),
    [
        (1024, (1, 1, 1), (256, 256, 512)),
        (63, (1, 1, 1), (16, 16, 31)),
        (100, (1, 1, 2), (17, 17, 33)),
        (3, (1, 1, 1), (1, 1, 1)),
        (10, (1, 1, 8), (1, 1, 1)),
    ],
)
def test_gpus_are_divided_in_the_proportions_of_the_config(
    gpus: int, each: tuple[int, ...], expected: tuple[int, ...]
) -> None:
    found = divided(gpus, dict(zip(POOLS, (16, 16, 32), strict=True)), dict(zip(POOLS, each, strict=True)))
    assert tuple(found.values()) == expected


def test_too_few_gpus_are_refused_with_how_many_it_takes() -> None:
    config = load_config(overrides=["pools.experts.num_gpus=8", "pools.prefill.size=5"])
    with pytest.raises(ConfigError, match=r"--gpus.*9 GPUs.*at least 10 for one member of each pool"):
        simulate(config, SimulateOptions(trace=TRACE, gpus=9))
    with pytest.raises(ConfigError, match=r"--gpus.*21 GPUs.*at least 22 for the sizes"):
        simulate(config, SimulateOptions(trace=TRACE, gpus=21, autoscale=True))


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"fixed": (1, 1, 1), "gpus": 9}, "--fixed and --gpus"),
        ({"search": True, "gpus": 9}, "--search-fixed and --gpus"),
        ({"search": True, "autoscale": True}, "--search-fixed and --autoscale"),
        ({"skew": (1.0, 0.0)}, "--skew.*1,0"),
        ({"skew": (-1.0, 0.0)}, "--skew.*-1,0"),
        ({"skew": (float("nan"), 1.0)}, "--skew.*nan,1"),
        ({"skew": (0.0, float("nan"))}, "--skew.*0,nan"),
        ({"skew": (float("inf"), float("inf"))}, "--skew.*inf,inf"),
    ],
)
def test_what_contradicts_itself_is_refused_before_anything_is_read(given: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        simulate(load_config(), SimulateOptions(trace=TRACE, **given))


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--seed", "-1"),
        *(("--attainment", value) for value in ("0", "2", "nan")),
        *(("--price", value) for value in ("-1", "nan", "inf")),
        *(("--day", value) for value in ("-1", "5", "nan")),
        *((option, value) for option in ("--hours", "--time-scale", "--lose-every") for value in ("inf", "nan")),
    ],
)
def test_a_number_out_of_its_range_is_an_error_of_usage(option: str, value: str) -> None:
    done = CliRunner().invoke(app, ["simulate", str(TRACE), "-c", "no-config", option, value])
    assert done.exit_code == 2
    assert f"'{option}'" in done.output


REPORT: dict[str, Any] = {
    "schema": "octet.breakdown/1",
    "model": {"moe_layers": 89, "experts": 160},
    "costs": {"processor": {}},
}


@pytest.mark.parametrize(
    ("report", "told"),
    [
        ({"schema": "octet.breakdown/1"}, r"model\.moe_layers None"),
        (REPORT | {"costs": [1]}, "costs"),
        (REPORT | {"model": {}}, r"model\.moe_layers None"),
        (REPORT | {"model": "glm"}, r"model\.moe_layers None"),
        (REPORT, r"costs\.attention\.fixed_s None"),
        (REPORT | {"costs": {"processor": {}, "attention": {"fixed_s": "1"}}}, r"costs\.attention\.fixed_s '1'"),
    ],
)
def test_a_breakdown_that_lacks_something_is_refused_with_what(
    tmp_path: pathlib.Path, report: object, told: str
) -> None:
    trace, file = tmp_path / "trace.jsonl", tmp_path / "breakdown.json"
    trace.write_text('{"timestamp": 0, "input_length": 3, "output_length": 4}\n')
    file.write_text(json.dumps(report))
    with pytest.raises(ConfigError, match=rf"--calibrate.*breakdown\.json.*{told}"):
        simulate(load_config(), SimulateOptions(trace=trace, calibrate=file, fixed=(1, 1, 10)))
