from __future__ import annotations

import pathlib

import pydantic
import pytest

from octet.config import OctetConfig, load_config
from octet.errors import ConfigError


@pytest.fixture
def file(tmp_path: pathlib.Path) -> pathlib.Path:
    return tmp_path / "octet.yaml"


def test_without_a_file_everything_has_its_default() -> None:
    assert load_config() == OctetConfig()


def test_a_file_overrides_defaults(file: pathlib.Path) -> None:
    file.write_text("pools:\n  experts:\n    size: 5\n")
    assert load_config(file).pools.experts.size == 5


def test_what_a_file_leaves_out_keeps_its_default(file: pathlib.Path) -> None:
    file.write_text("kv:\n  page_size: 8\n")
    assert load_config(file) == OctetConfig(kv=OctetConfig().kv.model_copy(update={"page_size": 8}))


@pytest.mark.parametrize(
    "pool",
    [
        "prefill",
        "decode",
        "experts",
    ],
)
def test_what_a_pool_leaves_out_keeps_its_default(pool: str) -> None:
    defaults = getattr(OctetConfig().pools, pool)
    assert getattr(load_config(None, [f"pools.{pool}.threads=3"]).pools, pool) == defaults.model_copy(
        update={"threads": 3}
    )


def test_a_flag_may_fill_an_empty_section_of_the_file(file: pathlib.Path) -> None:
    file.write_text("kv:\n")
    assert load_config(file, ["kv.page_size=8"]).kv.page_size == 8


def test_flags_override_the_file(file: pathlib.Path) -> None:
    file.write_text("kv:\n  page_size: 32\n  prefill_pages: 9\n")
    kv = load_config(file, ["kv.page_size=64"]).kv
    assert (kv.page_size, kv.prefill_pages) == (64, 9)


def test_of_two_flags_the_last_one_holds() -> None:
    assert load_config(None, ["frontend.port=1", "frontend.port=2"]).frontend.port == 2


def test_a_flag_is_yaml() -> None:
    config = load_config(
        None, ["pools.prefill.resources={octet_prefill: 1}", "model.max_model_len=null", "frontend.host=0.0.0.0"]
    )
    assert config.pools.prefill.resources == {"octet_prefill": 1}
    assert (config.model.max_model_len, config.frontend.host) == (None, "0.0.0.0")


def test_a_flag_may_contain_an_equals_sign() -> None:
    assert load_config(None, ["model.path=/a=b"]).model.path == "/a=b"


@pytest.mark.parametrize("content", ["", "# nothing\n", "kv:\n"])
def test_an_empty_file_or_section_is_all_defaults(file: pathlib.Path, content: str) -> None:
    file.write_text(content)
    assert load_config(file) == OctetConfig()


@pytest.mark.parametrize(
    ("override", "field", "near"),
    [
        ("kv.page_sise=1", "kv.page_sise", "kv.page_size"),
        ("frontent.port=1", "frontent", "frontend"),
        ("pools.expert.size=1", "pools.expert", "pools.experts"),
        ("pools.decode.num_gpu=1", "pools.decode.num_gpu", "pools.decode.num_gpus"),
    ],
)
def test_an_unknown_key_names_the_nearest(override: str, field: str, near: str) -> None:
    with pytest.raises(ConfigError, match=f"did you mean '{near}'") as caught:
        load_config(None, [override])
    assert caught.value.field == field


def test_an_unknown_key_in_a_file_names_the_nearest(file: pathlib.Path) -> None:
    file.write_text("prefill:\n  chunk_token: 3\n")
    with pytest.raises(ConfigError, match=r"did you mean 'prefill\.chunk_tokens'"):
        load_config(file)


@pytest.mark.parametrize(
    ("override", "field"),
    [
        ("kv.page_size=many", "kv.page_size"),
        ("kv.page_size=0", "kv.page_size"),
        ("kv.page_size=1.5", "kv.page_size"),
        ("frontend.port=65536", "frontend.port"),
        ("pools.decode.strategy=TIGHT", "pools.decode.strategy"),
        ("pools.experts.size=-1", "pools.experts.size"),
        ("pools.prefill.resources.gpu=much", "pools.prefill.resources.gpu"),
        ("model.path=[1]", "model.path"),
        ("lane.timeout_s=-2", "lane.timeout_s"),
        ("kv=3", "kv"),
    ],
)
def test_a_wrong_value_names_its_field_and_is_shown(override: str, field: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(None, [override])
    assert caught.value.field == field
    assert override.partition("=")[2].strip("[]") in str(caught.value)


@pytest.mark.parametrize("override", ["kv.page_size", "=3", ""])
def test_a_flag_without_a_name_or_value_shows_the_form(override: str) -> None:
    with pytest.raises(ConfigError, match=r"section\.field=value"):
        load_config(None, [override])


def test_a_flag_that_is_not_yaml_names_its_field() -> None:
    with pytest.raises(ConfigError, match=r"kv\.page_size.*YAML"):
        load_config(None, ["kv.page_size={"])


def test_a_flag_below_a_value_is_refused() -> None:
    with pytest.raises(ConfigError, match="'page_size'"):
        load_config(None, ["kv.page_size=16", "kv.page_size.deep=1"])


@pytest.mark.parametrize("content", ["- 1\n", "seven\n", "kv: [\n"])
def test_a_file_that_is_no_mapping_is_named(file: pathlib.Path, content: str) -> None:
    file.write_text(content)
    with pytest.raises(ConfigError, match="mapping") as caught:
        load_config(file)
    assert caught.value.field == str(file)


def test_a_file_that_cannot_be_read_is_named(file: pathlib.Path) -> None:
    with pytest.raises(ConfigError, match="readable") as caught:
        load_config(file)
    assert caught.value.field == str(file)


def test_a_chunk_of_a_stream_may_not_hold_more_than_may_wait() -> None:
    with pytest.raises(ConfigError, match=r"stream_interval \(9\) must be at most max_unread_tokens \(8\)"):
        load_config(None, ["frontend={stream_interval: 9, max_unread_tokens: 8}"])


def test_heartbeats_must_be_well_below_the_deadline_of_a_lane() -> None:
    with pytest.raises(ConfigError, match=r"lane\.heartbeat_s \(20.0\).*half of lane\.timeout_s"):
        load_config(None, ["lane.heartbeat_s=20"])


@pytest.mark.parametrize("overrides", [["health.period_s=2"], ["health.period_s=12", "health.timeout_s=13"]])
def test_members_are_asked_more_often_than_they_are_taken_for_lost(overrides: list[str]) -> None:
    with pytest.raises(ConfigError, match=r"health\.period_s .* at most half of health\.silent_s"):
        load_config(None, overrides)


def test_a_value_is_taken_as_it_is_and_last(file: pathlib.Path) -> None:
    for name in ("null", "4.6", "./m #1", "[a]"):
        assert load_config(None, ["model.path=other"], {"model.path": name}).model.path == name
    with pytest.raises(ConfigError, match=r"pools\.decode\.sise"):
        load_config(None, [], {"pools.decode.sise": 1})


@pytest.mark.parametrize("override", ["telemetry.window_s=0.5", "telemetry.silent_s=1.5"])
def test_a_telemetry_window_has_room_for_its_steps(override: str) -> None:
    with pytest.raises(ConfigError, match=r"telemetry\.step_s \(1\.0\)"):
        load_config(None, [override])


def test_the_tree_is_frozen() -> None:
    with pytest.raises(pydantic.ValidationError, match="frozen"):
        OctetConfig().kv.page_size = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["autoscaler.decode.min_replicas=9"], "max_replicas"),
        (["autoscaler.look_back_period_s=5"], "metrics_interval_s"),
        (["autoscaler.prefill.min_replicas=0"], "together"),
        (["autoscaler.enabled=true", "pools.decode.size=20"], "autoscaler.decode"),
        (["autoscaler.enabled=true", "autoscaler.max_gpus=3"], "max_gpus"),
    ],
)
def test_a_contradiction_in_the_autoscalers_section_names_the_fields(overrides: list[str], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        load_config(None, overrides)


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("pools.decode.size=many", "'pools.decode.size': found 'many', expected a valid integer"),
        ("frontend.max_message_mib=4096", "found 4096, expected a value less than or equal to 2047"),
        ("autoscaler.look_back_period_s=5", "found a contradiction, expected fields that agree; autoscaler.look_back"),
    ],
)
def test_what_a_field_takes_is_told_in_our_words(override: str, says: str) -> None:
    with pytest.raises(ConfigError) as raised:
        load_config(None, [override])
    assert says in str(raised.value)


def test_sizes_outside_the_bounds_are_fine_while_the_autoscaler_is_off() -> None:
    assert load_config(None, ["pools.decode.size=20"]).pools.decode.size == 20


@pytest.mark.parametrize("pools", [("prefill",), ("decode", "experts"), ("prefill", "experts")])
def test_pools_go_to_zero_together(pools: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError, match="together"):
        load_config(None, [f"autoscaler.{pool}.min_replicas=0" for pool in pools])
    load_config(None, [f"autoscaler.{pool}.min_replicas=0" for pool in ("prefill", "decode", "experts")])


def test_a_budget_counts_the_gpus_that_members_hold() -> None:
    sizes = {"prefill": (1, 4), "decode": (2, 2), "experts": (3, 1)}
    flags = ["autoscaler.enabled=true"]
    for pool, (size, gpus) in sizes.items():
        flags += [f"pools.{pool}.size={size}", f"pools.{pool}.num_gpus={gpus}"]
    load_config(None, [*flags, "autoscaler.max_gpus=11"])
    with pytest.raises(ConfigError, match=r"max_gpus \(10\) is less than the pools' sizes \(11\)"):
        load_config(None, [*flags, "autoscaler.max_gpus=10"])
