from __future__ import annotations

import contextlib
import itertools
import socket
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from octet.errors import LaneError, RequestLimitError, WrongEpochError
from octet.ids import Epoch
from router.exchange import ExpertRows
from router.frames import GIVES_WAY, HEADER_BYTES, SHARED, FrameBuffer, FrameLayout, Header, Kind, new_frames
from router.frames_cpu import add_reply, send_call, send_reply, write_call

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


@given(
    kind=st.sampled_from(Kind),
    epoch=_int63,
    sequence=_int63,
    layer=_int63,
    num_rows=_int63,
    payload_bytes=_int63,
    gives_way=st.booleans(),
    shared=st.booleans(),
)
def test_a_header_is_read_as_it_was_written(
    kind: Kind, epoch: int, sequence: int, layer: int, num_rows: int, payload_bytes: int, gives_way: bool, shared: bool
) -> None:
    written = Header(
        kind=kind,
        epoch=Epoch(epoch),
        sequence=sequence,
        layer=layer,
        num_rows=num_rows,
        payload_bytes=payload_bytes,
        gives_way=gives_way,
        shared=shared,
    )
    buffer = torch.empty(HEADER_BYTES, dtype=torch.uint8)
    written.write(buffer)
    assert Header.read(buffer, Epoch(epoch)) == written


@given(st.binary(min_size=HEADER_BYTES, max_size=HEADER_BYTES))
def test_bytes_of_something_else_are_no_frame(data: bytes) -> None:
    with pytest.raises(LaneError, match="not a frame"):
        Header.read(torch.tensor(list(data), dtype=torch.uint8), EPOCH)


@pytest.mark.parametrize(("field", "value"), [(1, max(Kind) + 1), (7, 4), (7, -1)], ids=["kind", "flag", "flag"])
def test_an_unknown_kind_or_flag_is_no_frame(field: int, value: int) -> None:
    buffer = torch.empty(HEADER_BYTES, dtype=torch.uint8)
    Header(kind=Kind.CALL, epoch=EPOCH).write(buffer)
    buffer.view(torch.int64)[field] = value
    with pytest.raises(LaneError, match="not a frame"):
        Header.read(buffer, EPOCH)


def test_a_header_of_another_epoch_names_both() -> None:
    buffer = torch.empty(HEADER_BYTES, dtype=torch.uint8)
    Header(kind=Kind.HEARTBEAT, epoch=Epoch(4)).write(buffer)
    with pytest.raises(WrongEpochError, match=r"epoch 4 .* epoch 3"):
        Header.read(buffer, EPOCH)


@pytest.fixture(scope="module")
def wire() -> Iterator[tuple[socket.socket, socket.socket]]:
    with contextlib.ExitStack() as closing:
        ends = socket.socketpair()
        for end in ends:
            closing.enter_context(end)
        yield ends


def received(wire: tuple[socket.socket, socket.socket], sent: int, layout: FrameLayout) -> FrameBuffer:
    """What was sent at the first end, as it arrives at the other."""
    (words,) = new_frames(layout, 1)
    assert wire[1].recv_into(words.view(np.uint8).data, sent, socket.MSG_WAITALL) == sent
    return FrameBuffer(layout, words)


@given(layout=_layouts, data=st.data())
def test_a_call_is_read_as_it_was_sent(
    wire: tuple[socket.socket, socket.socket], layout: FrameLayout, data: st.DataObject
) -> None:
    num_rows = data.draw(st.integers(1, layout.max_rows))
    rows, chosen = rows_of(num_rows, layout), torch.randperm(num_rows)
    x_TW = rows.x_UH[chosen.argsort()].view(torch.int32)
    arrays = [part.numpy() for part in (x_TW, chosen, rows.slots_UK, rows.weights_UK)]
    gives_way, shared = data.draw(st.booleans()), data.draw(st.booleans())
    flags, (frame,) = GIVES_WAY * gives_way + SHARED * shared, new_frames(layout, 1)
    cut = data.draw(st.integers(0, num_rows))
    for part in [(cut, num_rows), (0, cut)]:
        write_call(frame, *arrays, *part)
    shape = num_rows, arrays[0].shape[1], layout.experts_per_token
    sent = send_call(wire[0].fileno(), frame, EPOCH, 5, 2, flags, *shape)
    assert sent == (HEADER_BYTES if shared else layout.call_bytes(num_rows))
    buffer = received(wire, sent, layout)
    assert Header.read(buffer.memory, EPOCH) == Header(
        kind=Kind.CALL,
        epoch=EPOCH,
        sequence=5,
        layer=2,
        num_rows=num_rows,
        payload_bytes=sent - HEADER_BYTES,
        gives_way=gives_way,
        shared=shared,
    )
    got = (FrameBuffer(layout, frame) if shared else buffer).rows(num_rows)
    assert torch.equal(got.x_UH, rows.x_UH)
    assert torch.equal(got.slots_UK, rows.slots_UK)
    assert torch.equal(got.weights_UK, rows.weights_UK)


@given(layout=_layouts, data=st.data())
def test_a_reply_is_a_view_of_its_buffer(layout: FrameLayout, data: st.DataObject) -> None:
    num_rows = data.draw(st.integers(1, layout.max_rows))
    buffer = FrameBuffer(layout, new_frames(layout, 1)[0])
    y_UH = torch.randn(num_rows, layout.hidden_size).to(layout.dtype)
    buffer.reply(num_rows).copy_(y_UH)
    assert torch.equal(buffer.reply(num_rows), y_UH)


@given(layout=_layouts)
def test_a_frame_has_room_for_the_largest_of_either_direction(layout: FrameLayout) -> None:
    room = new_frames(layout, 2)[1].nbytes
    assert room >= max(layout.call_bytes(layout.max_rows), layout.reply_bytes(layout.max_rows))
    assert room % HEADER_BYTES == 0


def test_more_rows_than_a_frame_takes_are_refused() -> None:
    layout = FrameLayout(hidden_size=8, experts_per_token=2, max_rows=4, dtype=torch.float32)
    with pytest.raises(RequestLimitError, match=r"5 rows .*lane's 4"):
        layout.check(5)


_NOTHING = np.empty(0, np.int32)
_layout = FrameLayout(hidden_size=8, experts_per_token=2, max_rows=16, dtype=torch.float32)


@given(num_rows=st.integers(0, 9), shared=st.booleans(), cuts=st.lists(st.integers(0, 12), max_size=3))
def test_a_reply_is_added_to_its_tokens(
    wire: tuple[socket.socket, socket.socket], num_rows: int, shared: bool, cuts: list[int]
) -> None:
    (words,) = new_frames(_layout, 1)
    reply_UH, y_TH = torch.randn(num_rows, 8), torch.randn(12, 8)
    FrameBuffer(_layout, words).reply(num_rows).copy_(reply_UH)
    size = HEADER_BYTES if shared else _layout.reply_bytes(num_rows)
    sent = send_reply(wire[0].fileno(), words, Kind.REPLY.value, EPOCH, 5, 2, num_rows, size, SHARED * shared)
    rows_U = torch.randperm(12)[:num_rows].sort().values
    expected_TH = y_TH.index_add(0, rows_U, reply_UH)
    (arrived,) = new_frames(_layout, 1)
    assert wire[1].recv_into(arrived.view(np.uint8).data, sent, socket.MSG_WAITALL) == sent == size
    for tokens in itertools.pairwise([0, *sorted(cuts), 12]):
        assert add_reply(arrived, words if shared else _NOTHING, EPOCH, 5, rows_U.numpy(), y_TH.numpy(), *tokens)
    assert torch.equal(y_TH, expected_TH)


def test_nothing_is_added_of_what_is_no_frame() -> None:
    (words,) = new_frames(_layout, 1)
    words[:] = 1
    reply = Header(kind=Kind.REPLY, epoch=EPOCH, sequence=5, num_rows=3, payload_bytes=3 * 8 * 4)
    reply.write(FrameBuffer(_layout, words).memory)
    words[0] ^= 1
    y_TH = torch.zeros(4, 8)
    assert not add_reply(words, _NOTHING, EPOCH, 5, np.arange(3), y_TH.numpy(), 0, 4)
    assert not y_TH.any()


@pytest.mark.parametrize("field", ["kind", "epoch", "sequence", "num_rows", "payload_bytes"])
def test_nothing_is_added_of_what_is_no_reply_to_the_call(field: str) -> None:
    (words,) = new_frames(_layout, 1)
    words[:] = 1
    reply = Header(kind=Kind.REPLY, epoch=EPOCH, sequence=5, num_rows=3, payload_bytes=3 * 8 * 4)
    wrong = {"kind": Kind.REFUSAL}.get(field, getattr(reply, field) + 1)
    memory, y_TH, rows_U = FrameBuffer(_layout, words).memory, torch.zeros(4, 8), torch.arange(3)
    reply._replace(**{field: wrong}).write(memory)
    assert not add_reply(words, _NOTHING, EPOCH, 5, rows_U.numpy(), y_TH.numpy(), 0, 4)
    assert not y_TH.any()
    reply.write(memory)
    assert add_reply(words, _NOTHING, EPOCH, 5, rows_U.numpy(), y_TH.numpy(), 0, 4)


@pytest.mark.parametrize(("payload_bytes", "room"), [(3 * 8 * 4, 1000), (0, 0), (0, 16 + 3 * 8 - 1)])
def test_nothing_is_added_of_a_reply_that_is_not_where_it_says(payload_bytes: int, room: int) -> None:
    (words,) = new_frames(_layout, 1)
    reply = Header(kind=Kind.REPLY, epoch=EPOCH, sequence=5, num_rows=3, payload_bytes=payload_bytes, shared=True)
    reply.write(FrameBuffer(_layout, words).memory)
    y_TH, rows_U = torch.zeros(4, 8), torch.arange(3)
    assert not add_reply(words, np.ones(room, np.int32), EPOCH, 5, rows_U.numpy(), y_TH.numpy(), 0, 4)
    assert not y_TH.any()


_fields = st.integers(-(2**63), 2**63 - 1) | st.integers(-2, 200)


@given(layout=_layouts, kind=st.sampled_from(Kind), num_rows=_fields, payload_bytes=_fields)
def test_no_header_makes_room_for_more_than_a_frame_has(
    layout: FrameLayout, kind: Kind, num_rows: int, payload_bytes: int
) -> None:
    header = Header(kind=kind, epoch=EPOCH, num_rows=num_rows, payload_bytes=payload_bytes)
    with contextlib.suppress(LaneError):
        layout.check_call(header)
        assert kind is Kind.CALL
        assert 0 <= payload_bytes == layout.call_bytes(num_rows) - HEADER_BYTES
        assert num_rows <= layout.max_rows
    with contextlib.suppress(LaneError):
        layout.check_reply(header, layout.max_rows)
        assert kind in (Kind.REPLY, Kind.REFUSAL)
        assert 0 <= payload_bytes <= layout.reply_bytes(layout.max_rows) - HEADER_BYTES
