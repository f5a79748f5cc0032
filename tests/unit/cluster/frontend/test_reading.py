"""How much of an answer its client is told at once."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator

import pytest

from cluster.frontend.answer import Piece
from cluster.frontend.record import Outcome, Reader, Record
from octet.errors import RequestFailedError, SlowReaderError
from octet.ids import RequestId
from octet.messages import PrefillRequest, TokenLogprob
from tests.unit.cluster.played import Client, Cluster, failed, playing, soon, token

INTERVAL = 4


@pytest.fixture
async def cluster() -> AsyncIterator[Cluster]:
    async with playing() as cluster:
        yield cluster


async def tell_one_by_one(cluster: Cluster, request: PrefillRequest, first: int, last: int) -> None:
    """Tokens 100 + index, each committed before the next one comes."""
    for index in range(first, last):
        cluster.decode.tell(token(request, index, 100 + index))
        for _ in range(10_000):
            if cluster.frontend.totals.tokens > index:
                break
            await asyncio.sleep(0.001)


def sizes(client: Client) -> list[int]:
    return [len(increment.piece.token_ids) for increment in client.increments]


async def test_the_first_token_is_told_at_once_and_then_so_many_together(cluster: Cluster) -> None:
    client, request = await cluster.admitted(stream_interval=INTERVAL)
    await tell_one_by_one(cluster, request, 0, 1)
    await client.heard(1)
    await tell_one_by_one(cluster, request, 1, 11)
    cluster.decode.tell(token(request, 11, 111, "length"))
    await client.end()
    assert client.tokens() == [100 + index for index in range(12)]
    assert sizes(client) == [1, INTERVAL, INTERVAL, 3]
    assert client.finish_reasons() == ["length"]


async def test_a_choice_that_ends_is_told_at_once(cluster: Cluster) -> None:
    client, request = await cluster.admitted(stream_interval=20, n=2)
    await tell_one_by_one(cluster, request, 0, 3)
    cluster.decode.tell(token(request, 3, 103, "stop"))
    await client.heard(4)
    assert client.finish_reasons() == ["stop"]
    await client.leave()


async def test_what_waits_is_told_before_an_error(cluster: Cluster) -> None:
    client, request = await cluster.admitted(stream_interval=20)
    await tell_one_by_one(cluster, request, 0, 3)
    cluster.decode.tell(failed(request, "out of luck"))
    with pytest.raises(RequestFailedError):
        await client.end()
    assert client.tokens() == [100, 101, 102]


async def test_a_resumed_stream_keeps_its_interval(cluster: Cluster) -> None:
    client, request = await cluster.admitted(stream_interval=INTERVAL, resumable=True)
    await tell_one_by_one(cluster, request, 0, 2)
    resumed = cluster.resume(2)
    await tell_one_by_one(cluster, request, 2, 2 + INTERVAL)
    await resumed.heard(INTERVAL)
    assert sizes(resumed) == [INTERVAL]
    await client.leave()
    await resumed.leave()


@pytest.mark.parametrize("stream_interval", [None, INTERVAL])
async def test_the_whole_is_told_once(cluster: Cluster, stream_interval: int | None) -> None:
    """However many tokens wait for it."""
    client, request = await cluster.admitted(whole=True, n=2, stream_interval=stream_interval)
    for choice in range(2):
        for index in range(40):
            cluster.decode.tell(token(request, index, 100 + index, "length" if index == 39 else None, choice=choice))
    await client.end()
    assert sizes(client) == [40, 40]
    assert client.tokens(0) == client.tokens(1) == [100 + index for index in range(40)]
    assert [increment.usage is not None for increment in client.increments] == [False, True]


async def test_of_a_whole_that_fails_the_error_is_told(cluster: Cluster) -> None:
    client, request = await cluster.admitted(whole=True)
    await tell_one_by_one(cluster, request, 0, 3)
    cluster.decode.tell(failed(request, "out of luck"))
    with pytest.raises(RequestFailedError):
        await client.end()


def piece(choice: int, offset: int, *, last: bool) -> Piece:
    return Piece(
        choice=choice,
        offset=offset,
        token_ids=(offset,),
        text=f"{offset} ",
        logprobs=(),
        finish_reason="length" if last else None,
    )


@pytest.mark.parametrize("whole", [False, True])
async def test_every_token_is_told_once_at_any_interval(whole: bool) -> None:
    """Of any number of choices, which speak in any order, to readers of any pace, of whom some wait for the whole."""
    lengths = [random.randint(1, 30) for _ in range(random.randint(1, 4))]
    interval = random.randint(1, 12)
    record = Record(RequestId("r"), b"", range(len(lengths)), 3, interval)
    reader = Reader(record, [], 10_000, whole=whole)
    record.readers.add(reader)
    told: list[Piece] = []

    async def read() -> None:
        async for increment in reader.increments():
            told.append(increment.piece)
            for _ in range(random.randint(0, 3)):
                await asyncio.sleep(0)

    reading = asyncio.create_task(read())
    turns = [choice for choice, length in enumerate(lengths) for _ in range(length)]
    random.shuffle(turns)
    spoken = [0] * len(lengths)
    for choice in turns:
        spoken[choice] += 1
        record.say(piece(choice, spoken[choice] - 1, last=spoken[choice] == lengths[choice]))
        for _ in range(random.randint(0, 2)):
            await asyncio.sleep(0)
    record.end(Outcome(kind="finished"))
    await soon(reading)
    for choice, length in enumerate(lengths):
        of_choice = [each for each in told if each.choice == choice]
        assert [token_id for each in of_choice for token_id in each.token_ids] == list(range(length))
        assert "".join(each.text for each in of_choice) == "".join(f"{index} " for index in range(length))
        assert [each.finish_reason for each in of_choice] == [None] * (len(of_choice) - 1) + ["length"]
        if whole:
            assert len(of_choice) == 1
        for each in of_choice[1:-1]:
            assert len(each.token_ids) >= interval, f"{[len(each.token_ids) for each in of_choice]} by {interval}"


async def test_a_reader_is_cut_off_for_what_came_first() -> None:
    record = Record(RequestId("r"), b"", range(1), 3)
    reader = Reader(record, [], 10_000)
    reader.cut(SlowReaderError("it takes nothing"))
    reader.cut(SlowReaderError("too much waits for it"))
    record.end(Outcome(kind="finished"))
    with pytest.raises(SlowReaderError, match="it takes nothing"):
        async for _ in reader.increments():
            pass


async def test_what_is_said_while_a_reader_is_busy_is_told_though_the_request_has_ended_since() -> None:
    record = Record(RequestId("r"), b"", range(2), 3)
    reader = Reader(record, [], 10_000)
    record.readers.add(reader)
    record.say(piece(0, 0, last=False))
    increments = reader.increments()
    told = [(await anext(increments)).piece]
    record.say(piece(0, 1, last=True))
    record.say(piece(1, 0, last=True))
    record.end(Outcome(kind="finished"))
    told += [increment.piece async for increment in increments]
    assert [(each.choice, each.token_ids) for each in told] == [(0, (0,)), (0, (1,)), (1, (0,))]


async def test_the_log_probabilities_of_a_prompt_are_told_once_whatever_number_of_choices_begins() -> None:
    record, reported = Record(RequestId("r"), b"", range(3), 3), (TokenLogprob(token_id=7, logprob=None),)
    record.prompt_logprobs = reported
    reader = Reader(record, [], 10_000)
    for choice in range(3):
        record.say(piece(choice, 0, last=True))
    record.end(Outcome(kind="finished"))
    told = [increment.prompt_logprobs async for increment in reader.increments()]
    assert told == [reported, (), ()]


async def test_a_slow_client_that_is_cancelled_is_cancelled() -> None:
    reader = Reader(Record(RequestId("r"), b"", range(1), 3), [], 10_000)

    async def read() -> None:
        with reader.interruptible():
            await asyncio.Event().wait()

    reading = asyncio.create_task(read())
    await asyncio.sleep(0)
    reader.cut(SlowReaderError("it takes nothing"))
    reading.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reading


async def test_a_reader_of_the_whole_is_never_too_slow() -> None:
    record, length = Record(RequestId("r"), b"", range(1), 3), random.randint(5, 50)
    reader = Reader(record, [], 2, whole=True)
    record.readers.add(reader)
    for index in range(length):
        record.say(piece(0, index, last=index + 1 == length))
    record.end(Outcome(kind="finished"))
    (told,) = [increment.piece async for increment in reader.increments()]
    assert told.token_ids == tuple(range(length))
