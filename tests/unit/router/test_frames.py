from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from octet.errors import LaneError, RequestLimitError, WrongEpochError
from octet.ids import Epoch
from router.exchange import ExpertRows
from router.frames import HEADER_BYTES, FrameLayout, Header, Kind

EPOCH = Epoch(3)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]

_int63 = st.integers(0, 2**63 - 1)
_layouts = st.builds(
    FrameLayout,
    # Rows of a 16-bit dtype are a multiple of four bytes, so that the slots behind them are aligned.
    hidden_size=st.integers(1, 40).map(lambda half: 2 * half),
    experts_per_token=st.integers(1, 9),
    max_rows=st.integers(1, 12),
    dtype=st.sampled_from(DTYPES),
)


def rows_of(num_rows: int, layout: FrameLayout) -> ExpertRows:
    shape_UK = (num_rows, layout.experts_per_token)
    return ExpertRows(
        x_UH=torch.randn(num_rows, layout.hidden_size).to(layout.dtype),
        slots_UK=torch.randint(-1, 100, shape_UK, dtype=torch.int32),
        weights_UK=torch.rand(shape_UK),
    )


@given(kind=st.sampled_from(Kind), epoch=_int63, sequence=_int63, layer=_int63, num_rows=_int63, payload_bytes=_int63)
def test_a_header_is_read_as_it_was_written(
    kind: Kind, epoch: int, sequence: int, layer: int, num_rows: int, payload_bytes: int
) -> None:
    written = Header(
        kind=kind,
        epoch=Epoch(epoch),
        sequence=sequence,
        layer=layer,
        num_rows=num_rows,
        payload_bytes=payload_bytes,
    )
    buffer = torch.empty(HEADER_BYTES, dtype=torch.uint8)
    written.write(buffer)
    assert Header.read(buffer, Epoch(epoch)) == written


@given(st.binary(min_size=HEADER_BYTES, max_size=HEADER_BYTES))
def test_bytes_of_something_else_are_no_frame(data: bytes) -> None:
    with pytest.raises(LaneError, match="not a frame"):
        Header.read(torch.tensor(list(data), dtype=torch.uint8), EPOCH)


def test_an_unknown_kind_is_no_frame() -> None:
    buffer = torch.empty(HEADER_BYTES, dtype=torch.uint8)
    Header(kind=Kind.CALL, epoch=EPOCH).write(buffer)
    buffer.view(torch.int64)[1] = max(Kind) + 1
    with pytest.raises(LaneError, match="not a frame"):
        Header.read(buffer, EPOCH)


def test_a_header_of_another_epoch_names_both() -> None:
    buffer = torch.empty(HEADER_BYTES, dtype=torch.uint8)
    Header(kind=Kind.HEARTBEAT, epoch=Epoch(4)).write(buffer)
    with pytest.raises(WrongEpochError, match=r"epoch 4 .* epoch 3"):
        Header.read(buffer, EPOCH)


@given(layout=_layouts, data=st.data())
def test_a_call_is_read_as_it_was_written(layout: FrameLayout, data: st.DataObject) -> None:
    num_rows = data.draw(st.integers(1, layout.max_rows))
    sent = rows_of(num_rows, layout)
    frame = layout.write_call(layout.new_buffer(), EPOCH, 11, 5, sent)
    header = Header.read(frame, EPOCH)
    got = layout.rows(frame, header.num_rows)
    assert (header.kind, header.sequence, header.layer, header.num_rows) == (Kind.CALL, 11, 5, num_rows)
    assert torch.equal(got.x_UH, sent.x_UH)
    assert torch.equal(got.slots_UK, sent.slots_UK)
    assert torch.equal(got.weights_UK, sent.weights_UK)


@given(layout=_layouts, data=st.data())
def test_a_frame_is_as_long_as_its_header_says(layout: FrameLayout, data: st.DataObject) -> None:
    num_rows = data.draw(st.integers(1, layout.max_rows))
    frame = layout.write_call(layout.new_buffer(), EPOCH, 0, 0, rows_of(num_rows, layout))
    assert len(frame) == layout.call_bytes(num_rows) == HEADER_BYTES + Header.read(frame, EPOCH).payload_bytes


@given(layout=_layouts, data=st.data())
def test_a_reply_is_a_view_of_its_buffer(layout: FrameLayout, data: st.DataObject) -> None:
    num_rows = data.draw(st.integers(1, layout.max_rows))
    buffer = layout.new_buffer()
    y_UH = torch.randn(num_rows, layout.hidden_size).to(layout.dtype)
    layout.reply(buffer, num_rows).copy_(y_UH)
    assert torch.equal(layout.reply(buffer, num_rows), y_UH)


@given(layout=_layouts)
def test_a_buffer_has_room_for_the_largest_frame_of_either_direction(layout: FrameLayout) -> None:
    assert len(layout.new_buffer()) >= max(layout.call_bytes(layout.max_rows), layout.reply_bytes(layout.max_rows))


def test_more_rows_than_a_frame_takes_are_refused() -> None:
    layout = FrameLayout(hidden_size=8, experts_per_token=2, max_rows=4, dtype=torch.float32)
    with pytest.raises(RequestLimitError, match=r"5 rows .*lane's 4"):
        layout.write_call(layout.new_buffer(), EPOCH, 0, 0, rows_of(5, layout))
