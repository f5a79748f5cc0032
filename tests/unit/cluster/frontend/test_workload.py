from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.frontend.scheduler import Assignment
from cluster.frontend.workload import Stage, Workload
from octet.ids import WorkerId
from octet.messages import WorkerLoad

PAGE = 4
PREFILLS = [WorkerId("prefill-0"), WorkerId("prefill-1")]
DECODES = [WorkerId("decode-0"), WorkerId("decode-1")]


def load(free: int) -> WorkerLoad:
    return WorkerLoad(kv_pages_total=64, kv_pages_free=free, running=0, waiting=0, tokens=0)


def assign(workload: Workload, choices: tuple[int, ...] = (0,), prefill: int = 0, decode: int = 0) -> dict[int, Stage]:
    """A prompt of 10 tokens, 4 of them cached."""
    to = Assignment(prefill=PREFILLS[prefill], decode=DECODES[decode], reason="")
    return workload.assign(choices, 0, 10, 4, to)


@pytest.fixture
def workload() -> Workload:
    workload = Workload(PAGE, 100)
    workload.set_workers(PREFILLS, DECODES, [])
    return workload


def queued(workload: Workload) -> list[int]:
    return [view.queued_tokens for view in workload.prefill_views({})]


def promised(workload: Workload) -> list[tuple[int, int]]:
    return [(view.promised_pages, view.live_sequences) for view in workload.decode_views()]


def test_a_prompt_is_queued_once_and_promises_its_pages_and_one_more_per_choice(workload: Workload) -> None:
    assign(workload, (0, 1, 2), prefill=1)
    assert (queued(workload), promised(workload)) == ([0, 6], [(5, 3), (0, 0)])


def test_with_the_first_token_a_prompt_is_queued_no_more(workload: Workload) -> None:
    stages = assign(workload)
    workload.note_token(stages[0], PREFILLS[0])
    assert (queued(workload), promised(workload)) == ([0, 0], [(3, 1), (0, 0)])


def test_prompts_are_unanswered_until_their_first_token(workload: Workload) -> None:
    stages = [assign(workload, (0, 1), prefill)[0] for prefill in (0, 1)]
    assert workload.unanswered_prompt_tokens == 12
    workload.note_token(stages[1], PREFILLS[1])
    assert workload.unanswered_prompt_tokens == 6


def test_with_the_decode_workers_first_token_pages_count_as_taken(workload: Workload) -> None:
    stages = assign(workload)
    workload.note_token(stages[0], DECODES[0])
    assert promised(workload) == [(0, 1), (0, 0)]


def test_a_token_of_another_decode_worker_moves_the_choice_there(workload: Workload) -> None:
    stages = assign(workload)
    workload.note_token(stages[0], DECODES[1])
    assert promised(workload) == [(0, 0), (0, 1)]
    assert [stages[0].depends_on(worker) for worker in DECODES] == [False, True]


def test_a_choice_depends_on_its_prefill_worker_until_its_decode_worker_is_heard(workload: Workload) -> None:
    (stage,) = assign(workload).values()
    found = [(stage.depends_on(PREFILLS[0]), stage.depends_on(DECODES[0]))]
    for worker in (PREFILLS[0], DECODES[0]):
        workload.note_token(stage, worker)
        found.append((stage.depends_on(PREFILLS[0]), stage.depends_on(DECODES[0])))
    assert found == [(True, True), (True, True), (False, True)]


def test_free_pages_are_those_of_the_last_report_or_all_before_the_first(workload: Workload) -> None:
    workload.report(DECODES[1], load(5))
    workload.report(DECODES[1], load(7))
    assert [view.free_pages for view in workload.decode_views()] == [100, 7]


def test_a_draining_worker_has_no_view_and_is_known(workload: Workload) -> None:
    workload.set_workers(PREFILLS, DECODES, [PREFILLS[0], DECODES[1]])
    assert [view.worker_id for view in workload.prefill_views({})] == ["prefill-1"]
    assert [view.worker_id for view in workload.decode_views()] == ["decode-0"]
    assert workload.knows(DECODES[1])


def test_a_worker_that_is_gone_is_not_known(workload: Workload) -> None:
    workload.set_workers(PREFILLS[:1], DECODES, [])
    assert [workload.knows(worker) for worker in PREFILLS] == [True, False]


@given(
    st.lists(st.tuples(st.sampled_from([1, 2, 3]), st.integers(0, 1), st.integers(0, 1)), max_size=6),
    st.data(),
)
def test_whatever_happens_nothing_is_counted_when_every_choice_is_dropped(
    asked: list[tuple[int, int, int]], data: st.DataObject
) -> None:
    workload = Workload(PAGE, 100)
    workload.set_workers(PREFILLS, DECODES, [])
    stages = [
        stage
        for choices, prefill, decode in asked
        for stage in assign(workload, tuple(range(choices)), prefill, decode).values()
    ]
    for stage in data.draw(st.permutations(stages * 2)):
        workload.note_token(stage, data.draw(st.sampled_from([stage.prefill, *DECODES])))
    for stage in data.draw(st.permutations(stages)):
        workload.drop(stage)
    assert (queued(workload), promised(workload)) == ([0, 0], [(0, 0), (0, 0)])


def test_places_are_free_in_batches_of_workers_that_have_the_pages(workload: Workload) -> None:
    assert workload.free_places(10, 4) == 8
    assign(workload, (0, 1, 2))
    assert workload.free_places(10, 4) == 5
    workload.report(DECODES[1], load(free=2))
    assert (workload.free_places(8, 4), workload.free_places(9, 4)) == (5, 1), "two pages hold eight tokens"
    workload.set_workers(PREFILLS, DECODES, [DECODES[0]])
    assert (workload.free_places(8, 4), workload.free_places(9, 4)) == (4, 0)


def test_a_batch_that_is_overfull_takes_no_places_from_another(workload: Workload) -> None:
    assign(workload, tuple(range(7)))
    assert workload.free_places(10, 4) == 4
