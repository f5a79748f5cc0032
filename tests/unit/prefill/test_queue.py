from __future__ import annotations

import dataclasses
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from octet.ids import RequestId, WorkerId
from octet.messages import PrefillRequest, pack_ids
from octet.request import Output, Sampling, Stopping
from prefill.queue import PrefillQueue, Task


def request(
    name: str, num_tokens: int = 4, *, priority: int = 0, arrival_s: float = 0.0, choices: tuple[int, ...] = (0,)
) -> PrefillRequest:
    return PrefillRequest(
        request_id=RequestId(name),
        attempt=0,
        choices=choices,
        token_ids=pack_ids(range(num_tokens)),
        num_prompt_tokens=num_tokens,
        sampling=Sampling(),
        stopping=Stopping(max_new_tokens=1),
        output=Output(),
        priority=priority,
        arrival_s=arrival_s,
        decode_worker=WorkerId("decode-0"),
        frontend=WorkerId("frontend-0"),
    )


def queue_of(*requests: PrefillRequest, running: int | None = None) -> PrefillQueue:
    """With the first `running` of the requests admitted, in the queue's order."""
    queue = PrefillQueue(max_running=100)
    for each in requests:
        queue.add(each)
    for _ in range(len(requests) if running is None else running):
        task = queue.next_to_admit()
        assert task is not None
        queue.admit(task, [])
    return queue


def names(tasks: list[Task]) -> list[str]:
    return [task.request.request_id for task in tasks]


def step(queue: PrefillQueue, budget: int) -> list[tuple[str, int, int]]:
    """(request, first token, last token + 1) of each chunk, which is then done."""
    chunks = queue.chunks(budget)
    spans = [(str(chunk.task.request.request_id), chunk.task.done, chunk.stop) for chunk in chunks]
    for chunk in chunks:
        chunk.task.done = chunk.stop
        if chunk.last:
            queue.finish(chunk.task)
    return spans


def test_a_lower_priority_number_goes_first_then_the_earlier_arrival() -> None:
    requests = [
        request("c", priority=1, arrival_s=1),
        request("b", priority=0, arrival_s=9),
        request("a", priority=0, arrival_s=3),
        request("first", priority=-1, arrival_s=50),
    ]
    random.shuffle(requests)
    assert names(queue_of(*requests, running=0).waiting) == ["first", "a", "b", "c"]


def test_running_requests_are_computed_in_the_same_order() -> None:
    queue = queue_of(request("late", arrival_s=2))
    queue.add(request("early", arrival_s=1))
    task = queue.next_to_admit()
    assert task is not None
    queue.admit(task, [3])
    assert names(queue.running) == ["early", "late"]


def test_chunks_are_packed_up_to_the_budget() -> None:
    queue = queue_of(request("a", 5, arrival_s=0), request("b", 4, arrival_s=1), request("c", 3, arrival_s=2))
    assert step(queue, 8) == [("a", 0, 5), ("b", 0, 3)]
    assert step(queue, 8) == [("b", 3, 4), ("c", 0, 3)]


def test_a_prompt_longer_than_the_budget_takes_several_steps() -> None:
    queue = queue_of(request("a", 10))
    assert [step(queue, 4) for _ in range(4)] == [[("a", 0, 4)], [("a", 4, 8)], [("a", 8, 10)], []]


@given(st.lists(st.integers(1, 40), max_size=6), st.integers(1, 16))
def test_every_token_is_computed_once_and_no_step_exceeds_the_budget(lengths: list[int], budget: int) -> None:
    queue = queue_of(*(request(str(n), length, arrival_s=n) for n, length in enumerate(lengths)))
    computed: dict[str, list[int]] = {str(n): [] for n in range(len(lengths))}
    while queue.running:
        spans = step(queue, budget)
        assert 0 < sum(stop - start for _, start, stop in spans) <= budget
        for name, start, stop in spans:
            computed[name] += range(start, stop)
    assert list(computed.values()) == [list(range(length)) for length in lengths]


def test_who_ends_with_the_next_chunk_is_told_by_what_is_left_of_prompts() -> None:
    queue = queue_of(
        *(request(name, length, arrival_s=n) for n, (name, length) in enumerate([("a", 5), ("b", 4), ("c", 3)])),
        running=2,
    )
    assert [names(queue.next_to_finish(budget)) for budget in (4, 5, 9, 11, 12)] == [
        [],
        ["a"],
        ["a", "b"],
        ["a", "b"],
        ["a", "b", "c"],
    ]
    step(queue, 7)
    assert names(queue.next_to_finish(5)) == ["b", "c"]


def test_no_more_run_than_may() -> None:
    queue = PrefillQueue(max_running=1)
    for number in range(2):
        queue.add(request(str(number), arrival_s=number))
    task = queue.next_to_admit()
    assert task is not None
    queue.admit(task, [])
    assert queue.next_to_admit() is None


@pytest.mark.parametrize("running", [0, 2])
def test_a_request_is_taken_out_wherever_it_is(running: int) -> None:
    queue = queue_of(request("a"), request("b"), running=running)
    assert names(queue.remove(RequestId("a"), None)) == ["a"]
    assert names(queue.waiting) + names(queue.running) == ["b"]


def test_one_choice_of_several_is_not_taken_out_of_a_shared_prompt() -> None:
    queue = queue_of(request("a", choices=(0, 1)))
    assert queue.remove(RequestId("a"), 1) == []


def test_one_choice_is_taken_out_where_it_is_computed_again() -> None:
    queue = queue_of(request("a", choices=(0,)), request("a", choices=(1,)))
    (gone,) = queue.remove(RequestId("a"), 1)
    assert gone.request.choices == (1,)


def test_one_attempt_is_taken_out_and_another_stays() -> None:
    queue = PrefillQueue(max_running=1)
    for attempt in range(2):
        queue.add(dataclasses.replace(request("a"), attempt=attempt))
    (gone,) = queue.remove(RequestId("a"), attempt=0)
    assert (gone.request.attempt, [task.request.attempt for task in queue.waiting]) == (0, [1])


def test_clearing_returns_every_task() -> None:
    queue = queue_of(request("a", arrival_s=0), request("b", arrival_s=1), running=1)
    assert sorted(names(list(queue.clear()))) == ["a", "b"]
    assert (queue.waiting, queue.running) == ([], [])
