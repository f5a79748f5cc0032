from __future__ import annotations

import io

import numpy as np
import pytest
from rich.console import Console

from octet.v1 import octet_pb2 as pb
from ops.render import print_status
from ops.render_experts import print_experts


def status_of(num_layers: int, num_experts: int, num_shards: int = 2) -> pb.GetStatusResponse:
    """Random loads, every member silent but the last shard and the first prefill worker."""
    rng = np.random.default_rng()
    status = pb.GetStatusResponse(
        state="READY", placement_version=12, window_s=60, window_tokens_per_s=12345.6, balancedness=0.875
    )
    for layer in range(3, 3 + num_layers):
        tokens = rng.integers(0, 100_000, num_experts)
        status.expert_counts.add(layer=layer, tokens=tokens, window_tokens=tokens, balancedness=rng.random())
    for rank in range(16):
        status.hottest.add(layer=50 + rank, expert=159, tokens=123_456, ratio=19.5)
    lanes = [pb.LaneLoad(worker_id=f"{pool}-{n}", wait_s=0.01234) for pool in ("decode", "prefill") for n in range(8)]
    shard = pb.MemberLoad(
        busy_share=0.6789, busy_ewma=0.5, rows_per_s=123456.7, activated_experts=12.34, queue_depth=1.25,
        frames_per_s=1234.5, wait_s=0.0123, lanes=lanes,
    )  # fmt: skip
    worker = pb.MemberLoad(
        busy_share=0.95, rows_per_s=4321.0, queue_depth=17.5, frames_per_s=43.2, step_s=0.0234, wait_share=0.456,
        wait_ewma=0.4, kv_share=0.89,
    )  # fmt: skip
    shards = [pb.Member(worker_id=f"experts-{n}", state="READY") for n in range(num_shards)]
    shards[-1].load.CopyFrom(shard)
    status.pools.add(name="prefill", members=[pb.Member(worker_id="prefill-0", state="READY", load=worker)])
    status.pools.add(name="decode", members=[pb.Member(worker_id="decode-0", state="READY")])
    status.pools.add(name="experts", members=shards)
    return status


def printed(status: pb.GetStatusResponse, width: int, colours: bool = False) -> list[str]:
    out = io.StringIO()
    console = Console(file=out, width=width, color_system="truecolor" if colours else None, force_terminal=colours)
    print_experts(status, console)
    return out.getvalue().splitlines()


@pytest.mark.parametrize(("num_layers", "num_experts"), [(3, 32), (89, 160), (1, 8), (61, 256)])
def test_the_page_fits_eighty_columns(num_layers: int, num_experts: int) -> None:
    lines = printed(status_of(num_layers, num_experts, num_shards=64), width=80)
    assert max(map(len, lines)) <= 80
    assert not any("…" in line for line in lines if not line.startswith("wait ms of lane"))


@pytest.mark.parametrize("colours", [False, True])
def test_every_layer_is_on_the_page(colours: bool) -> None:
    text = "\n".join(printed(status_of(89, 160), width=120, colours=colours))
    numbers = [f"{layer}+" for layer in range(3, 91, 2)] + ["91"] if colours else map(str, range(3, 92))
    assert all(f" {number}" in text for number in numbers)


def test_a_hot_expert_stands_out() -> None:
    status = status_of(1, 32)
    tokens = np.full(32, 10)
    tokens[7] = 160
    status.expert_counts[0].window_tokens[:] = tokens.tolist()
    cells = printed(status, width=80)[3].split()[1]
    assert cells[14:16] == "██"
    assert set(cells[:14] + cells[16:]) == {"▂"}


def test_a_level_load_looks_level_and_not_hot() -> None:
    status = status_of(1, 32)
    status.expert_counts[0].window_tokens[:] = [1000] * 32
    assert set(printed(status, width=80)[3].split()[1]) == {"▆"}


def test_the_hottest_experts_are_named() -> None:
    assert "50/159: 123,456 (19.5×)" in "\n".join(printed(status_of(3, 32), width=80))


def test_members_are_shown_with_their_load() -> None:
    rows = {line.split()[0]: line.split()[1:] for line in printed(status_of(3, 32), width=80) if line.split()}
    text = printed(status_of(3, 32), width=80)
    assert ["experts-1", "68%", "50%", "1,234.5", "123,456.7", "12.3", "1.25", "12.30"] in [t.split() for t in text]
    assert rows["prefill-0"] == ["95%", "43.2", "23.4", "46%", "40%", "4,321.0", "17.5", "89%"]


def test_a_member_that_does_not_answer_is_called_silent() -> None:
    lines = [line.split() for line in printed(status_of(3, 32), width=80)]
    assert ["experts-0", "silent"] in lines
    assert ["decode-0", "silent"] in lines


def test_a_cluster_without_traffic_has_a_page() -> None:
    status = status_of(2, 8)
    del status.hottest[:]
    for counts in status.expert_counts:
        counts.window_tokens[:] = [0] * 8
        counts.balancedness = 0
    assert any(line.split() == ["3", "-"] for line in printed(status, width=80))


def test_a_router_service_that_is_silent_is_said_to_be() -> None:
    assert "tells nothing" in printed(pb.GetStatusResponse(state="FAILED"), width=80)[-1]


def test_the_compact_status_of_a_large_model_stays_compact() -> None:
    out = io.StringIO()
    print_status(status_of(89, 160), Console(file=out, width=80, color_system=None))
    lines = out.getvalue().splitlines()
    assert len(lines) < 12
    assert max(map(len, lines)) <= 80
    assert "balancedness 0.875" in out.getvalue()


def test_the_compact_status_folds_bars_that_do_not_fit() -> None:
    out = io.StringIO()
    print_status(status_of(3, 160), Console(file=out, width=80, color_system=None))
    assert max(map(len, out.getvalue().splitlines())) <= 80
    assert "…" not in out.getvalue()


def test_where_nobody_is_there_no_balancedness_and_no_empty_table_is_shown() -> None:
    status = status_of(3, 32)
    del status.pools[:]
    status.balancedness, status.reason = 0.0, "no member is there"
    for counts in status.expert_counts:
        counts.balancedness = 0.0
    out = io.StringIO()
    print_status(status, Console(file=out, width=120, color_system=None))
    text = "\n".join(printed(status, width=120))
    assert "READY (no member is there)" in text
    assert "0.000" not in text + out.getvalue()
    assert "busy" not in text
